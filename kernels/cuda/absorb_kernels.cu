// What stands beside absorbed attention: queries rotated before it, values quantised after it.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace cachalot {
namespace {

// Eight values of a rotated part a thread, of C = kLatentDim and R = kRopeDim, bf16 on 16-byte boundaries.
constexpr int kRopeChunks = kRopeDim / kChunk;

__global__ void __launch_bounds__(256) RopeQueriesVector(const RopeQueriesArguments a) {
  // NOTE: attention asks for keys as soon as it begins: not before the kernels that wrote them have ended.
  WaitForKernelBefore();
  AllowNextKernel();
  const int index = blockIdx.x * 256 + threadIdx.x, row = index / kRopeChunks, chunk = index % kRopeChunks;
  if (row >= a.num_tokens * a.num_heads) return;
  const int t = row / a.num_heads, h = row % a.num_heads;
  const bf16* from = static_cast<const bf16*>(a.q.data) + t * a.q.row_stride + h * (a.nope_dim + kRopeDim) + a.nope_dim;
  const float4* angles = reinterpret_cast<const float4*>(a.cos_sin + static_cast<int64_t>(a.positions[t]) * kRopeDim);
  const uint4 packed = reinterpret_cast<const uint4*>(from)[chunk];
  const float4 cosines = angles[chunk], sines = angles[kRopeChunks + chunk];
  const float cosine[4] = {cosines.x, cosines.y, cosines.z, cosines.w}, sine[4] = {sines.x, sines.y, sines.z, sines.w};
  float v[kChunk];
  UnpackBf16(packed, v);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = v[2 * i], y = v[2 * i + 1];
    v[2 * i] = x * cosine[i] - y * sine[i];
    v[2 * i + 1] = x * sine[i] + y * cosine[i];
  }
  uint4* rotated = reinterpret_cast<uint4*>(static_cast<bf16*>(a.q_absorbed) +
                                            static_cast<int64_t>(row) * (kLatentDim + kRopeDim) + kLatentDim);
  rotated[chunk] = PackBf16(v);
  if (a.slots[t] >= 0) return;
  uint4* out = reinterpret_cast<uint4*>(static_cast<bf16*>(a.out) + static_cast<int64_t>(row) * kLatentDim);
  for (int i = chunk; i < kLatentDim / kChunk; i += kRopeChunks) out[i] = make_uint4(0, 0, 0, 0);
}

// A warp a (token, head): a pair of the rotated part each lane.
__global__ void __launch_bounds__(256) RopeQueries(const RopeQueriesArguments a) {
  WaitForKernelBefore();
  AllowNextKernel();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= static_cast<int64_t>(a.num_tokens) * a.num_heads) return;
  const int64_t t = row / a.num_heads, h = row % a.num_heads;
  const int64_t from = t * a.q.row_stride + h * (a.nope_dim + a.rope_dim) + a.nope_dim;
  const float* angles = a.cos_sin + static_cast<int64_t>(a.positions[t]) * a.rope_dim;
  bf16* rotated = static_cast<bf16*>(a.q_absorbed) + row * (a.latent_dim + a.rope_dim) + a.latent_dim;
  for (int pair = lane; pair < a.rope_dim / 2; pair += kWarpSize) {
    const float x = LoadNumber(a.q.data, from + 2 * pair, a.q.type);
    const float y = LoadNumber(a.q.data, from + 2 * pair + 1, a.q.type);
    const float cosine = angles[pair], sine = angles[a.rope_dim / 2 + pair];
    reinterpret_cast<__nv_bfloat162*>(rotated)[pair] =
        __floats2bfloat162_rn(x * cosine - y * sine, x * sine + y * cosine);
  }
  if (a.slots[t] >= 0) return;
  bf16* out = static_cast<bf16*>(a.out) + row * a.latent_dim;
  for (int i = lane; i < a.latent_dim; i += kWarpSize) out[i] = __float2bfloat16(0.0f);
}

// A thread a chunk: rows of whole groups, bf16.
__global__ void __launch_bounds__(256)
    QuantizeVector(const ActivationRef out, const MatrixRef x, int32_t num_chunks, int32_t row_chunks) {
  AllowNextKernel();
  const int32_t index = static_cast<int32_t>(blockIdx.x * 256 + threadIdx.x);
  const bool is_valid = index < num_chunks;
  const int32_t row = index / row_chunks, chunk = index % row_chunks;
  float v[kChunk] = {};
  if (is_valid) UnpackBf16(*ChunkOf(x, row, chunk), v);
  EmitChunk(out, row, chunk, is_valid, v);
}

// A warp a group of 128.
__global__ void __launch_bounds__(256)
    Quantize(const ActivationRef out, const MatrixRef x, int64_t rows, int64_t cols) {
  AllowNextKernel();
  const int64_t groups = (cols + kScaleGroup - 1) / kScaleGroup,
                index = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / kWarpSize;
  if (index >= rows * groups) return;
  const int64_t row = index / groups, group = index % groups;
  float v[kLaneValues];
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int64_t col = group * kScaleGroup + i * kWarpSize + threadIdx.x % kWarpSize;
    v[i] = col < cols ? LoadNumber(x.data, row * x.row_stride + col, x.type) : 0.0f;
  }
  EmitGroup(out, row, static_cast<int>(group), static_cast<int>(cols), v);
}

bool IsVectorRope(const RopeQueriesArguments& a) {
  return a.latent_dim == kLatentDim && a.rope_dim == kRopeDim && a.q.type == NumberType::kBF16 && MovesByChunks(a.q) &&
         a.nope_dim % kChunk == 0 && reinterpret_cast<uintptr_t>(a.cos_sin) % 16 == 0 &&
         static_cast<int64_t>(a.num_tokens) * a.num_heads * kRopeChunks <= INT32_MAX;
}

}  // namespace

void LaunchRopeQueries(cudaStream_t stream, const RopeQueriesArguments& a) {
  const int64_t rows = static_cast<int64_t>(a.num_tokens) * a.num_heads;
  if (IsVectorRope(a)) {
    Launch(RopeQueriesVector, true, static_cast<unsigned>((rows * kRopeChunks + 255) / 256), 256, 0, stream, a);
  } else {
    Launch(RopeQueries, true, static_cast<unsigned>((rows + 7) / 8), 256, 0, stream, a);
  }
}

void LaunchQuantize(cudaStream_t stream, const ActivationRef& out, const MatrixRef& x, int64_t rows, int64_t cols) {
  const int64_t chunks = rows * (cols / kChunk), groups = rows * ((cols + kScaleGroup - 1) / kScaleGroup);
  if (x.type == NumberType::kBF16 && cols % kScaleGroup == 0 && MovesByChunks(x) && MovesByChunks(out.values) &&
      chunks <= INT32_MAX) {
    QuantizeVector<<<static_cast<unsigned>((chunks + 255) / 256), 256, 0, stream>>>(
        out, x, static_cast<int32_t>(chunks), static_cast<int32_t>(cols / kChunk));
  } else {
    Quantize<<<static_cast<unsigned>((groups + 7) / 8), 256, 0, stream>>>(out, x, rows, cols);
  }
}

}  // namespace cachalot
