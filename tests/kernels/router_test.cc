// The router against the specification in double, and the worked example.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>

#include "nlohmann/json.hpp"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::MatMul;
using testing::Owned;
using testing::OwnedWeight;
using testing::Random;
using testing::Values;

struct Choice {
  std::vector<int> experts;
  std::vector<double> weights;
  double margin = 1e300;  // how far the closest decision was from falling otherwise
};

// Spec 3.7, with the distance to the next candidate at every selection.
Choice Route(const std::vector<double>& logits, const std::vector<double>& bias, int top_k, const RouterOptions& o) {
  const int num_experts = static_cast<int>(logits.size());
  std::vector<double> scores(num_experts);
  double max = *std::max_element(logits.begin(), logits.end()), sum = 0;
  for (double x : logits) sum += std::exp(x - max);
  for (int e = 0; e < num_experts; ++e) {
    scores[e] = o.scoring == RouterOptions::Scoring::kSigmoid ? 1 / (1 + std::exp(-logits[e]))
                                                              : std::exp(logits[e] - max) / sum;
  }
  std::vector<double> biased = scores;
  for (size_t e = 0; e < bias.size(); ++e) biased[e] += bias[e];

  Choice choice;
  const auto select = [&](const std::vector<double>& values, int count) {
    std::vector<int> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] > values[b]; });
    for (int i = 0; i < count && i + 1 < static_cast<int>(order.size()); ++i) {
      choice.margin = std::min(choice.margin, values[order[i]] - values[order[i + 1]]);
    }
    order.resize(count);
    return order;
  };
  if (o.n_group > 1) {
    const int size = num_experts / o.n_group;
    std::vector<double> groups;
    for (int g = 0; g < o.n_group; ++g) {
      std::vector<double> members(biased.begin() + g * size, biased.begin() + (g + 1) * size);
      std::sort(members.rbegin(), members.rend());
      groups.push_back(o.group_score == RouterOptions::GroupScore::kMax || size == 1 ? members[0]
                                                                                     : members[0] + members[1]);
    }
    std::vector<bool> kept(o.n_group, false);
    for (int g : select(groups, o.topk_group)) kept[g] = true;
    for (int e = 0; e < num_experts; ++e) {
      if (!kept[e / size]) biased[e] = -INFINITY;
    }
  }
  choice.experts = select(biased, top_k);
  sum = 0;
  for (int e : choice.experts) sum += scores[e];
  for (int e : choice.experts) {
    choice.weights.push_back(scores[e] / (o.norm_topk_prob ? sum + 1e-20 : 1) * o.routed_scaling_factor);
  }
  return choice;
}

// Expert e has 1 + e % kMaxCopies copies.
constexpr int kMaxCopies = 3;
int NumCopies(int expert) { return 1 + expert % kMaxCopies; }
// Of the copy that row t takes.
int32_t SlotOf(int expert, int64_t t) { return static_cast<int32_t>(1000 * (1 + t % NumCopies(expert)) - expert); }
int ExpertOf(int32_t slot) { return (3000 - slot) % 1000; }

// [E, 1+C]
std::vector<int32_t> SlotTable(int num_experts) {
  std::vector<int32_t> table;
  for (int e = 0; e < num_experts; ++e) {
    table.push_back(NumCopies(e));
    for (int c = 0; c < kMaxCopies; ++c) table.push_back(c < NumCopies(e) ? SlotOf(e, c) : -7);
  }
  return table;
}

class RouterTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = testing::MakeTestBackend(testing::CpuOptions());
};

TEST_F(RouterTest, FollowsTheSpecification) {
  Random random(1);
  struct Case {
    int experts, top_k;
    bool has_bias;
    RouterOptions options;
  };
  using S = RouterOptions::Scoring;
  using G = RouterOptions::GroupScore;
  const Case cases[] = {{256, 8, true, {S::kSigmoid, G::kTop2Sum, 8, 4, true, 2.5f}},
                        {64, 6, false, {S::kSoftmax, G::kMax, 1, 1, false, 1.0f}},
                        {160, 6, false, {S::kSoftmax, G::kMax, 8, 3, false, 16.0f}},
                        {12, 4, true, {S::kSigmoid, G::kTop2Sum, 4, 2, true, 1.0f}},
                        {5, 5, true, {S::kSigmoid, G::kTop2Sum, 5, 5, true, 1.0f}}};
  for (const Case& c : cases) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      const int64_t rows = 70, cols = 320;
      const OwnedWeight gate(dtype, c.experts, cols, random);
      Owned x(dtype, {rows, cols}), bias(DType::kF32, {c.experts}),
          expert_slots(DType::kI32, {c.experts, 1 + kMaxCopies}), counts(DType::kI64, {c.experts});
      x.FillNormal(random);
      bias.FillNormal(random, 0.3);
      std::vector<int32_t> slots(rows, 1);
      std::vector<int64_t> chosen(c.experts, int64_t{1} << 40);
      std::copy(chosen.begin(), chosen.end(), counts.data<int64_t>());
      const bool counts_rows = dtype == DType::kF32;
      slots[3] = slots[69] = -1;
      Owned row_slots(DType::kI32, {rows}), topk_slots(DType::kI32, {rows, c.top_k}),
          topk_weights(DType::kF32, {rows, c.top_k});
      const auto gate_weight = backend_->ops().MakeLinear({gate.part()});
      const auto bias_weight = backend_->ops().MakeVector(bias);
      backend_->ops().Router(topk_slots, topk_weights, x, *gate_weight, c.has_bias ? bias_weight.get() : nullptr,
                             {expert_slots.Set(SlotTable(c.experts)), counts_rows ? Tensor(counts) : Tensor()},
                             StepRows{Tensor(), Tensor(), row_slots.Set(slots)}, c.options);

      const std::vector<double> logits = MatMul(Values(x), Values(gate.part()), rows, c.experts, cols);
      int compared = 0;
      for (int64_t t = 0; t < rows; ++t) {
        if (slots[t] < 0) {
          for (int k = 0; k < c.top_k; ++k) {
            EXPECT_EQ(topk_slots->row<int32_t>(t)[k], -1);
            EXPECT_EQ(topk_weights->row<float>(t)[k], 0);
          }
          continue;
        }
        for (int k = 0; counts_rows && k < c.top_k; ++k) ++chosen[ExpertOf(topk_slots->row<int32_t>(t)[k])];
        const Choice want = Route({logits.begin() + t * c.experts, logits.begin() + (t + 1) * c.experts},
                                  c.has_bias ? Values(bias) : std::vector<double>(), c.top_k, c.options);
        if (want.margin < (testing::TestsOnGpu() ? 1e-5 : 1e-6)) continue;
        ++compared;
        for (int k = 0; k < c.top_k; ++k) {
          EXPECT_EQ(topk_slots->row<int32_t>(t)[k], SlotOf(want.experts[k], t)) << "row " << t << " choice " << k;
          EXPECT_NEAR(topk_weights->row<float>(t)[k], want.weights[k],
                      (testing::TestsOnGpu() ? 1e-4 : 1e-5) * want.weights[k]);
        }
      }
      EXPECT_GT(compared, 50);
      EXPECT_EQ(std::vector<int64_t>(counts.data<int64_t>(), counts.data<int64_t>() + c.experts), chosen);
    }
  }
}

