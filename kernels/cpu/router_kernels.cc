// Sigmoid and softmax with Highway.
#include "kernels/cpu/router_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/router_kernels.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

// x[i] <- f(x[i]); the tail goes through a padded vector.
template <class F>
void MapInPlace(float* x, int64_t n, const F& f) {
  const DF d;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(f(hn::LoadU(d, x + i)), d, x + i);
  if (i == n) return;
  alignas(64) float tail[kLanes];
  hn::Store(f(LoadTail<SourceF32>(reinterpret_cast<const uint8_t*>(x + i), n - i)), d, tail);
  std::memcpy(x + i, tail, static_cast<size_t>(n - i) * sizeof(float));
}

void RouterScores(RouterOptions::Scoring scoring, float* scores, int64_t n) {
  const DF d;
  const VF one = hn::Set(d, 1.0f);
  if (scoring == RouterOptions::Scoring::kSigmoid) {
    MapInPlace(scores, n, [&](VF x) { return hn::Div(one, hn::Add(one, ExpOf(hn::Neg(x)))); });
    return;
  }
  const float max = *std::max_element(scores, scores + n);
  MapInPlace(scores, n, [&](VF x) { return ExpOf(hn::Sub(x, hn::Set(d, max))); });
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += scores[i];
  MapInPlace(scores, n, [&](VF x) { return hn::Div(x, hn::Set(d, sum)); });
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(RouterScores);

void RouterScores(RouterOptions::Scoring scoring, float* scores, int64_t n) {
  HWY_DYNAMIC_DISPATCH(RouterScores)(scoring, scores, n);
}

}  // namespace cachalot
#endif  // HWY_ONCE
