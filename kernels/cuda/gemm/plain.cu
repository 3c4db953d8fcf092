// The plain product: every type, every alignment, without tensor cores. 32 rows of the weight times 32 tokens a block.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm/gemm.h"

namespace cachalot::gemm {
namespace {

constexpr int kPlain = 32;
constexpr int kTileRows = 128;  // of RowTile

__device__ float WeightValue(const WeightRef& w, int32_t group, const RowTile& tile, int32_t row, int32_t col) {
  const uint8_t* data =
      static_cast<const uint8_t*>(w.data) + group * w.group_bytes + (tile.first_row + row) * w.row_bytes;
  const float value = LoadNumber(data, col, w.type);
  if (w.type != NumberType::kE4M3) return value;
  return value * w.scales[group * w.group_scales + static_cast<int64_t>(tile.scale_row) * w.scale_cols + col / 128];
}

// blockIdx: x 32 rows of a row tile, y 32 tokens, z group. 256 threads, four products each.
__global__ void __launch_bounds__(256) PlainGemm(const GemmArguments g) {
  __shared__ float xs[kPlain][kPlain + 1], ws[kPlain][kPlain + 1];
  const int32_t group = blockIdx.z;
  const int64_t begin = g.offsets != nullptr ? g.offsets[group] : 0;
  const int64_t count = g.offsets != nullptr ? g.offsets[group + 1] - begin : g.num_rows;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kPlain;
  const RowTile tile = g.w.tiles[blockIdx.x / (kTileRows / kPlain)];
  const int32_t first_row = blockIdx.x % (kTileRows / kPlain) * kPlain;
  if (first_token >= count || first_row >= tile.num_rows) return;
  const int column = threadIdx.x % kPlain, line = threadIdx.x / kPlain;
  float sum[4] = {};
  for (int32_t k = 0; k < g.w.cols; k += kPlain) {
    for (int i = line; i < kPlain; i += 8) {
      const int32_t col = k + column;
      float x = 0, w = 0;
      if (col < g.w.cols && first_token + i < count) {
        const int64_t row = begin + first_token + i;
        x = LoadNumber(g.x.values.data, group * g.x_group_stride + row * g.x.values.row_stride + col, g.x.values.type);
        if (g.x.scales != nullptr) x *= g.x.scales[row * g.x.scale_stride + col / 128];
      }
      if (col < g.w.cols && first_row + i < tile.num_rows) w = WeightValue(g.w, group, tile, first_row + i, col);
      xs[i][column] = x;
      ws[i][column] = w;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPlain; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(xs[line + 8 * i][j], ws[column][j], sum[i]);
    }
    __syncthreads();
  }
  if (first_row + column >= tile.num_rows) return;
  for (int i = 0; i < 4; ++i) {
    const int64_t token = first_token + line + 8 * i;
    if (token >= count) continue;
    StoreNumber(
        g.y.values.data,
        group * g.y_group_stride + (begin + token) * g.y.values.row_stride + tile.first_row + first_row + column,
        g.y.values.type, sum[i]);
  }
}

}  // namespace

void LaunchPlain(cudaStream_t stream, const GemmArguments& g) {
  const dim3 grid(g.w.num_tiles * (kTileRows / kPlain), static_cast<unsigned>((g.num_rows + kPlain - 1) / kPlain),
                  g.w.num_groups);
  PlainGemm<<<grid, 256, 0, stream>>>(g);
}

}  // namespace cachalot::gemm
