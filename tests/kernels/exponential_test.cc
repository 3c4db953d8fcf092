// Exp2 and Exp against double precision, at their ends, and Highway's version of Exp against them.
#include "kernels/exponential.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/router_kernels.h"

namespace cachalot {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// The largest relative error of `f` over [low, high], in steps that hit no pattern.
template <class F, class G>
double LargestError(float low, float high, const F& f, const G& exact) {
  double largest = 0;
  for (float x = low; x <= high; x += 0.000913f) {
    const double want = exact(static_cast<double>(x));
    largest = std::max(largest, std::abs(f(x) - want) / want);
  }
  return largest;
}

TEST(Exp2, IsNearAndEndsWell) {
  EXPECT_LT(LargestError(-126.0f, 127.0f, Exp2, [](double x) { return std::exp2(x); }), 1.6e-7);
  for (int n = -126; n <= 127; ++n) EXPECT_EQ(Exp2(static_cast<float>(n)), std::ldexp(1.0f, n)) << n;
  EXPECT_NEAR(Exp2(-126.25f), std::exp2(-126.25), std::exp2(-148.0));
  EXPECT_EQ(Exp2(-126.75f), 0.0f);
  EXPECT_EQ(Exp2(kLeastExp2), 0.0f);
  EXPECT_EQ(Exp2(-1e30f), 0.0f);
  EXPECT_EQ(Exp2(-kInfinity), 0.0f);
  EXPECT_TRUE(std::isnan(Exp2(kNaN)));
}

TEST(Exp, IsNearAndEndsWell) {
  EXPECT_LT(LargestError(kLeastExp, kMostExp, Exp, [](double x) { return std::exp(x); }), 2.2e-7);
  EXPECT_EQ(Exp(0.0f), 1.0f);
  EXPECT_EQ(Exp(-0.0f), 1.0f);
  EXPECT_EQ(Exp(-87.0f), 0.0f);
  EXPECT_EQ(Exp(-kInfinity), 0.0f);
  EXPECT_EQ(Exp(89.0f), kInfinity);
  EXPECT_EQ(Exp(kInfinity), kInfinity);
  EXPECT_TRUE(std::isnan(Exp(kNaN)));
}

TEST(GrownMax, MovesWhenItMust) {
  EXPECT_EQ(GrownMax(-kInfinity, -kInfinity), -kInfinity);
  EXPECT_EQ(GrownMax(-kInfinity, -1e30f), -1e30f);
  EXPECT_EQ(GrownMax(3, -kInfinity), 3);
  EXPECT_EQ(GrownMax(3, 11), 3);
  EXPECT_EQ(GrownMax(3, std::nextafter(11.0f, 12.0f)), std::nextafter(11.0f, 12.0f));
}

// Every target has fused multiply-adds but these, which round one step more.
bool HasFusedMultiplyAdd(const std::string& target) { return target != "EMU128" && !target.starts_with("SSE"); }

TEST(Exp, IsTheSameInVectors) {
  std::vector<float> logits;
  for (float x = -87.0f; x <= 100.0f; x += 0.0137f) logits.push_back(x);
  for (const std::string& target : SupportedSimdTargets()) {
    ForceSimdTarget(target);
    std::vector<float> scores = logits;
    RouterScores(RouterOptions::Scoring::kSigmoid, scores.data(), static_cast<int64_t>(scores.size()));
    for (size_t i = 0; i < scores.size(); ++i) {
      const float want = 1.0f / (1.0f + Exp(-logits[i]));
      if (HasFusedMultiplyAdd(target)) {
        ASSERT_EQ(scores[i], want) << target << " at " << logits[i];
      } else {
        ASSERT_NEAR(scores[i], want, 1e-5f * want) << target << " at " << logits[i];
      }
    }
  }
  ForceSimdTarget("");
}

}  // namespace
}  // namespace cachalot
