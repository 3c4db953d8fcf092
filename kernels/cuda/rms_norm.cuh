// The norm of one row by one block, shared by AddRmsNorm and the latent path.
#ifndef CACHALOT_KERNELS_CUDA_RMS_NORM_CUH_
#define CACHALOT_KERNELS_CUDA_RMS_NORM_CUH_

#include "kernels/cuda/elementwise_kernels.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace cachalot {

inline constexpr int kNormChunks = 2;  // that a thread holds
inline constexpr int kScalarNormThreads = 256;

// The vector path holds the row in registers, as bf16: that is how the residual is stored, and what the norm is of.
inline bool IsVectorNorm(const RmsNormArgs& a) {
  return a.h.type == NumberType::kBF16 && IsBf16OrAbsent(a.delta) && a.cols % kChunk == 0 &&
         a.cols <= 1024 * kNormChunks * kChunk && MovesByChunks(a.h) && MovesByChunks(a.delta) &&
         MovesByChunks(a.plain) && MovesByChunks(a.x.values) && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
}
inline int NormThreads(const RmsNormArgs& a, bool is_vector) {
  if (!is_vector) return kScalarNormThreads;
  const int threads = (a.cols + kNormChunks * kChunk - 1) / (kNormChunks * kChunk);
  return (threads + kWarpSize - 1) / kWarpSize * kWarpSize;
}

// Squares are added in double: a sum that is off in its last place scales the whole row, and so would depend on how
// many threads made it.
__device__ __forceinline__ float NormFactor(double squares, int n, float eps) {
  return 1.0f / sqrtf(static_cast<float>(squares) / static_cast<float>(n) + eps);
}

// Needs blockDim.x * kNormChunks * kChunk >= cols.
__device__ __forceinline__ void NormRowVector(const RmsNormArgs& a, int64_t t, double* shared) {
  const int num_chunks = a.cols / kChunk;
  uint4 h[kNormChunks], delta[kNormChunks];
  float weight[kNormChunks][kChunk];
  // NOTE: in a step of few rows it comes from memory: on its way before the row is there.
#pragma unroll
  for (int i = 0; i < kNormChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    if (chunk >= num_chunks) continue;
    const float4* w = reinterpret_cast<const float4*>(a.weight) + 2 * chunk;
    const float4 w0 = __ldg(w), w1 = __ldg(w + 1);
    weight[i][0] = w0.x, weight[i][1] = w0.y, weight[i][2] = w0.z, weight[i][3] = w0.w;
    weight[i][4] = w1.x, weight[i][5] = w1.y, weight[i][6] = w1.z, weight[i][7] = w1.w;
  }
  WaitForKernelBefore();
  AllowNextKernel();
#pragma unroll
  for (int i = 0; i < kNormChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    h[i] = delta[i] = make_uint4(0, 0, 0, 0);
    if (chunk >= num_chunks) continue;
    h[i] = *ChunkOf(a.h, t, chunk);
    if (a.delta.data != nullptr) delta[i] = *ChunkOf(a.delta, t, chunk);
  }
  double squares = 0.0;
#pragma unroll
  for (int i = 0; i < kNormChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    float v[kChunk];
    UnpackBf16(h[i], v);
    if (a.delta.data != nullptr && chunk < num_chunks) {
      float d[kChunk];
      UnpackBf16(delta[i], d);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] += d[j];
      h[i] = PackBf16(v);
      *ChunkOf(a.h, t, chunk) = h[i];
      UnpackBf16(h[i], v);
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) squares = fma(static_cast<double>(v[j]), static_cast<double>(v[j]), squares);
  }
  const float factor = NormFactor(BlockSum(squares, shared), a.cols, a.eps);
#pragma unroll
  for (int i = 0; i < kNormChunks; ++i) {
    const int chunk = threadIdx.x + i * blockDim.x;
    const bool is_valid = chunk < num_chunks;
    float v[kChunk];
    UnpackBf16(h[i], v);
    if (is_valid) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = v[j] * factor * weight[i][j];
    }
    EmitChunk(a.x, t, chunk, is_valid, v);
    if (is_valid && a.plain.data != nullptr) StoreChunk(a.plain, t, chunk, v);
  }
}

// Any type, width and alignment.
__device__ __forceinline__ void NormRowScalar(const RmsNormArgs& a, int64_t t, double* shared) {
  WaitForKernelBefore();
  AllowNextKernel();
  const int64_t row = t * a.h.row_stride;
  double squares = 0.0;
  for (int c = threadIdx.x; c < a.cols; c += blockDim.x) {
    float v = LoadNumber(a.h.data, row + c, a.h.type);
    if (a.delta.data != nullptr) {
      v += LoadNumber(a.delta.data, t * a.delta.row_stride + c, a.delta.type);
      if (a.h.type != NumberType::kF32) v = __bfloat162float(__float2bfloat16(v));
      StoreNumber(a.h.data, row + c, a.h.type, v);
    }
    squares = fma(static_cast<double>(v), static_cast<double>(v), squares);
  }
  // NOTE: the sum's barrier also lets other threads read what was stored.
  const float factor = NormFactor(BlockSum(squares, shared), a.cols, a.eps);
  const int lane = threadIdx.x % kWarpSize, num_groups = (a.cols + kScaleGroup - 1) / kScaleGroup;
  for (int group = threadIdx.x / kWarpSize; group < num_groups; group += blockDim.x / kWarpSize) {
    float v[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int c = group * kScaleGroup + kWarpSize * i + lane;
      v[i] = 0.0f;
      if (c >= a.cols) continue;
      v[i] = LoadNumber(a.h.data, row + c, a.h.type) * factor * a.weight[c];
      if (a.plain.data != nullptr) StoreNumber(a.plain.data, t * a.plain.row_stride + c, a.plain.type, v[i]);
    }
    EmitGroup(a.x, t, group, a.cols, v);
  }
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_RMS_NORM_CUH_
