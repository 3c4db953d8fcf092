// Random weights by hashes of their positions; kv_b_proj dequantised and split by head. Run at start only.
#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/weights_kernels.h"

namespace cachalot {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 132 * 16;
constexpr int kValues = 8;  // of one row that a thread makes at a time
constexpr int kTile = 32, kTileRows = 8;

int NumBlocks(int64_t threads) {
  return static_cast<int>(std::min<int64_t>((threads + kThreads - 1) / kThreads, kMaxBlocks));
}

__device__ __forceinline__ uint64_t Hash(uint64_t seed, uint64_t counter) {  // splitmix64
  uint64_t z = (seed << 40) + counter * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Four numbers of 16 bits, summed: mean 0, deviation 1.
__device__ __forceinline__ float NearlyNormal(uint64_t bits) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += static_cast<float>((bits >> (16 * i)) & 0xffff) * (1.0f / 65536.0f);
  return (sum - 2.0f) * 1.7320508f;
}

// Sign and mantissa at random, exponent one of four.
__device__ __forceinline__ uint8_t RandomE4m3(uint8_t bits) {
  return static_cast<uint8_t>((bits & 0x87) | ((4 + ((bits >> 3) & 3)) << 3));
}

__global__ void FillRandomKernel(FillRows fill, uint64_t seed, float deviation) {
  const int64_t per_row = (fill.cols + kValues - 1) / kValues, total = fill.rows * per_row;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t row = i / per_row, begin = i % per_row * kValues;
    const int count = static_cast<int>(fill.cols - begin < kValues ? fill.cols - begin : kValues);
    uint8_t* data = static_cast<uint8_t*>(fill.data) + row * fill.row_bytes;
    if (fill.type == NumberType::kE4M3) {
      const uint64_t bits = Hash(seed, i);
      for (int j = 0; j < count; ++j) data[begin + j] = RandomE4m3(static_cast<uint8_t>(bits >> (8 * j)));
      continue;
    }
    for (int j = 0; j < count; ++j) {
      const float value = NearlyNormal(Hash(seed, i * kValues + j)) * deviation;
      if (fill.type == NumberType::kF16) {
        reinterpret_cast<__half*>(data)[begin + j] = __float2half(value);
      } else {
        StoreNumber(data, begin + j, fill.type, value);
      }
    }
  }
}

__global__ void FillNearKernel(float* data, int64_t size, uint64_t seed, float center, float spread) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const float u = static_cast<float>(Hash(seed, i) >> 40) * (2.0f / 16777216.0f) - 1.0f;
    data[i] = center * (1.0f + spread * u);
  }
}

__device__ __forceinline__ float StoredValue(const WeightRef& w, int64_t row, int64_t col) {
  const char* data = static_cast<const char*>(w.data) + row * w.row_bytes;
  const float value = LoadNumber(data, col, w.type);
  return w.type == NumberType::kE4M3 ? value * w.scales[row / 128 * w.scale_cols + col / 128] : value;
}

__device__ __forceinline__ bf16* RowOf(const WeightRef& w, int64_t group, int64_t row) {
  char* data = static_cast<char*>(const_cast<void*>(w.data)) + group * w.group_bytes + row * w.row_bytes;
  return reinterpret_cast<bf16*>(data);
}

// A block turns a tile of a head's N rows around through shared memory. Grid: tiles of C, tiles of N, heads.
__global__ void SplitKKernel(WeightRef kv_b, WeightRef w_uk, int nope_dim, int head_rows) {
  __shared__ float tile[kTile][kTile + 1];
  const int head = blockIdx.z, c0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile;
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int n = n0 + i, c = c0 + threadIdx.x;
    const bool is_inside = n < nope_dim && c < kv_b.cols;
    tile[i][threadIdx.x] = is_inside ? StoredValue(kv_b, static_cast<int64_t>(head) * head_rows + n, c) : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    const int c = c0 + i, n = n0 + threadIdx.x;
    if (n < nope_dim && c < kv_b.cols) RowOf(w_uk, head, c)[n] = __float2bfloat16(tile[threadIdx.x][i]);
  }
}

// Grid: V rows, heads.
__global__ void SplitVKernel(WeightRef kv_b, WeightRef w_uv, int nope_dim, int head_rows) {
  const int64_t v = blockIdx.x, head = blockIdx.y;
  for (int c = threadIdx.x; c < kv_b.cols; c += blockDim.x) {
    RowOf(w_uv, head, v)[c] = __float2bfloat16(StoredValue(kv_b, head * head_rows + nope_dim + v, c));
  }
}

}  // namespace

void LaunchFillRandom(const FillRows& fill, uint64_t seed, float deviation, cudaStream_t stream) {
  const int64_t threads = fill.rows * ((fill.cols + kValues - 1) / kValues);
  if (threads > 0) FillRandomKernel<<<NumBlocks(threads), kThreads, 0, stream>>>(fill, seed, deviation);
}

void LaunchFillNear(float* data, int64_t size, uint64_t seed, float center, float spread, cudaStream_t stream) {
  if (size > 0) FillNearKernel<<<NumBlocks(size), kThreads, 0, stream>>>(data, size, seed, center, spread);
}

void LaunchSplitKvUp(const WeightRef& kv_b, const WeightRef& w_uk, const WeightRef& w_uv, cudaStream_t stream) {
  const int nope_dim = w_uk.cols, v_dim = w_uv.rows, head_rows = nope_dim + v_dim;
  const auto tiles = [](int n) { return static_cast<unsigned>((n + kTile - 1) / kTile); };
  const unsigned num_heads = static_cast<unsigned>(w_uk.num_groups);
  SplitKKernel<<<dim3(tiles(kv_b.cols), tiles(nope_dim), num_heads), dim3(kTile, kTileRows), 0, stream>>>(
      kv_b, w_uk, nope_dim, head_rows);
  SplitVKernel<<<dim3(static_cast<unsigned>(v_dim), num_heads), kThreads, 0, stream>>>(kv_b, w_uv, nope_dim, head_rows);
}

}  // namespace cachalot
