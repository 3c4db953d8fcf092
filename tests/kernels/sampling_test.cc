// Sample against a naive sampler in double, and its noise against the distribution it must draw from.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "tests/kernels/naive_sampler.h"
#include "tests/kernels/step_world.h"

namespace cachalot {
namespace {

using testing::Draw;
using testing::Entering;
using testing::Filtered;
using testing::Owned;
using testing::Penalised;
using testing::Philox;
using testing::Random;
using testing::Shaping;
using testing::Step;
using testing::StepSequence;
using testing::StepWorld;
using Ints = std::vector<int32_t>;

// Draws for each target and vocabulary: more of them where there is one target.
int Rounds() { return testing::TestTargets().size() > 1 ? 40 : 120; }

Shaping RandomShaping(Random& random, int vocab) {
  Shaping s;
  s.params = Entering(2, random.Below(4) == 0 ? 0.0f : static_cast<float>(0.2 + 1.8 * random.Uniform()));
  s.params.seed = random.Next();
  s.params.top_k = random.Below(2) == 0 ? 0 : 1 + random.Below(50);
  s.params.top_p = random.Below(2) == 0 ? 1.0f : static_cast<float>(0.3 + 0.69 * random.Uniform());
  s.params.min_p = random.Below(2) == 0 ? 0.0f : static_cast<float>(0.3 * random.Uniform());
  s.params.repetition_penalty = 1.7f;
  s.params.frequency_penalty = 0.5f;
  s.params.presence_penalty = -0.25f;
  s.params.min_tokens = random.Below(5);
  std::set<int> ids;
  while (static_cast<int>(ids.size()) < std::min(vocab / 2, 40)) ids.insert(random.Below(vocab));
  for (int id : ids) {
    // NOTE: some ids are both banned and biased; some biased ones are in the past (2 and 3) too.
    if (random.Below(3) != 0) s.biased.push_back({id, static_cast<float>(3 * random.Normal())});
    if (random.Below(3) == 0) s.banned.push_back(id);
  }
  s.params.num_biased = static_cast<uint16_t>(s.biased.size());
  s.params.num_banned = static_cast<uint16_t>(s.banned.size());
  for (int id = 0; id < vocab; ++id) s.allowed.push_back(random.Below(4) != 0);
  s.prompt = {{1, 1}, {2, 1}};
  s.generated = {{3, 1}, {2, 1}};
  return s;
}

class SamplingTest : public ::testing::Test {
 protected:
  void TearDown() override { testing::UseTarget(""); }
  Ops& ops() { return backend_->ops(); }

