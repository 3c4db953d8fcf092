// The engine on a GPU against the engine on the CPU that rounds activations as the GPU does: whole models, both caches;
// then what of the CPU's invariances holds. Where there is no GPU, every test says that it did not run.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numeric>

#include "engine/step_shapes.h"
#include "kernels/ops_types.h"
#include "tests/engine/golden.h"

namespace cachalot {
namespace {

constexpr double kMargin = 0.1;  // between the two best tokens: where it is less, either may come first

// A driver without a working backend is a failure, not a reason to skip.
bool HasGpu() { return std::filesystem::exists("/dev/nvidiactl"); }

class CudaEngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HasGpu()) GTEST_SKIP() << "no GPU: did not run";
  }
};

EngineOptions Options(const std::string& model_dir, const std::string& device, const std::string& kv_dtype,
                      const std::string& activation) {
  EngineOptions options;
  options.model_dir = model_dir;
  options.device = device;
  options.kv_cache_dtype = kv_dtype;
  options.activation = activation;
  options.max_model_len = 1024;
  options.max_sequences = 64;
  options.max_batch_tokens = 512;
  return options;
}

Request Greedy(const std::vector<int32_t>& prompt, int max_tokens) {
  Request request;
  request.prompt = prompt;
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  request.sampling.logprobs = 2;
  return request;
}

// The alternatives after every position of a scored prompt, the sampled token's last.
std::vector<TokenLogprob> Positions(const Answer& answer) {
  std::vector<TokenLogprob> positions = answer.prompt_logprobs;
  positions.insert(positions.end(), answer.logprobs.begin(), answer.logprobs.end());
  return positions;
}

// How two answers to the same prompts agree, position by position.
struct Agreement {
  int num_positions = 0, num_clear = 0, num_top1_wrong = 0;
  double mean_kl = 0, max_kl = 0, max_margin_wrong = 0;  // KL over the 20 likeliest tokens and the rest as one
};

double Kl(const TokenLogprob& p, const TokenLogprob& q) {
  double kl = 0, rest_p = 1, rest_q = 1;
  for (const auto& [token, logprob] : p.top) {
    const auto other = std::find_if(q.top.begin(), q.top.end(), [t = token](const auto& x) { return x.first == t; });
    if (other == q.top.end()) continue;
    kl += std::exp(logprob) * (logprob - other->second);
    rest_p -= std::exp(logprob);
    rest_q -= std::exp(other->second);
  }
  if (rest_p > 1e-9 && rest_q > 1e-9) kl += rest_p * std::log(rest_p / rest_q);
  return kl;
}

Agreement Compare(const std::vector<Answer>& want, const std::vector<Answer>& got) {
  Agreement a;
  for (size_t i = 0; i < want.size(); ++i) {
    const auto p = Positions(want[i]), q = Positions(got[i]);
    EXPECT_EQ(p.size(), q.size());
    for (size_t j = 0; j < std::min(p.size(), q.size()); ++j) {
      ++a.num_positions;
      const double kl = Kl(p[j], q[j]), margin = p[j].top[0].second - p[j].top[1].second;
      a.mean_kl += kl;
      a.max_kl = std::max(a.max_kl, kl);
      const bool is_wrong = p[j].top[0].first != q[j].top[0].first;
      if (is_wrong) a.max_margin_wrong = std::max(a.max_margin_wrong, margin);
      if (margin <= kMargin) continue;
      ++a.num_clear;
      a.num_top1_wrong += is_wrong;
    }
  }
  a.mean_kl /= std::max(a.num_positions, 1);
  return a;
}

void Print(const std::string& what, const Agreement& a) {
  std::printf(
      "[ measured ] %s: %d positions, mean KL %.2e, max %.2e; top-1 differs at %d of %d with a margin above %.1f, at "
      "most at a margin of %.3f\n",
      what.c_str(), a.num_positions, a.mean_kl, a.max_kl, a.num_top1_wrong, a.num_clear, kMargin, a.max_margin_wrong);
}