// Logits are given by rows of the identity: expert e's logit is x[e].
class RouterLogits {
 public:
  explicit RouterLogits(const std::vector<double>& logits)
      : size_(static_cast<int64_t>(logits.size())), gate_(DType::kF32, {size_, size_}), x_(DType::kF32, {1, size_}) {
    std::vector<double> identity(size_ * size_, 0.0);
    for (int64_t i = 0; i < size_; ++i) identity[i * size_ + i] = 1;
    gate_.Fill(identity);
    x_.Fill(logits);
  }
  Choice Run(Ops& ops, const std::vector<double>& bias, int top_k, const RouterOptions& options) {
    Owned expert_slots(DType::kI32, {size_, 2}), slots(DType::kI32, {1}), topk_slots(DType::kI32, {1, top_k}),
        topk_weights(DType::kF32, {1, top_k}), bias_tensor(DType::kF32, {size_});
    std::vector<int32_t> same;
    for (int32_t e = 0; e < size_; ++e) same.insert(same.end(), {1, e});
    const auto gate = ops.MakeLinear({WeightPart{gate_, Tensor()}});
    const auto bias_weight = ops.MakeVector(bias_tensor.Fill(bias));
    ops.Router(topk_slots, topk_weights, x_, *gate, bias_weight.get(), {expert_slots.Set(same), Tensor()},
               StepRows{Tensor(), Tensor(), slots.Set({0})}, options);
    Choice choice;
    for (int k = 0; k < top_k; ++k) {
      choice.experts.push_back(topk_slots.data<int32_t>()[k]);
      choice.weights.push_back(topk_weights.data<float>()[k]);
    }
    return choice;
  }

 private:
  int64_t size_;
  Owned gate_, x_;
};

TEST_F(RouterTest, WorkedExample) {
  std::ifstream file(std::string(CACHALOT_TEST_DATA_DIR) + "/kernels/data/numeric_vectors.json");
  const nlohmann::json example = nlohmann::json::parse(file)["router"];
  const std::vector<double> scores = example["scores"], bias = example["bias"], weights = example["weights"];
  const std::vector<int> experts = example["experts"];
  std::vector<double> logits;
  for (double s : scores) logits.push_back(std::log(s / (1 - s)));
  RouterOptions options;
  options.n_group = 8;
  options.topk_group = 4;
  options.routed_scaling_factor = 2.5f;
  const Choice got = RouterLogits(logits).Run(backend_->ops(), bias, 8, options);
  EXPECT_EQ(got.experts, experts);
  for (int k = 0; k < 8; ++k) EXPECT_NEAR(got.weights[k], weights[k], testing::TestsOnGpu() ? 1e-5 : 1e-6);
}

TEST_F(RouterTest, TiesGoToTheLowerIndex) {
  RouterOptions options;
  options.n_group = 4;
  options.topk_group = 2;
  const Choice got =
      RouterLogits(std::vector<double>(16, 0.5)).Run(backend_->ops(), std::vector<double>(16, 0.0), 4, options);
  EXPECT_EQ(got.experts, (std::vector<int>{0, 1, 2, 3}));
  for (double w : got.weights) EXPECT_NEAR(w, 0.25, 1e-7);
}

// Masked groups are -inf, not 0: with all biased scores below zero a mask of 0 would win.
TEST_F(RouterTest, MaskedGroupsLoseToNegativeScores) {
  RouterOptions options;
  options.n_group = 4;
  options.topk_group = 1;
  std::vector<double> bias(16, -5);
  for (int e = 8; e < 12; ++e) bias[e] = -3;
  const Choice got = RouterLogits(std::vector<double>(16, 0.0)).Run(backend_->ops(), bias, 4, options);
  EXPECT_EQ(got.experts, (std::vector<int>{8, 9, 10, 11}));
}

}  // namespace
}  // namespace cachalot
