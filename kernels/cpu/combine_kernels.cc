// Combine with Highway: a slice of columns at a time, in registers over all experts.
#include "kernels/cpu/combine_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/combine_kernels.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"
#include "kernels/cpu/rows-inl.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

// Values [c, c + n) of row t, n at most a vector; the rest of the vector is zero.
HWY_INLINE VF LoadColumns(const Tensor& x, int64_t t, int64_t c, int64_t n) {
  const uint8_t* p = static_cast<const uint8_t*>(x.data) + (t * x.row_stride + c) * DTypeBytes(x.dtype);
  if (x.dtype == DType::kF32) return n == kLanes ? SourceF32::Load(p) : LoadTail<SourceF32>(p, n);
  return n == kLanes ? SourceBF16::Load(p) : LoadTail<SourceBF16>(p, n);
}

void CombineRow(const Tensor& out, const Tensor& y, const float* weights, const int32_t* rows, int64_t num_choices,
                const Tensor& shared, int64_t t) {
  const DF d;
  const int64_t cols = out.dim(1);
  alignas(64) float sums[kLanes];
  for (int64_t c = 0; c < cols; c += kLanes) {
    const int64_t n = std::min(kLanes, cols - c);
    VF sum = shared.empty() ? hn::Zero(d) : LoadColumns(shared, t, c, n);
    for (int64_t k = 0; k < num_choices; ++k) {
      if (rows[k] >= 0) sum = hn::MulAdd(hn::Set(d, weights[k]), LoadColumns(y, rows[k], c, n), sum);
    }
    hn::Store(sum, d, sums);
    EmitRow(sums, out.Columns(c, n), t);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(CombineRow);

void CombineRow(const Tensor& out, const Tensor& y, const float* weights, const int32_t* rows, int64_t num_choices,
                const Tensor& shared, int64_t t) {
  HWY_DYNAMIC_DISPATCH(CombineRow)(out, y, weights, rows, num_choices, shared, t);
}

void CombineRows(const Tensor& out, const Tensor& y, const Tensor& weights, const int32_t* rows, const Tensor& shared,
                 ThreadPool* pool) {
  constexpr int64_t kTokensPerTask = 8;
  const int64_t num_tokens = out.dim(0), num_choices = weights.dim(1);
  pool->Run((num_tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
    const int64_t begin = task * kTokensPerTask, end = std::min(num_tokens, begin + kTokensPerTask);
    for (int64_t t = begin; t < end; ++t) {
      CombineRow(out, y, weights.row<float>(t), rows + t * num_choices, num_choices, shared, t);
    }
  });
}

}  // namespace cachalot
#endif  // HWY_ONCE