// NOTE: what a step computes together decides how it cuts its sums, and both devices are to cut them alike: so requests
// that fill whole steps come first, and all texts are there when the first of them begins. By default no chunk is as
// long as LongChunks are: of those the oracle knows nothing.
std::vector<Answer> Score(EngineOptions options, const std::vector<std::vector<int32_t>>& texts,
                          int max_batch_tokens = StepShapes::kLongChunkRows - 1) {
  constexpr int kNumFillers = 4;
  options.max_batch_tokens = max_batch_tokens;
  Request filler = Greedy(std::vector<int32_t>(options.max_batch_tokens, 3), 1);
  filler.priority = -1;
  std::vector<Request> requests(kNumFillers, filler);
  options.max_model_len = static_cast<int>(requests[0].prompt.size()) + 1;
  for (const auto& text : texts) {
    requests.push_back(ScoreRequest(text, kMaxTopLogprobs));
    options.max_model_len = std::max(options.max_model_len, static_cast<int>(text.size()) + 8);
  }
  auto engine = MakeEngine(options);
  std::vector<Answer> answers = RunAll(*engine, requests);
  answers.erase(answers.begin(), answers.begin() + kNumFillers);
  return answers;
}

// How far the GPU may be from the CPU.
struct Bound {
  double mean_kl = 1e-3;
  double wrong = 0;       // of clear positions, the share that may have another best token
  double max_margin = 0;  // there
};
// NOTE: the logits have the same bits, their log-probabilities are made in another way: 4e-6 a step of a float near 32.
constexpr Bound kSame = {.mean_kl = 1e-7};
// Where the same is asked of the exact mode: of the usual one.
constexpr Bound kNear = {.wrong = 0.005, .max_margin = 1};

// Returns what the CPU made of the texts.
std::vector<Answer> ExpectAgreement(const std::string& name, const std::string& model_dir, const char* kv_dtype,
                                    const char* activation, const std::vector<std::vector<int32_t>>& texts,
                                    const Bound& bound) {
  const bool is_plain = std::string(activation) == "f32";
  const auto cpu = Score(Options(model_dir, "cpu", kv_dtype, activation), texts);
  const auto expect = [&](bool is_exact, const Bound& at_most) {
    EngineOptions options = Options(model_dir, "cuda", kv_dtype, is_plain ? "f32" : "auto");
    options.is_exact = is_exact;
    const Agreement a = Compare(cpu, Score(options, texts));
    const std::string what =
        name + ", cache " + kv_dtype + (is_plain ? ", unquantised" : ", quantised") + (is_exact ? ", exact" : "");
    Print(what, a);
    EXPECT_GT(a.num_clear, a.num_positions / 2) << what;
    EXPECT_LE(a.mean_kl, at_most.mean_kl) << what;
    EXPECT_LE(a.num_top1_wrong, at_most.wrong * a.num_clear) << what;
    EXPECT_LE(a.max_margin_wrong, std::max(at_most.max_margin, kMargin)) << what;
  };
  const bool is_same = bound.mean_kl == kSame.mean_kl;
  expect(is_same, bound);
  if (is_same) expect(false, kNear);
  return cpu;
}

std::vector<std::vector<int32_t>> GoldenTexts(const std::string& name, std::string* model_dir) {
  const Golden golden = LoadGolden(name);
  *model_dir = golden.model_dir;
  std::vector<std::vector<int32_t>> texts;
  for (const GoldenPrompt& p : golden.prompts) texts.push_back(p.tokens);
  return texts;
}

// Every variant of the architecture: router rules, YaRN, no q_lora_rank, UE8M0 scales, unquantised checkpoints, and
// dimensions that fit no tile. FP8 is chaotic wherever it is: what falls on the other side of a rounding moves by 2^-3.
class CudaGoldenTest : public CudaEngineTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(CudaGoldenTest, UnquantisedAgrees) {
  std::string model_dir;
  const auto texts = GoldenTexts(GetParam(), &model_dir);
  ExpectAgreement(GetParam(), model_dir, "bf16", "f32", texts, Bound());
  ExpectAgreement(GetParam(), model_dir, "fp8", "f32", texts, {.wrong = 0.01, .max_margin = 0.5});
}

