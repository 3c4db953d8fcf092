// Sample against a naive sampler in double, and its noise against the distribution it must draw from.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "kernels/cpu/highway_targets.h"
#include "tests/kernels/step_world.h"

namespace cachalot {
namespace {

using testing::Entering;
using testing::Owned;
using testing::Random;
using testing::Step;
using testing::StepSequence;
using testing::StepWorld;
using Ints = std::vector<int32_t>;

// Philox4x32-10, as published; the first known answer of Random123's kat_vectors is checked below.
std::array<uint32_t, 4> Philox(std::array<uint32_t, 4> x, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

double Noise(int64_t id, const SlotParams& p, uint32_t position) {
  const auto words = Philox({static_cast<uint32_t>(id / 4), position, p.choice, 0}, static_cast<uint32_t>(p.seed),
                            static_cast<uint32_t>(p.seed >> 32));
  return -std::log(-std::log(((words[id % 4] >> 9) + 0.5) * 0x1p-23));
}

// What the filters leave of processed logits, -inf elsewhere, by full sorts.
std::vector<double> Filtered(const std::vector<double>& logits, const SlotParams& p) {
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  std::vector<double> kept(logits.size(), -INFINITY);
  const size_t top_k = p.top_k > 0 ? std::min<size_t>(p.top_k, order.size()) : order.size();
  double total = 0, before = 0;
  for (size_t i = 0; i < top_k; ++i) total += std::exp(logits[order[i]] - logits[order[0]]);
  for (size_t i = 0; i < top_k; ++i) {
    const double probability = std::exp(logits[order[i]] - logits[order[0]]) / total;
    if (before >= p.top_p) break;
    before += probability;
    if (std::exp(logits[order[i]] - logits[order[0]]) >= p.min_p) kept[order[i]] = logits[order[i]];
  }
  return kept;
}

std::vector<double> Penalised(std::vector<double> logits, const std::map<int, int>& prompt,
                              const std::map<int, int>& generated, const SlotParams& p) {
  for (size_t id = 0; id < logits.size(); ++id) {
    const int count = generated.count(static_cast<int>(id)) ? generated.at(static_cast<int>(id)) : 0;
    if (count == 0 && !prompt.count(static_cast<int>(id))) continue;
    logits[id] = logits[id] > 0 ? logits[id] / p.repetition_penalty : logits[id] * p.repetition_penalty;
    logits[id] -= p.frequency_penalty * count + (count > 0 ? p.presence_penalty : 0);
  }
  return logits;
}

// The arg-max after temperature, filters and noise; whether the runner-up is far enough to hold fp32 to it.
std::pair<int, bool> Draw(std::vector<double> logits, const SlotParams& p, uint32_t position) {
  if (p.temperature > 0) {
    for (double& x : logits) x /= p.temperature;
    logits = Filtered(logits, p);
    for (size_t id = 0; id < logits.size(); ++id) logits[id] += Noise(static_cast<int64_t>(id), p, position);
  }
  const int best = static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  double second = -INFINITY;
  for (size_t id = 0; id < logits.size(); ++id) {
    if (static_cast<int>(id) != best) second = std::max(second, logits[id]);
  }
  return {best, logits[best] - second > 1e-4};
}

class SamplingTest : public ::testing::Test {
 protected:
  void TearDown() override { ForceSimdTarget(""); }
  Ops& ops() { return backend_->ops(); }

  // One token for each of `params`, all with the same row of logits, at position 4 of a prompt of 4 (tokens 1 2 3 2).
  Ints Tokens(const std::vector<double>& logits, const std::vector<SlotParams>& params, const Tensor& mask = Tensor(),
              int num_valid = -1) {
    const int64_t vocab = static_cast<int64_t>(logits.size()), n = static_cast<int64_t>(params.size());
    StepWorld world(n, 0, vocab, true);
    std::vector<StepSequence> sequences;
    for (int64_t s = 0; s < n; ++s) sequences.push_back({static_cast<int32_t>(s), 0, {1, 2, 3, 2}, 0, params[s]});
    step_ = std::make_unique<Step>(sequences);
    ops().BeginStep(step_->step_rows, world.state, step_->input);
    Owned rows(DType::kF32, {n, vocab});
    std::vector<double> repeated;
    for (int64_t s = 0; s < n; ++s) repeated.insert(repeated.end(), logits.begin(), logits.end());
    ops().Sample(step_->out, world.state, rows.Fill(repeated), mask, step_->input, step_->step_rows,
                 num_valid < 0 ? static_cast<int>(vocab) : num_valid);
    return Step::Ints(step_->out_tokens);
  }

  static std::vector<double> Logits(int64_t vocab, uint64_t seed, double scale) {
    Random random(seed);
    std::vector<double> logits(vocab);
    for (double& x : logits) x = static_cast<float>(random.Normal() * scale);
    return logits;
  }

  std::unique_ptr<Backend> backend_ = testing::MakeCpu(testing::CpuOptions());
  std::unique_ptr<Step> step_;
};

TEST_F(SamplingTest, PhiloxKnownAnswer) {
  EXPECT_EQ(Philox({0, 0, 0, 0}, 0, 0), (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

TEST_F(SamplingTest, GreedyTiesMasksAndInvalidIds) {
  std::vector<double> logits(200, 0.0);
  logits[199] = 9;  // no such token
  logits[70] = logits[130] = 5;
  logits[20] = 7;  // masked
  Owned mask(DType::kU32, {1, 7});
  mask.data<uint32_t>()[0] &= ~(1u << 20);
  EXPECT_EQ(Tokens(logits, {Entering(4)}, mask, 199), Ints{70});
  EXPECT_EQ(Tokens(logits, {Entering(4)}, Tensor(), 199), Ints{20});
  SlotParams params = Entering(4, 1.0f);
  params.top_k = 1;
  EXPECT_EQ(Tokens(logits, {params}, mask, 199), Ints{70});
  std::memset(mask->data, 0, mask->num_bytes());
  mask.data<uint32_t>()[3] = 1u << 4;  // one token is allowed: 100
  EXPECT_EQ(Tokens(logits, {Entering(4, 2.0f)}, mask, 199), Ints{100});
}

TEST_F(SamplingTest, AgreesWithTheNaiveSampler) {
  Random random(5);
  int compared = 0, changed = 0;
  for (const std::string& target : SupportedSimdTargets()) {
    ForceSimdTarget(target);
    for (int64_t vocab : {5, 64, 1000, 5003}) {
      for (int round = 0; round < 40; ++round) {
        const std::vector<double> logits = Logits(vocab, random.Next(), 0.3 + 4 * random.Uniform());
        SlotParams p = Entering(4, static_cast<float>(0.2 + 1.8 * random.Uniform()));
        p.seed = random.Next();
        p.choice = round % 3;
        if (round % 2 == 0) p.top_k = 1 + random.Below(round % 4 == 0 ? 8 : 500);
        if (round % 3 == 0) p.top_p = static_cast<float>(0.05 + 0.94 * random.Uniform());
        if (round % 5 == 0) p.min_p = static_cast<float>(0.3 * random.Uniform());
        if (round % 7 == 0) p.repetition_penalty = 1.7f;
        if (round % 7 == 1) p.presence_penalty = 1.0f;
        const auto [want, is_clear] = Draw(Penalised(logits, {{1, 1}, {2, 2}, {3, 1}}, {}, p), p, 4);
        changed += want != std::max_element(logits.begin(), logits.end()) - logits.begin() ? 1 : 0;
        if (!is_clear) continue;
        ++compared;
        EXPECT_EQ(Tokens(logits, {p}), Ints{want}) << target << " " << vocab << " round " << round;
      }
    }
  }
  EXPECT_GT(compared, 150);
  EXPECT_GT(changed, 50) << "the noise changes nothing";
}

TEST_F(SamplingTest, RealVocabularyWithEveryFilter) {
  const int64_t vocab = 129280;
  for (double scale : {0.01, 1.0, 5.0}) {
    const std::vector<double> logits = Logits(vocab, 7, scale);
    std::vector<SlotParams> params;
    Ints want;
    for (int i = 0; i < 8; ++i) {
      SlotParams p = Entering(4, 0.8f);
      p.seed = 1234567891234567ull + i;
      if (i & 1) p.top_k = i & 4 ? 3000 : 20;
      if (i & 2) p.top_p = 0.9f;
      if (i == 4) p.min_p = 0.05f;
      const auto [token, is_clear] = Draw(logits, p, 4);
      if (!is_clear) continue;
      params.push_back(p);
      want.push_back(token);
    }
    EXPECT_GE(params.size(), 5u);
    EXPECT_EQ(Tokens(logits, params), want);
  }
}

// Drawn counts against probabilities. NOTE: the bound is the 99.9th percentile, so a sampler that is off fails, and
// seeds are fixed, so one that is right always passes.
TEST_F(SamplingTest, DrawsFromTheDistribution) {
  const std::vector<double> logits = {1.0, 0.5, 0.0, -0.5, 2.0, -1.0, 0.2, 0.3, -2.0, 1.5};
  const int draws = 20000, per_call = 500;
  struct Case {
    float temperature, top_p;
    int32_t top_k;
    double bound;  // chi-square at 0.999
  };
  for (const Case& c : {Case{1.0f, 1.0f, 0, 27.88}, Case{0.6f, 1.0f, 5, 18.47}, Case{1.3f, 0.7f, 0, 30}}) {
    std::vector<double> scaled;
    for (double x : logits) scaled.push_back(x / c.temperature);
    SlotParams p;
    p.top_k = c.top_k;
    p.top_p = c.top_p;
    const std::vector<double> kept = Filtered(scaled, p);
    double total = 0;
    for (double x : kept) total += std::exp(x);
    std::vector<int> counts(logits.size(), 0);
    for (int i = 0; i < draws; i += per_call) {
      std::vector<SlotParams> params;
      for (int j = 0; j < per_call; ++j) {
        SlotParams q = Entering(4, c.temperature);
        q.top_k = c.top_k;
        q.top_p = c.top_p;
        q.seed = 77;
        q.choice = static_cast<uint32_t>(i + j);
        params.push_back(q);
      }
      for (int32_t token : Tokens(logits, params)) ++counts[token];
    }
    double chi_square = 0;
    for (size_t id = 0; id < kept.size(); ++id) {
      const double expected = draws * std::exp(kept[id]) / total;
      if (expected == 0) {
        EXPECT_EQ(counts[id], 0);
      } else {
        chi_square += (counts[id] - expected) * (counts[id] - expected) / expected;
      }
    }
    EXPECT_LT(chi_square, c.bound);
    EXPECT_GT(chi_square, 0);
  }
}

// Every part of the key matters.
TEST_F(SamplingTest, NoiseIsKeyedBySeedChoiceAndPosition) {
  const std::vector<double> logits(5000, 0.0);
  SlotParams p = Entering(4, 1.0f);
  p.seed = 1;
  SlotParams low = p, high = p, choice = p;
  low.seed = 2;
  high.seed = 1 | uint64_t{1} << 40;
  choice.choice = 1;
  const Ints tokens = Tokens(logits, {p, low, high, choice, p});
  EXPECT_EQ(tokens[0], tokens[4]);
  EXPECT_EQ(std::set<int>(tokens.begin(), tokens.end()).size(), 4u);
  EXPECT_NE(Draw(logits, p, 4).first, Draw(logits, p, 5).first);
}

TEST_F(SamplingTest, LogprobsAreOfRawLogits) {
  for (int64_t vocab : {25, 129280}) {
    const std::vector<double> logits = Logits(vocab, 3, 3);
    SlotParams p = Entering(4, 0.5f);
    p.repetition_penalty = 2;
    p.top_k = 3;
    const int32_t token = Tokens(logits, {p}, Tensor(), static_cast<int>(vocab) - 2)[0];
    double sum = 0;
    for (double x : logits) sum += std::exp(x);
    EXPECT_NEAR(step_->logprobs.data<float>()[0], logits[token] - std::log(sum), 2e-5);
    std::vector<int> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    for (int i = 0; i < kMaxTopLogprobs; ++i) {
      EXPECT_EQ(step_->top_tokens.data<int32_t>()[i], order[i]);
      EXPECT_NEAR(step_->top_logprobs.data<float>()[i], logits[order[i]] - std::log(sum), 2e-5);
    }
  }
  // Ties by id.
  std::vector<double> logits(100, 1.0);
  logits[60] = 2;
  Tokens(logits, {Entering(4)});
  Ints want = {60};
  for (int i = 0; i < 19; ++i) want.push_back(i);
  EXPECT_EQ(Step::Ints(step_->top_tokens), want);
}

// Row i of a sequence with drafts must be penalised for its own past alone: as if each token were decoded by itself.
TEST_F(SamplingTest, PenaltiesSeeNoLaterDraft) {
  const int64_t vocab = 40;
  const std::vector<double> logits = Logits(vocab, 11, 1.0);
  SlotParams p = Entering(2, 0.7f);
  p.seed = 5;
  p.frequency_penalty = 1.5f;
  p.presence_penalty = 0.5f;
  p.repetition_penalty = 1.3f;
  const int last = 8;
  const Ints drafts = {8, 30, 8};
  StepWorld world(1, 3, vocab, true);
  Step prefill({{0, 0, {1, 2}, 0, p, false}});
  ops().BeginStep(prefill.step_rows, world.state, prefill.input);
  world.last_token.Set({last});
  world.drafts.Set(drafts);
  Step step({{0, -1, {}, 4, {}}});
  ops().BeginStep(step.step_rows, world.state, step.input);
  Owned rows(DType::kF32, {4, vocab});
  std::vector<double> repeated;
  for (int i = 0; i < 4; ++i) repeated.insert(repeated.end(), logits.begin(), logits.end());
  ops().Sample(step.out, world.state, rows.Fill(repeated), Tensor(), step.input, step.step_rows, vocab);

  std::map<int, int> generated;
  std::vector<int> past = {last, drafts[0], drafts[1], drafts[2]};
  for (int i = 0; i < 4; ++i) {
    ++generated[past[i]];
    const auto [want, is_clear] = Draw(Penalised(logits, {{1, 1}, {2, 1}}, generated, p), p, 3 + i);
    EXPECT_TRUE(is_clear);
    EXPECT_EQ(step.out_tokens.data<int32_t>()[i], want) << "row " << i;
  }
}

}  // namespace
}  // namespace cachalot
