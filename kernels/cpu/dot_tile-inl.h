// Register tiles: dot products of a few rows with a few rows, and sums of rows with weights.
#include "kernels/cpu/simd-inl.h"

#if defined(CACHALOT_KERNELS_CPU_DOT_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CACHALOT_KERNELS_CPU_DOT_TILE_INL_H_
#undef CACHALOT_KERNELS_CPU_DOT_TILE_INL_H_
#else
#define CACHALOT_KERNELS_CPU_DOT_TILE_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

constexpr int kDotRows = 4;
constexpr int kDotCols = kManyRegisters ? 4 : 2;

// sums[i*B + j] = a[i] . b[j] over n values, n a multiple of the lanes: one accumulator each, then ReduceLanes.
// `sums` holds A*B values and room for a vector.
template <int A, int B>
HWY_INLINE void DotTile(const float* HWY_RESTRICT a, int64_t a_stride, const float* HWY_RESTRICT b, int64_t b_stride,
                        int64_t n, float* HWY_RESTRICT sums) {
  const DF d;
  VF acc[A * B];
  for (int i = 0; i < A * B; ++i) acc[i] = hn::Zero(d);
  for (int64_t k = 0; k < n; k += kLanes) {
    VF vb[B];
    for (int j = 0; j < B; ++j) vb[j] = hn::LoadU(d, b + j * b_stride + k);
    for (int i = 0; i < A; ++i) {
      const VF va = hn::LoadU(d, a + i * a_stride + k);
      for (int j = 0; j < B; ++j) acc[i * B + j] = hn::MulAdd(va, vb[j], acc[i * B + j]);
    }
  }
  ReduceAll<A * B>(acc, sums);
}

// o[i][0 .. V*lanes) += sum over j < n, in order, of p[i][j] * v[j][0 .. V*lanes), for A rows i.
template <int A, int V>
HWY_INLINE void AddWeighted(const float* HWY_RESTRICT p, int64_t p_stride, const float* HWY_RESTRICT v,
                            int64_t v_stride, int64_t n, float* HWY_RESTRICT o, int64_t o_stride) {
  const DF d;
  VF acc[A * V];
  for (int i = 0; i < A; ++i) {
    for (int c = 0; c < V; ++c) acc[i * V + c] = hn::LoadU(d, o + i * o_stride + c * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    VF row[V];
    for (int c = 0; c < V; ++c) row[c] = hn::LoadU(d, v + j * v_stride + c * kLanes);
    for (int i = 0; i < A; ++i) {
      const VF weight = hn::Set(d, p[i * p_stride + j]);
      for (int c = 0; c < V; ++c) acc[i * V + c] = hn::MulAdd(weight, row[c], acc[i * V + c]);
    }
  }
  for (int i = 0; i < A; ++i) {
    for (int c = 0; c < V; ++c) hn::StoreU(acc[i * V + c], d, o + i * o_stride + c * kLanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#endif  // CACHALOT_KERNELS_CPU_DOT_TILE_INL_H_
