// Loops that only read, or only multiply and add, at the target that the kernels run at.
#include "tests/kernels/machine_rates.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/kernels/machine_rates.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace cachalot::testing {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

float ReadAll(const uint8_t* data, int64_t bytes) {
  const DF d;
  const float* p = reinterpret_cast<const float*>(data);
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), n = bytes / static_cast<int64_t>(sizeof(float));
  VF sum0 = hn::Zero(d), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  for (int64_t i = 0; i < n; i += 4 * lanes) {
    sum0 = hn::Add(sum0, hn::LoadU(d, p + i));
    sum1 = hn::Add(sum1, hn::LoadU(d, p + i + lanes));
    sum2 = hn::Add(sum2, hn::LoadU(d, p + i + 2 * lanes));
    sum3 = hn::Add(sum3, hn::LoadU(d, p + i + 3 * lanes));
  }
  return hn::GetLane(hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3)));
}

double MultiplyAdd(int64_t loops) {
  const DF d;
  // NOTE: opaque to the compiler, which would otherwise do the sum once.
  volatile float one = 1.0f, small = 1e-9f;
  const VF a = hn::Set(d, one), b = hn::Set(d, small);
  VF s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a;
  for (int64_t i = 0; i < 2 * loops; ++i) {
    s0 = hn::MulAdd(s0, a, b);
    s1 = hn::MulAdd(s1, a, b);
    s2 = hn::MulAdd(s2, a, b);
    s3 = hn::MulAdd(s3, a, b);
    s4 = hn::MulAdd(s4, a, b);
    s5 = hn::MulAdd(s5, a, b);
    s6 = hn::MulAdd(s6, a, b);
    s7 = hn::MulAdd(s7, a, b);
  }
  volatile float sink =
      hn::GetLane(hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), hn::Add(hn::Add(s4, s5), hn::Add(s6, s7))));
  (void)sink;
  return 2.0 * 16.0 * static_cast<double>(loops) * static_cast<double>(hn::Lanes(d));
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot::testing
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot::testing {

HWY_EXPORT(ReadAll);
HWY_EXPORT(MultiplyAdd);

float ReadAll(const uint8_t* data, int64_t bytes) { return HWY_DYNAMIC_DISPATCH(ReadAll)(data, bytes); }
double MultiplyAdd(int64_t loops) { return HWY_DYNAMIC_DISPATCH(MultiplyAdd)(loops); }

}  // namespace cachalot::testing
#endif  // HWY_ONCE
