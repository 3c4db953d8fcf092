// What stands beside absorbed attention: queries rotated before it, values quantised after it.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace cachalot {
namespace {

// A warp a (token, head): a pair of the rotated part each lane. kC, kR: C and R, where the compiler may know them.
template <int kC, int kR>
__global__ void __launch_bounds__(256) RopeQueries(const RopeQueriesArguments a) {
  AllowNextKernel();
  const int latent_dim = kC > 0 ? kC : a.latent_dim, rope_dim = kR > 0 ? kR : a.rope_dim;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= static_cast<int64_t>(a.num_tokens) * a.num_heads) return;
  const int64_t t = row / a.num_heads, h = row % a.num_heads;
  const int64_t from = t * a.q.row_stride + h * (a.nope_dim + rope_dim) + a.nope_dim;
  const float* angles = a.cos_sin + static_cast<int64_t>(a.positions[t]) * rope_dim;
  bf16* rotated = static_cast<bf16*>(a.q_absorbed) + row * (latent_dim + rope_dim) + latent_dim;
  for (int pair = lane; pair < rope_dim / 2; pair += kWarpSize) {
    const float x = LoadNumber(a.q.data, from + 2 * pair, a.q.type);
    const float y = LoadNumber(a.q.data, from + 2 * pair + 1, a.q.type);
    const float cosine = angles[pair], sine = angles[rope_dim / 2 + pair];
    reinterpret_cast<__nv_bfloat162*>(rotated)[pair] =
        __floats2bfloat162_rn(x * cosine - y * sine, x * sine + y * cosine);
  }
  if (a.slots[t] >= 0) return;
  bf16* out = static_cast<bf16*>(a.out) + row * latent_dim;
  for (int i = lane; i < latent_dim; i += kWarpSize) out[i] = __float2bfloat16(0.0f);
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

}  // namespace

void LaunchRopeQueries(cudaStream_t stream, const RopeQueriesArguments& a) {
  const int64_t rows = static_cast<int64_t>(a.num_tokens) * a.num_heads;
  const auto blocks = static_cast<unsigned>((rows + 7) / 8);
  if (a.latent_dim == kLatentDim && a.rope_dim == kRopeDim) {
    RopeQueries<kLatentDim, kRopeDim><<<blocks, 256, 0, stream>>>(a);
  } else {
    RopeQueries<0, 0><<<blocks, 256, 0, stream>>>(a);
  }
}

void LaunchQuantize(cudaStream_t stream, const ActivationRef& out, const MatrixRef& x, int64_t rows, int64_t cols) {
  const int64_t groups = rows * ((cols + 127) / 128);
  Quantize<<<static_cast<unsigned>((groups + 7) / 8), 256, 0, stream>>>(out, x, rows, cols);
}

}  // namespace cachalot