INSTANTIATE_TEST_SUITE_P(Models, CudaGoldenTest,
                         ::testing::Values("dense", "kimi", "long", "moonlight", "odd", "v2", "v2_lite", "v31",
                                           "v3_heads", "v3_like"),
                         [](const auto& info) { return std::string(info.param); });

class CudaQuantisedGoldenTest : public CudaGoldenTest {};

TEST_P(CudaQuantisedGoldenTest, Agrees) {
  std::string model_dir;
  const auto texts = GoldenTexts(GetParam(), &model_dir);
  // NOTE: what fits no tile of the tensor cores the oracle adds in another order.
  const Bound bound = std::string(GetParam()) == "odd" ? Bound{.wrong = 0.01, .max_margin = 0.5} : kSame;
  for (const char* kv_dtype : {"bf16", "fp8"}) {
    ExpectAgreement(GetParam(), model_dir, kv_dtype, "fp8", texts, bound);
  }
}

std::vector<std::vector<int32_t>> RandomTexts(const std::vector<int>& lengths) {
  std::vector<std::vector<int32_t>> texts;
  uint32_t random = 1;
  for (int length : lengths) {
    for (texts.emplace_back(); static_cast<int>(texts.back().size()) < length;) {
      random = random * 1664525 + 1013904223;
      texts.back().push_back(static_cast<int32_t>(random >> 24));
    }
  }
  return texts;
}

// Chunks so long that the GPU does not absorb their queries, which the CPU always does: beside each other, behind
// others of the same text, beside decoding. NOTE: quantised, a value between two roundings goes either way: the GPU is
// not to be further from its oracle than quantising is from the unquantised model. Unquantised it is not to be further
// from the CPU than with short chunks.
TEST_F(CudaEngineTest, LongChunksAgree) {
  std::string model_dir;
  GoldenTexts("v3_heads", &model_dir);
  const auto texts = RandomTexts({5, 128, 300, 777, 1500});
  for (const std::string kv_dtype : {"bf16", "fp8"}) {
    const auto score = [&](const char* device, const char* activation, int max_batch_tokens = 512) {
      EngineOptions options = Options(model_dir, device, kv_dtype, activation);
      options.max_sequences = 512;
      return Score(options, texts, max_batch_tokens);
    };
    const auto plain = score("cpu", "f32"), oracle = score("cpu", "fp8");
    const Agreement unquantised = Compare(plain, score("cuda", "f32")),
                    absorbed = Compare(plain, score("cuda", "f32", 100));
    Print("v3_heads, long chunks, cache " + kv_dtype + ", unquantised", unquantised);
    Print("the same in short chunks", absorbed);
    EXPECT_LE(unquantised.mean_kl, std::min(1e-3, 2 * absorbed.mean_kl));
    EXPECT_LE(unquantised.num_top1_wrong, 0.01 * unquantised.num_clear);
    const Agreement quantised = Compare(oracle, score("cuda", "auto")), noise = Compare(oracle, plain);
    Print("v3_heads, long chunks, cache " + kv_dtype + ", quantised", quantised);
    Print("the CPU quantised against unquantised", noise);
    EXPECT_LE(quantised.mean_kl, 1.5 * noise.mean_kl);
    EXPECT_LE(quantised.num_top1_wrong, 1.5 * noise.num_top1_wrong);
  }
}

// Texts long enough that attention's keys are cut, of a few rows and of many.
TEST_F(CudaEngineTest, LongTextsAgree) {
  std::string model_dir;
  GoldenTexts("v3_heads", &model_dir);
  const auto texts = RandomTexts({2, 63, 64, 65, 130, 400, 900, 1500});
  for (const char* kv_dtype : {"bf16", "fp8"}) {
    ExpectAgreement("v3_heads, long", model_dir, kv_dtype, "fp8", texts, kSame);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, CudaQuantisedGoldenTest,
                         ::testing::Values("dense", "kimi", "odd", "v31", "v3_heads", "v3_like"),
                         [](const auto& info) { return std::string(info.param); });

// How many of `got` are `want` token for token.
int CountSame(const std::vector<Answer>& want, const std::vector<Answer>& got) {
  int num_same = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const auto& tokens = want[i].tokens;
    if (tokens == got[i].tokens) {
      ++num_same;
      continue;
    }
    const auto at = std::mismatch(tokens.begin(), tokens.end(), got[i].tokens.begin(), got[i].tokens.end()).first;
    const size_t index = std::min<size_t>(at - tokens.begin(), want[i].logprobs.size() - 1);
    const auto& top = want[i].logprobs[index].top;
    std::printf("[ measured ] prompt %zu parts at token %zu of %zu, where the CPU's margin is %.4f\n", i, index,
                tokens.size(), top[0].second - top[1].second);
  }
  return num_same;
}

