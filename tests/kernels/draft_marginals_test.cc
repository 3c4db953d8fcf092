// Drafts and the distribution of tokens: over many seeds, what Sample brings with drafts on is distributed as the
// processed softmax says; rules that are wrong in the usual ways are told from it by the same check.
#include <gtest/gtest.h>

#include <cstdio>
#include <functional>

#include "tests/kernels/naive_sampler.h"
#include "tests/kernels/step_world.h"

namespace cachalot {
namespace {

using testing::Owned;
using testing::Shaping;

constexpr int kVocab = 24, kDrafts = 2, kPrompt = 3, kLength = 3;  // tokens looked at, after a prompt of one
constexpr int kSlots = 1000, kSeeds = 60 * kSlots;
using Tokens = std::array<int, kLength>;

// Two models that know but the last token, the draft's a poor copy of the target's.
struct Models {
  Models() {
    testing::Random random(9);
    target.FillNormal(random, 1.5);
    Owned noise(DType::kF32, {kVocab, kVocab});
    noise.FillNormal(random, 0.8);
    for (int i = 0; i < kVocab * kVocab; ++i) draft.data<float>()[i] = target.data<float>()[i] + noise.data<float>()[i];
  }
  static std::vector<double> Row(const Owned& model, int token) {
    return std::vector<double>(model->row<float>(token), model->row<float>(token) + kVocab);
  }
  Owned target{DType::kF32, {kVocab, kVocab}}, draft{DType::kF32, {kVocab, kVocab}};
};

SlotParams Plain() {
  SlotParams params = testing::Entering(1, 1.0f);
  return params;
}

SlotParams Shaped() {
  SlotParams params = testing::Entering(1, 0.8f);
  params.top_p = 0.9f;
  params.top_k = 14;
  params.min_p = 0.02f;
  params.repetition_penalty = 1.3f;
  params.frequency_penalty = 0.4f;
  params.presence_penalty = 0.5f;
  return params;
}

SlotParams OfSeed(SlotParams params, int number) {
  params.seed = uint64_t{0x9E3779B97F4A7C15} * (static_cast<uint64_t>(number) + 1);
  return params;
}

// The processed logits that follow `past`, filters and temperature included.
std::vector<double> Processed(const std::vector<double>& raw, const std::vector<int>& past, const SlotParams& params) {
  Shaping shaping;
  shaping.params = params;
  shaping.prompt[kPrompt] = 1;
  for (int token : past) ++shaping.generated[token];
  std::vector<double> logits = shaping.Shape(raw, static_cast<int>(past.size()));
  for (double& x : logits) x /= params.temperature;
  return testing::Filtered(logits, params);
}

std::vector<double> Softmax(std::vector<double> logits) {
  const double most = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (double& x : logits) total += x = std::exp(x - most);
  for (double& x : logits) x /= total;
  return logits;
}

// What the second and third token are together, exactly.
std::vector<double> ExactPairs(const Models& models, const SlotParams& params) {
  std::vector<double> pairs(kVocab * kVocab);
  const auto next = [&](const std::vector<int>& past) {
    return Softmax(Processed(Models::Row(models.target, past.empty() ? kPrompt : past.back()), past, params));
  };
  const std::vector<double> first = next({});
  for (int a = 0; a < kVocab; ++a) {
    if (first[a] == 0) continue;
    const std::vector<double> second = next({a});
    for (int b = 0; b < kVocab; ++b) {
      if (second[b] == 0) continue;
      const std::vector<double> third = next({a, b});
      for (int c = 0; c < kVocab; ++c) pairs[b * kVocab + c] += first[a] * second[b] * third[c];
    }
  }
  return pairs;
}

// Standard deviations that Pearson's statistic is beyond its mean (Wilson and Hilferty); cells that expect fewer than
// ten are one.
double ChiSquareDeviations(const std::vector<double>& expected, const std::vector<Tokens>& answers) {
  std::vector<double> counts(expected.size());
  for (const Tokens& tokens : answers) ++counts[tokens[1] * kVocab + tokens[2]];
  double statistic = 0, rest_expected = 0, rest_count = 0;
  int num_cells = 0;
  const auto add = [&](double n, double of) {
    statistic += (n - of) * (n - of) / of;
    ++num_cells;
  };
  for (size_t i = 0; i < expected.size(); ++i) {
    const double of = expected[i] * static_cast<double>(answers.size());
    if (of >= 10) {
      add(counts[i], of);
    } else {
      rest_expected += of;
      rest_count += counts[i];
    }
  }
  // NOTE: what never happens must not: nothing but the sums' rounding is expected.
  if (rest_expected < 1e-6 && rest_count > 0) return INFINITY;
  if (rest_expected >= 10) add(rest_count, rest_expected);
  const double freedom = num_cells - 1;
  return (std::cbrt(statistic / freedom) - (1 - 2 / (9 * freedom))) / std::sqrt(2 / (9 * freedom));
}

// One in ten million by chance; fixed seeds, so never again.
constexpr double kMostDeviations = 5.2;

// ---- The verbs.

struct Drafting {
  static Owned Ints(int64_t n) { return Owned(DType::kI32, {n}); }
  Owned seq_slot = Ints(kSlots), seq_start = Ints(kSlots), query_start = Ints(kSlots + 1), row_token = Ints(kSlots);
  Owned row_seq = Ints(kSlots), row_target = Ints(kSlots), tokens = Ints(kSlots), positions = Ints(kSlots);
  Owned slots = Ints(kSlots), proposed{DType::kI32, {kSlots, kDrafts}};
  StepInput input = {seq_slot, seq_start, query_start, Tensor(), Tensor(), row_token, row_seq, row_target};
  StepRows rows = {tokens, positions, slots};
};

Owned LogitsAfter(const Owned& model, const Owned& tokens) {
  const int64_t n = tokens->num_elements();
  Owned logits(DType::kF32, {n, kVocab});
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(logits->row<float>(i), model->row<float>(tokens.data<int32_t>()[i]), kVocab * sizeof(float));
  }
  return logits;
}

struct Generated {
  std::vector<Tokens> answers;
  int num_drafts = 0, num_accepted = 0;
};

// kSlots seeds from `first` on. `verifier`: whose logits are drawn from.
void GenerateSlots(Ops& ops, const Models& models, const Owned& verifier, const SlotParams& params, int first,
                   Generated* generated) {
  testing::StepWorld world(kSlots, kDrafts, kVocab, true);
  std::vector<std::vector<int>> answers(kSlots);
  std::vector<testing::StepSequence> sequences;
  for (int slot = 0; slot < kSlots; ++slot) {
    sequences.push_back({slot, 0, {kPrompt}, 0, OfSeed(params, first + slot), true});
  }
  for (int num_steps = 0; num_steps < kLength; ++num_steps) {
    const int num_rows = num_steps == 0 ? 1 : 1 + kDrafts;
    testing::Step step(sequences);
    ops.BeginStep(step.step_rows, world.state, step.input);
    const Owned logits = LogitsAfter(num_steps == 0 ? models.target : verifier, step.row_tokens);
    ops.Sample(step.out, world.state, logits, Tensor(), step.input, step.step_rows, kVocab);
    Drafting drafts;
    ops.BeginDrafts(drafts.rows, drafts.input, world.state, step.input, step.num_accepted);
    for (int i = 0; i < kDrafts; ++i) {
      ops.ProposeDrafts(drafts.proposed, drafts.rows, world.state, LogitsAfter(models.draft, drafts.tokens),
                        drafts.input, i, kVocab);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      const int count = step.num_accepted.data<int32_t>()[slot];
      const int32_t* drawn = step.out_tokens.data<int32_t>() + slot * num_rows;
      answers[slot].insert(answers[slot].end(), drawn, drawn + count);
      generated->num_drafts += num_rows - 1;
      generated->num_accepted += count - 1;
    }
    if (num_steps > 0) continue;
    for (testing::StepSequence& s : sequences) s = {s.slot, -1, {}, 1 + kDrafts, {}, true};
  }
  for (const std::vector<int>& answer : answers) {
    Tokens& tokens = generated->answers.emplace_back();
    std::copy_n(answer.begin(), kLength, tokens.begin());
  }
}

Generated Generate(const Models& models, const Owned& verifier, const SlotParams& params) {
  const auto backend = testing::MakeTestBackend(testing::CpuOptions());
  Generated generated;
  for (int first = 0; first < kSeeds; first += kSlots) {
    GenerateSlots(backend->ops(), models, verifier, params, first, &generated);
  }
  return generated;
}

// ---- Rules, one token at a time.

// The token that follows `past`.
using Rule = std::function<int(const Models&, const std::vector<int>& past, const SlotParams&)>;

std::vector<double> Target(const Models& models, const std::vector<int>& past) {
  return Models::Row(models.target, past.empty() ? kPrompt : past.back());
}
std::vector<double> Draft(const Models& models, const std::vector<int>& past) {
  return Models::Row(models.draft, past.empty() ? kPrompt : past.back());
}

int ArgMaxWithNoise(std::vector<double> logits, const SlotParams& params, size_t position) {
  for (int id = 0; id < kVocab; ++id) logits[id] += testing::Noise(id, params, static_cast<uint32_t>(position));
  return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

int Right(const Models& models, const std::vector<int>& past, const SlotParams& params) {
  return ArgMaxWithNoise(Processed(Target(models, past), past, params), params, past.size() + 1);
}

int OneNoiseForAllPositions(const Models& models, const std::vector<int>& past, const SlotParams& params) {
  return ArgMaxWithNoise(Processed(Target(models, past), past, params), params, 1);
}

// Accepted while equal, as here; but what replaces a wrong draft is drawn as in rejection sampling, with the noise that
// the draft was drawn with.
int NoiseReusedForWhatIsLeft(const Models& models, const std::vector<int>& past, const SlotParams& params) {
  const std::vector<double> p = Softmax(Processed(Target(models, past), past, params));
  const std::vector<double> q = Softmax(Processed(Draft(models, past), past, params));
  const int right = Right(models, past, params);
  const int draft = ArgMaxWithNoise(Processed(Draft(models, past), past, params), params, past.size() + 1);
  if (draft == right) return right;
  std::vector<double> left(kVocab);
  for (int id = 0; id < kVocab; ++id) left[id] = std::log(std::max(p[id] - q[id], 1e-300));
  return ArgMaxWithNoise(left, params, past.size() + 1);
}

int FiltersOfTheDraft(const Models& models, const std::vector<int>& past, const SlotParams& params) {
  SlotParams unfiltered = params;
  unfiltered.top_p = 1, unfiltered.top_k = 0, unfiltered.min_p = 0;
  std::vector<double> logits = Processed(Target(models, past), past, unfiltered);
  const std::vector<double> kept = Processed(Draft(models, past), past, params);
  for (int id = 0; id < kVocab; ++id) logits[id] = std::isinf(kept[id]) ? -INFINITY : logits[id];
  return ArgMaxWithNoise(logits, params, past.size() + 1);
}

int FiltersBeforeTemperature(const Models& models, const std::vector<int>& past, const SlotParams& params) {
  SlotParams cold = params;
  cold.temperature = 1;
  std::vector<double> logits = Processed(Target(models, past), past, cold);
  for (double& x : logits) x /= params.temperature;
  return ArgMaxWithNoise(logits, params, past.size() + 1);
}

// As if the drafts of a step were not in the past of the rows after them.
int PenaltiesOfTheStepsBegin(const Models& models, const std::vector<int>& past, const SlotParams& params) {
  const std::vector<int> counted(past.begin(), past.begin() + std::min<size_t>(past.size(), 1));
  return ArgMaxWithNoise(Processed(Target(models, past), counted, params), params, past.size() + 1);
}

std::vector<Tokens> Follow(const Rule& rule, const Models& models, const SlotParams& params) {
  std::vector<Tokens> answers(kSeeds);
  for (int i = 0; i < kSeeds; ++i) {
    std::vector<int> past;
    while (past.size() < kLength) past.push_back(rule(models, past, OfSeed(params, i)));
    std::copy(past.begin(), past.end(), answers[i].begin());
  }
  return answers;
}

TEST(DraftMarginalsTest, TokensAreDistributedAsTheSoftmaxSays) {
  const Models models;
  for (const auto& [name, params] : {std::pair{"plain", Plain()}, std::pair{"shaped", Shaped()}}) {
    const std::vector<double> expected = ExactPairs(models, params);
    const Generated generated = Generate(models, models.target, params);
    const double deviations = ChiSquareDeviations(expected, generated.answers);
    std::printf("[ measured ] %s: %d seeds, %d of %d drafts accepted, chi-square %.1f deviations beyond its mean\n",
                name, kSeeds, generated.num_accepted, generated.num_drafts, deviations);
    EXPECT_LT(std::abs(deviations), kMostDeviations);
    EXPECT_GT(generated.num_accepted, generated.num_drafts / 4);
    EXPECT_LT(generated.num_accepted, generated.num_drafts * 9 / 10);
    // Token by token it is the rule below, but for draws too close for fp32.
    const std::vector<Tokens> right = Follow(Right, models, params);
    int num_different = 0;
    for (int i = 0; i < kSeeds; ++i) num_different += right[i] != generated.answers[i] ? 1 : 0;
    EXPECT_LE(num_different, 10);
    // And were the drafts themselves taken for the model's tokens, it would be seen.
    EXPECT_GT(ChiSquareDeviations(expected, Generate(models, models.draft, params).answers), kMostDeviations);
  }
}

TEST(DraftMarginalsTest, WrongRulesAreSeen) {
  const Models models;
  const SlotParams params = Shaped();
  const std::vector<double> expected = ExactPairs(models, params);
  EXPECT_LT(std::abs(ChiSquareDeviations(expected, Follow(Right, models, params))), kMostDeviations);
  const std::pair<const char*, Rule> wrong[] = {{"one noise for all positions", OneNoiseForAllPositions},
                                                {"noise reused for what is left", NoiseReusedForWhatIsLeft},
                                                {"the draft's filters", FiltersOfTheDraft},
                                                {"filters before temperature", FiltersBeforeTemperature},
                                                {"penalties of the step's begin", PenaltiesOfTheStepsBegin}};
  for (const auto& [name, rule] : wrong) {
    const double deviations = ChiSquareDeviations(expected, Follow(rule, models, params));
    std::printf("[ measured ] %s: %.1f deviations beyond\n", name, deviations);
    EXPECT_GT(deviations, kMostDeviations) << name;
  }
}

}  // namespace
}  // namespace cachalot
