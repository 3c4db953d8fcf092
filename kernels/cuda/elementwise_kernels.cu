// Kernels of embedding, norms, silu and gathering: bound by memory, so 16 bytes a load where rows are bf16 and aligned.
#include <algorithm>

#include "kernels/cuda/elementwise_kernels.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rms_norm.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/exponential.h"

namespace cachalot {
namespace {

constexpr int kEmbedThreads = 256;
constexpr int kCopyThreads = 256;
constexpr int kSiluThreads = 256;
constexpr int64_t kMaxRowBlocks = 4096;  // blocks beyond take a second row: a capacity of many rows costs no empty ones

// The row of scales that a row of the stacked weight has. Tiles are in order of rows.
__device__ int ScaleRowOf(const WeightRef& w, int row) {
  int low = 0, high = w.num_tiles - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (w.tiles[middle].first_row <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return w.tiles[low].scale_row;
}

__global__ void __launch_bounds__(kEmbedThreads) EmbedKernel(EmbedArgs a, bool is_vector) {
  const int64_t t = blockIdx.x;
  const WeightRef& table = a.table;
  const int32_t token = a.tokens[t];
  const bool exists = a.slots[t] >= 0 && token >= 0 && token < table.rows;
  const char* row = static_cast<const char*>(table.data) + (exists ? token : 0) * table.row_bytes;
  if (is_vector) {
    for (int chunk = threadIdx.x; chunk < table.cols / kChunk; chunk += kEmbedThreads) {
      const uint4* src = reinterpret_cast<const uint4*>(row) + chunk;
      *ChunkOf(a.h, t, chunk) = exists ? __ldg(src) : make_uint4(0, 0, 0, 0);
    }
    return;
  }
  const bool is_scaled = table.type == NumberType::kE4M3;
  const float* scales = nullptr;
  if (exists && is_scaled) scales = table.scales + static_cast<int64_t>(ScaleRowOf(table, token)) * table.scale_cols;
  for (int c = threadIdx.x; c < table.cols; c += kEmbedThreads) {
    float v = 0.0f;
    if (exists) v = LoadNumber(row, c, table.type) * (is_scaled ? scales[c / kScaleGroup] : 1.0f);
    StoreNumber(a.h.data, t * a.h.row_stride + c, a.h.type, v);
  }
}

__global__ void __launch_bounds__(1024) NormVectorKernel(RmsNormArgs a) {
  __shared__ double shared[kWarpSize];
  NormRowVector(a, blockIdx.x, shared);
}

__global__ void __launch_bounds__(kScalarNormThreads) NormScalarKernel(RmsNormArgs a) {
  __shared__ double shared[kWarpSize];
  NormRowScalar(a, blockIdx.x, shared);
}

__device__ __forceinline__ float SiluTimes(float gate, float up) { return gate / (1.0f + Exp(-gate)) * up; }

__device__ __forceinline__ int64_t ValidRows(const SiluMulArgs& a) {
  if (a.num_valid_rows == nullptr) return a.num_rows;
  return min(static_cast<int64_t>(*a.num_valid_rows), a.num_rows);
}

__global__ void __launch_bounds__(kSiluThreads) SiluVectorKernel(SiluMulArgs a) {
  WaitForKernelBefore();
  AllowNextKernel();
  const int chunk = blockIdx.y * kSiluThreads + threadIdx.x, num_chunks = a.cols / kChunk;
  const bool is_valid = chunk < num_chunks;
  const int64_t num_rows = ValidRows(a);
  for (int64_t t = blockIdx.x; t < num_rows; t += gridDim.x) {
    float gate[kChunk] = {}, up[kChunk] = {};
    if (is_valid) {
      const uint4 packed_gate = *ChunkOf(a.gate_up, t, chunk), packed_up = *ChunkOf(a.gate_up, t, num_chunks + chunk);
      UnpackBf16(packed_gate, gate);
      UnpackBf16(packed_up, up);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) gate[i] = SiluTimes(gate[i], up[i]);
    EmitChunk(a.out, t, chunk, is_valid, gate);
  }
}

// A warp a group.
__global__ void __launch_bounds__(kSiluThreads) SiluScalarKernel(SiluMulArgs a) {
  const int lane = threadIdx.x % kWarpSize;
  const int group = blockIdx.y * (kSiluThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (group * kScaleGroup >= a.cols) return;
  const int64_t num_rows = ValidRows(a);
  for (int64_t t = blockIdx.x; t < num_rows; t += gridDim.x) {
    const int64_t row = t * a.gate_up.row_stride;
    float v[kLaneValues];
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int c = group * kScaleGroup + kWarpSize * i + lane;
      v[i] = 0.0f;
      if (c >= a.cols) continue;
      v[i] = SiluTimes(LoadNumber(a.gate_up.data, row + c, a.gate_up.type),
                       LoadNumber(a.gate_up.data, row + a.cols + c, a.gate_up.type));
    }
    EmitGroup(a.out, t, group, a.cols, v);
  }
}

template <typename Word>
__device__ void CopyOrClearWords(const RowCopy& copy, int64_t dst_row, int64_t src_row) {
  Word* dst = reinterpret_cast<Word*>(copy.dst + dst_row * copy.dst_stride);
  const Word* src = reinterpret_cast<const Word*>(copy.src + src_row * copy.src_stride);
  for (int i = threadIdx.x; i < copy.bytes / static_cast<int>(sizeof(Word)); i += blockDim.x) {
    dst[i] = src_row >= 0 ? src[i] : Word{};
  }
}

__device__ void CopyOrClearRow(const RowCopy& copy, int64_t dst_row, int64_t src_row) {
  switch (copy.word) {
    case 16: return CopyOrClearWords<uint4>(copy, dst_row, src_row);
    case 4: return CopyOrClearWords<uint32_t>(copy, dst_row, src_row);
    default: return CopyOrClearWords<uint8_t>(copy, dst_row, src_row);
  }
}

__global__ void __launch_bounds__(kCopyThreads) GatherRowsKernel(GatherRowsArgs a) {
  const int64_t token = a.row_token[blockIdx.x];
  const int64_t src = token < a.num_src_rows ? token : -1;
  CopyOrClearRow(a.values, blockIdx.x, src);
  CopyOrClearRow(a.scales, blockIdx.x, src);
}

}  // namespace

void LaunchEmbed(cudaStream_t stream, const EmbedArgs& args, int64_t num_rows) {
  const WeightRef& table = args.table;
  const bool is_vector = table.type == NumberType::kBF16 && args.h.type == NumberType::kBF16 &&
                         table.cols % kChunk == 0 && table.row_bytes % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(table.data) % 16 == 0 && MovesByChunks(args.h);
  EmbedKernel<<<static_cast<unsigned>(num_rows), kEmbedThreads, 0, stream>>>(args, is_vector);
}

void LaunchAddRmsNorm(cudaStream_t stream, const RmsNormArgs& args, int64_t num_rows) {
  const bool is_vector = IsVectorNorm(args);
  const unsigned blocks = static_cast<unsigned>(num_rows), threads = NormThreads(args, is_vector);
  if (is_vector) {
    Launch(NormVectorKernel, true, blocks, threads, 0, stream, args);
  } else {
    Launch(NormScalarKernel, true, blocks, threads, 0, stream, args);
  }
}

void LaunchSiluMul(cudaStream_t stream, const SiluMulArgs& args) {
  const bool is_vector = args.gate_up.type == NumberType::kBF16 && args.cols % kChunk == 0 &&
                         MovesByChunks(args.gate_up) && MovesByChunks(args.out.values);
  const int block_cols = is_vector ? kSiluThreads * kChunk : kSiluThreads / kWarpSize * kScaleGroup;
  const dim3 grid(static_cast<unsigned>(std::min(args.num_rows, kMaxRowBlocks)),
                  static_cast<unsigned>((args.cols + block_cols - 1) / block_cols));
  if (is_vector) {
    Launch(SiluVectorKernel, true, grid, kSiluThreads, 0, stream, args);
  } else {
    SiluScalarKernel<<<grid, kSiluThreads, 0, stream>>>(args);
  }
}

void LaunchGatherRows(cudaStream_t stream, const GatherRowsArgs& args, int64_t num_rows) {
  GatherRowsKernel<<<static_cast<unsigned>(num_rows), kCopyThreads, 0, stream>>>(args);
}

}  // namespace cachalot