// Greedy answers, then the log-probabilities of the CPU's answers.
TEST_F(CudaEngineTest, DemoAgrees) {
  const auto prompts = DemoPrompts();
  std::vector<Request> requests;
  for (const auto& prompt : prompts) requests.push_back(Greedy(prompt, 96));
  const auto answers = [&](const char* device, const char* activation) {
    return RunAll(*MakeEngine(Options(DemoDir(), device, "bf16", activation)), requests);
  };
  const auto oracle = answers("cpu", "fp8");
  const int num_plain_same = CountSame(answers("cpu", "f32"), answers("cuda", "f32"));
  const int num_same = CountSame(oracle, answers("cuda", "auto"));
  std::printf("[ measured ] of %zu greedy answers the same: %d unquantised, %d quantised\n", prompts.size(),
              num_plain_same, num_same);
  EXPECT_GE(num_plain_same, 48);
  EXPECT_GE(num_same, 48);
  std::vector<std::vector<int32_t>> texts = prompts;
  for (size_t i = 0; i < prompts.size(); ++i) {
    texts[i].insert(texts[i].end(), oracle[i].tokens.begin(), oracle[i].tokens.end());
  }
  for (const char* kv_dtype : {"bf16", "fp8"}) {
    const auto unquantised =
        ExpectAgreement("demo", DemoDir(), kv_dtype, "f32", texts, {.wrong = 0.01, .max_margin = 0.5});
    const auto quantised = ExpectAgreement("demo", DemoDir(), kv_dtype, "fp8", texts, kSame);
    Print(std::string("demo, cache ") + kv_dtype + ", the CPU quantised against unquantised",
          Compare(quantised, unquantised));
  }
}

// ---- What of the CPU's invariances holds.

struct Difference {
  int num_positions = 0, num_different = 0;  // log-probabilities whose bits differ
  double max = 0;
  int num_other_tokens = 0;
};

Difference Differ(const std::vector<Answer>& a, const std::vector<Answer>& b) {
  Difference d;
  for (size_t i = 0; i < a.size(); ++i) {
    const auto p = Positions(a[i]), q = Positions(b[i]);
    d.num_other_tokens += a[i].tokens != b[i].tokens;
    for (size_t j = 0; j < std::min(p.size(), q.size()); ++j) {
      if (p[j].token != q[j].token) break;
      ++d.num_positions;
      d.num_different += std::bit_cast<uint32_t>(p[j].logprob) != std::bit_cast<uint32_t>(q[j].logprob);
      d.max = std::max(d.max, static_cast<double>(std::abs(p[j].logprob - q[j].logprob)));
    }
  }
  return d;
}

void Print(const char* what, const Difference& d) {
  std::printf("[ measured ] %s: %d of %d log-probabilities differ in a bit, by %.2e at most; %d answers differ\n", what,
              d.num_different, d.num_positions, d.max, d.num_other_tokens);
}