  // One token for each of `params`, all with the same row of logits, at position 4 of a prompt of 4 (tokens 1 2 3 2).
  // `entries` are everybody's banned and biased tokens.
  Ints Tokens(const std::vector<double>& logits, const std::vector<SlotParams>& params, const Tensor& mask = Tensor(),
              int num_valid = -1, const std::vector<TokenBias>& entries = {}) {
    const int64_t vocab = static_cast<int64_t>(logits.size()), n = static_cast<int64_t>(params.size());
    StepWorld world(n, 0, vocab, true);
    std::vector<StepSequence> sequences;
    for (int64_t s = 0; s < n; ++s) sequences.push_back({static_cast<int32_t>(s), 0, {1, 2, 3, 2}, 0, params[s]});
    for (int32_t s = 0; s < n; ++s) ops().UpdateTokenBiases(world.state, testing::BiasUpdates(s, entries));
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

  std::unique_ptr<Backend> backend_ = testing::MakeTestBackend(testing::CpuOptions());
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
  for (const std::string& target : testing::TestTargets()) {
    testing::UseTarget(target);
    for (int64_t vocab : {5, 64, 1000, 5003}) {
      for (int round = 0; round < Rounds(); ++round) {
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

// All that a request may ask for at the ends of its range, together: no logit overflows.
TEST_F(SamplingTest, TheEndsOfTheRanges) {
  int compared = 0;
  const std::vector<TokenBias> entries = {{4, 100.0f}, {6, -100.0f}};
  for (float temperature : {kLeastTemperature, 1.0f, 3e38f}) {
    for (float repetition : {1 / kMostRepetitionPenalty, 1.0f, kMostRepetitionPenalty}) {
      for (int round = 0; round < 16; ++round) {
        SlotParams p = Entering(4, temperature);
        p.seed = ~uint64_t{0} - round;
        p.repetition_penalty = repetition;
        p.presence_penalty = p.frequency_penalty = round & 1 ? 2.0f : -2.0f;
        if (round & 2) p.top_p = round & 4 ? 1e-45f : 0.99999994f;
        if (round & 8) p.min_p = round & 4 ? 1e-45f : 1.0f;
        if (round % 3 == 0) p.top_k = std::numeric_limits<int32_t>::max();
        p.num_biased = 2;
        const std::vector<double> logits = Logits(300, round, 5);
        std::vector<double> shaped = logits;
        for (const TokenBias& entry : entries) shaped[entry.token] += entry.bias;
        const auto [want, is_clear] = Draw(Penalised(shaped, {{1, 1}, {2, 2}, {3, 1}}, {}, p), p, 4);
        if (!is_clear) continue;
        ++compared;
        EXPECT_EQ(Tokens(logits, {p}, Tensor(), -1, entries), Ints{want})
            << "temperature " << temperature << " repetition " << repetition << " round " << round;
        EXPECT_TRUE(std::isfinite(step_->logprobs.data<float>()[0]));
      }
    }
  }
  EXPECT_GT(compared, 100);
}

// Rows whose largest tokens lie together, at either end or among the first: no part of such a row is like the whole.
TEST_F(SamplingTest, RealVocabularyInOrder) {
  const int vocab = 129280;
  std::vector<std::vector<double>> kinds(4, Logits(vocab, 17, 2));
  std::sort(kinds[0].begin(), kinds[0].end());
  std::sort(kinds[1].rbegin(), kinds[1].rend());
  for (int id = 0; id < 3000; ++id) kinds[2][id] += 12;
  for (int id = vocab - 7; id < vocab; ++id) kinds[3][id] += 200;
  int compared = 0;
  for (const std::vector<double>& logits : kinds) {
    std::vector<SlotParams> params;
    Ints want;
    for (int i = 0; i < 12; ++i) {
      SlotParams p = Entering(4, std::array{0.0f, 0.7f, 1.5f}[i % 3]);
      p.seed = 77 + i;
      p.top_k = std::array{0, 40, 0, 2500}[i % 4];
      p.top_p = std::array{1.0f, 0.95f, 0.3f}[i / 4];
      p.min_p = i % 5 == 0 ? 0.02f : 0.0f;
      const auto [token, is_clear] = Draw(logits, p, 4);
      if (!is_clear) continue;
      params.push_back(p);
      want.push_back(token);
    }
    compared += static_cast<int>(want.size());
    EXPECT_EQ(Tokens(logits, params), want) << "like " << logits[0];
  }
  EXPECT_GT(compared, 40);
}

// All that shapes a row of the real vocabulary, alone and in company: the same bits.
TEST_F(SamplingTest, RealVocabularyShapedAloneAsInCompany) {
  const int vocab = 129280;
  Random random(41);
  const std::vector<double> logits = Logits(vocab, 43, 1.5);
  Shaping s = RandomShaping(random, vocab);
  s.params.temperature = 0.9f;
  s.params.min_tokens = 0;
  Owned mask = StepWorld::Zeroed(DType::kU32, {1, vocab / 32});
  for (int id = 0; id < vocab; ++id) mask.data<uint32_t>()[id / 32] |= uint32_t{s.allowed[id]} << id % 32;
  int compared = 0;
  for (const float top_p : {1.0f, 0.95f, 0.5f}) {
    for (const int top_k : {0, 30}) {
      s.params.top_p = top_p;
      s.params.top_k = top_k;
      s.params.min_p = 0;
      const auto [want, is_clear] = Draw(s.Shape(logits, 2), s.params, 4);
      if (!is_clear) continue;
      ++compared;
      EXPECT_EQ(Tokens(logits, {s.params}, mask, -1, s.Entries()), Ints{want}) << top_p << " " << top_k;
      const float alone = step_->logprobs.data<float>()[0];
      Owned masks = StepWorld::Zeroed(DType::kU32, {5, vocab / 32});
      for (int64_t l = 0; l < 5; ++l) std::memcpy(masks->row<uint32_t>(l), mask->data, mask->num_bytes());
      std::vector<SlotParams> company(5, s.params);
      for (SlotParams& p : company) p.seed = random.Next();
      company[3] = s.params;
      EXPECT_EQ(Tokens(logits, company, masks, -1, s.Entries())[3], want) << top_p << " " << top_k;
      EXPECT_EQ(step_->logprobs.data<float>()[3], alone);
    }
  }
  EXPECT_GE(compared, 4);
}

// Many equal logits, zeros of both signs, next to nothing that is possible, and wide gaps: filters cut by id.
TEST_F(SamplingTest, TiesAndExtremes) {
  int compared = 0;
  for (int64_t vocab : {3071, 20011, 129280}) {
    std::vector<std::vector<double>> kinds = {std::vector<double>(vocab, 1.5), std::vector<double>(vocab, 0.0),
                                              std::vector<double>(vocab, -INFINITY),
                                              std::vector<double>(vocab, -1000.0), Logits(vocab, 21, 3)};
    for (int64_t id = 0; id < vocab; id += 2) kinds[1][id] = -0.0;
    for (int64_t id = 5; id < vocab; id += vocab / 6) kinds[2][id] = static_cast<double>(id % 7);
    kinds[3][vocab - 2] = 1000;
    for (double& x : kinds[4]) x = std::round(2 * x) / 2;
    for (const std::vector<double>& logits : kinds) {
      std::vector<SlotParams> params;
      Ints want;
      for (int i = 0; i < 10; ++i) {
        SlotParams p = Entering(4, 1.3f);
        p.seed = 99 + i;
        p.top_k = std::array{0, 1, 30, 1500, 5000}[i % 5];
        if (i >= 5) p.top_p = 0.45f;
        const auto [token, is_clear] = Draw(logits, p, 4);
        if (!is_clear) continue;
        params.push_back(p);
        want.push_back(token);
      }
      compared += static_cast<int>(want.size());
      EXPECT_EQ(Tokens(logits, params), want) << vocab << " like " << logits[0];
      std::vector<int32_t> order(vocab);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
      for (int i = 0; i < kMaxTopLogprobs; ++i) {
        const bool is_there = logits[order[i]] > -INFINITY;
        EXPECT_EQ(step_->top_tokens.data<int32_t>()[i], is_there ? order[i] : -1) << vocab << " like " << logits[0];
      }
    }
  }
  EXPECT_GT(compared, 130);
}

// Drawn counts against probabilities. NOTE: the bound is the 99.9th percentile, so a sampler that is off fails, and
// seeds are fixed, so one that is right always passes.
TEST_F(SamplingTest, DrawsFromTheDistribution) {
  const std::vector<double> logits = {1.0, 0.5, 0.0, -0.5, 2.0, -1.0, 0.2, 0.3, -2.0, 1.5};
  const int draws = 20000, per_call = 100;
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

// Mask, bans, biases, penalties and every filter together, and each of them shown to matter.
TEST_F(SamplingTest, EverythingTogetherAgreesWithTheNaiveSampler) {
  Random random(99);
  int compared = 0, by_mask = 0, by_bans = 0, by_biases = 0, by_penalties = 0;
  for (const std::string& target : testing::TestTargets()) {
    testing::UseTarget(target);
    for (int vocab : {7, 64, 1000, 5003}) {
      for (int round = 0; round < Rounds(); ++round) {
        const std::vector<double> logits = Logits(vocab, random.Next(), 0.3 + 3 * random.Uniform());
        const Shaping s = RandomShaping(random, vocab);
        const auto draw = [&](auto change) {
          Shaping changed = s;
          change(changed);
          return Draw(changed.Shape(logits, 2), changed.params, 4);
        };
        const auto [want, is_clear] = draw([](Shaping&) {});
        if (!is_clear) continue;
        ++compared;
        by_mask += draw([](Shaping& c) { c.allowed.clear(); }).first != want;
        by_bans += draw([](Shaping& c) { c.banned.clear(); }).first != want;
        by_biases += draw([](Shaping& c) { c.biased.clear(); }).first != want;
        by_penalties += draw([](Shaping& c) { c.prompt = c.generated = {}; }).first != want;
        Owned mask = StepWorld::Zeroed(DType::kU32, {1, (vocab + 31) / 32});
        for (int id = 0; id < vocab; ++id) mask.data<uint32_t>()[id / 32] |= uint32_t{s.allowed[id]} << id % 32;
        EXPECT_EQ(Tokens(logits, {s.params}, mask, -1, s.Entries()), Ints{want}) << target << vocab << " " << round;
        double sum = 0;
        for (double x : logits) sum += std::exp(x);
        EXPECT_NEAR(step_->logprobs.data<float>()[0], logits[want] - std::log(sum), 2e-5) << "of raw logits";
      }
    }
  }
  std::printf("[ measured ] %d draws compared; changed by the mask %d, bans %d, biases %d, penalties %d\n", compared,
              by_mask, by_bans, by_biases, by_penalties);
  EXPECT_GT(compared, 150);
  for (int changed : {by_mask, by_bans, by_biases, by_penalties}) EXPECT_GT(changed, 10);
}

TEST_F(SamplingTest, BiasesAndBansWhenGreedy) {
  const std::vector<double> logits = {0, 1, 2, 3, 4, 0.5};
  SlotParams p = Entering(4);
  p.num_biased = 1;
  EXPECT_EQ(Tokens(logits, {p}, Tensor(), -1, {{0, 4.5f}}), Ints{0});
  p.num_banned = 1;  // of the entries below the first is banned, the second biased
  p.min_tokens = 1;
  EXPECT_EQ(Tokens(logits, {p}, Tensor(), -1, {{4, 100.0f}, {0, -5.0f}}), Ints{3});
  p.min_tokens = 0;
  EXPECT_EQ(Tokens(logits, {p}, Tensor(), -1, {{4, 100.0f}, {0, -5.0f}}), Ints{4}) << "a ban is no bias";
  // An id beyond the tokens that exist may be named, and is never drawn.
  p.num_banned = 0;
  EXPECT_EQ(Tokens(logits, {p}, Tensor(), 5, {{5, 100.0f}}), Ints{4});
}

// Where nothing but banned tokens is left, they are allowed after all; the mask never gives way.
TEST_F(SamplingTest, BansThatLeaveNothingDoNotHold) {
  const std::vector<double> logits = {0, 1, 5, 3};
  for (float temperature : {0.0f, 0.01f}) {
    SlotParams p = Entering(4, temperature);
    p.num_banned = 4;
    p.min_tokens = 10;
    p.top_p = 0.9f;
    const std::vector<TokenBias> all = {{0, 0}, {1, 0}, {2, 0}, {3, 0}};
    EXPECT_EQ(Tokens(logits, {p}, Tensor(), -1, all), Ints{2});
    Owned mask = StepWorld::Zeroed(DType::kU32, {1, 1});
    mask.data<uint32_t>()[0] = 0b1010;
    EXPECT_EQ(Tokens(logits, {p}, mask, -1, all), Ints{3});
    p.num_banned = 3;
    EXPECT_EQ(Tokens(logits, {p}, mask, -1, all), Ints{3}) << "3 is not banned";
    mask.data<uint32_t>()[0] = 0b0110;
    EXPECT_EQ(Tokens(logits, {p}, mask, -1, all), Ints{2}) << "what is allowed is banned: the mask wins";
    mask.data<uint32_t>()[0] = 0;
    EXPECT_EQ(Tokens(logits, {p}, mask, -1, all), Ints{0}) << "nothing is allowed";
  }
}

// With drafts, row i is shaped as if the drafts before it were right: the ban ends in the middle of the step. A prompt
// that was recomputed with its generated tokens counts those as generated.
TEST_F(SamplingTest, BansEndAtTheTokenNotAtTheStep) {
  const int64_t vocab = 40;
  Shaping s;
  s.params = Entering(2, 0.7f);
  s.params.seed = 5;
  s.params.frequency_penalty = 1.5f;
  s.params.min_tokens = 4;
  s.params.num_banned = 2;
  s.params.num_biased = 2;
  s.banned = {6, 9};
  s.biased = {{9, 2.5f}, {8, 6.0f}};
  std::vector<double> logits = Logits(vocab, 11, 0.5);
  logits[6] = 12;
  const int last = 8;
  const Ints drafts = {8, 30, 8};
  StepWorld world(1, 3, vocab, true);
  ops().UpdateTokenBiases(world.state, testing::BiasUpdates(0, s.Entries()));
  Step prefill({{0, 0, {1, 2, 17}, 0, s.params, false}});  // 17 was generated before a preemption
  ops().BeginStep(prefill.step_rows, world.state, prefill.input);
  world.last_token.Set({last});
  world.drafts.Set(drafts);
  Step step({{0, -1, {}, 4, {}}});
  ops().BeginStep(step.step_rows, world.state, step.input);
  Owned rows(DType::kF32, {4, vocab});
  std::vector<double> repeated;
  for (int i = 0; i < 4; ++i) repeated.insert(repeated.end(), logits.begin(), logits.end());
  ops().Sample(step.out, world.state, rows.Fill(repeated), Tensor(), step.input, step.step_rows, vocab);

  s.prompt = {{1, 1}, {2, 1}};
  s.generated = {{17, 1}};
  std::vector<int> past = {last, drafts[0], drafts[1], drafts[2]};
  for (int i = 0; i < 4; ++i) {
    ++s.generated[past[i]];
    const auto [want, is_clear] = Draw(s.Shape(logits, 2 + i), s.params, 4 + i);
    EXPECT_TRUE(is_clear);
    EXPECT_EQ(step.out_tokens.data<int32_t>()[i], want) << "row " << i;
    EXPECT_EQ(want == 6, i >= 2) << "banned while 2 and 3 have been generated";
  }
}

}  // namespace
}  // namespace cachalot