// Alone, together, in other chunks, with another cache: sampled tokens are the same where their margin allows.
TEST_F(CudaEngineTest, CompanyChangesLittle) {
  std::vector<Request> requests;
  for (const auto& prompt : DemoPrompts()) {
    Request request = Greedy(prompt, 24);
    request.sampling.ignore_eos = true;
    requests.push_back(request);
  }
  const auto run = [&](EngineOptions options, bool one_by_one) {
    auto engine = MakeEngine(options);
    if (!one_by_one) return RunAll(*engine, requests);
    std::vector<Answer> answers;
    for (const Request& request : requests) answers.push_back(RunAll(*engine, {request})[0]);
    return answers;
  };
  EngineOptions options = Options(DemoDir(), "cuda", "bf16", "auto");
  const auto alone = run(options, true), again = run(options, true), together = run(options, false);
  options.max_batch_tokens = 8;
  const auto chunked = run(options, true);
  options.max_batch_tokens = 64;
  options.kv_cache_bytes = 64 * 64 * 1152 * 5;  // 64 blocks: too few for everybody
  const auto preempted = run(options, false);
  const Difference same = Differ(alone, again), batch = Differ(alone, together), chunk = Differ(alone, chunked);
  Print("the same run again", same);
  Print("one by one against 50 at once", batch);
  Print("prompts whole against 8 rows a step", chunk);
  Print("with preemption", Differ(alone, preempted));
  EXPECT_EQ(same.num_different, 0);
  EXPECT_EQ(same.num_other_tokens, 0);
  for (const Difference& d : {batch, chunk}) EXPECT_LT(d.max, 0.3);
}

// Where the first token that differs had a clear margin, it should not.
void ExpectSameWhereClear(const std::vector<Answer>& expected, const std::vector<Answer>& answers,
                          double margin = kMargin) {
  for (size_t i = 0; i < answers.size(); ++i) {
    const auto &want = expected[i].logprobs, &got = answers[i].logprobs;
    for (size_t j = 0; j < std::min(want.size(), got.size()); ++j) {
      if (want[j].token == got[j].token) continue;
      EXPECT_LE(want[j].top[0].second - want[j].top[1].second, margin) << "answer " << i << ", token " << j;
      break;
    }
  }
}

// More rows a step change sums in their last bits; where the margin is clear, no draft changes a token.
TEST_F(CudaEngineTest, DraftsChangeLittle) {
  std::vector<Request> requests;
  for (const auto& prompt : DemoPrompts()) requests.push_back(Greedy(prompt, 96));
  EngineOptions options = Options(DemoDir(), "cuda", "bf16", "auto");
  const auto expected = RunAll(*MakeEngine(options), requests);
  for (int k : {1, 2}) {
    options.speculative_tokens = k;
    const auto engine = MakeEngine(options);
    const auto answers = RunAll(*engine, requests);
    const EngineStats stats = engine->stats();
    const double share = static_cast<double>(stats.accepted_draft_tokens) / static_cast<double>(stats.draft_tokens);
    std::printf("[ measured ] k = %d: %d of %zu greedy answers the same, %.1f %% of %llu drafts accepted\n", k,
                CountSame(expected, answers), requests.size(), 100 * share,
                static_cast<unsigned long long>(stats.draft_tokens));
    EXPECT_GT(share, k == 1 ? 0.9 : 0.6);
    ExpectSameWhereClear(expected, answers);
  }
}

// A sum that comes from two ranks is rounded once more, and FP8 is chaotic wherever it is.
TEST_F(CudaEngineTest, RanksChangeLittle) {
  constexpr double kRanksMargin = 0.3;
  std::vector<Request> requests;
  for (const auto& prompt : DemoPrompts()) requests.push_back(Greedy(prompt, 96));
  EngineOptions options = Options(DemoDir(), "cuda", "bf16", "auto");
  options.num_ranks = 2;
  if (const auto engine = Engine::Create(options); absl::IsNotFound(engine.status())) {
    GTEST_SKIP() << "one GPU: did not run";
  }
  options.num_ranks = 1;
  const auto expected = RunAll(*MakeEngine(options), requests);
  options.num_ranks = 2;
  for (int k : {0, 1}) {
    options.speculative_tokens = k;
    const auto engine = MakeEngine(options);
    const auto answers = RunAll(*engine, requests);
    std::printf("[ measured ] 2 ranks, k = %d: %d of %zu greedy answers the same\n", k, CountSame(expected, answers),
                requests.size());
    ExpectSameWhereClear(expected, answers, kRanksMargin);
    EXPECT_GE(CountSame(expected, answers), 45);
    for (const EngineStats& rank : engine->rank_stats()) EXPECT_GT(rank.generated_tokens, 0u);
    // One at a time: the other rank's steps are empty.
    ExpectSameWhereClear({expected[0]}, {RunAll(*engine, {requests[0]})[0]}, kRanksMargin);
  }
}

}  // namespace
}  // namespace cachalot
