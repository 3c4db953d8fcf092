// The MTP layer against float64 references, token by token as drafting uses it; and bit for bit however it was fed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "absl/types/span.h"
#include "engine/expert_placement.h"
#include "engine/model/deepseek.h"
#include "tests/engine/golden.h"

namespace cachalot {
namespace {

constexpr int kMaxTokens = 320, kSlot = 1, kNumBlocks = 11;

// A model on the CPU, its device memory plain memory: one sequence, its cache in scattered blocks.
class MtpWorld {
 public:
  MtpWorld(const std::string& model_dir, KvDType dtype) : config_(*ModelConfig::Load(model_dir)) {
    checkpoint_ = *Checkpoint::Open(model_dir);
    BackendOptions options;
    options.device = "cpu";
    options.limits = config_.op_limits();
    options.limits.max_tokens = options.limits.max_rows = options.limits.max_context = kMaxTokens;
    options.limits.max_sequences = 2;
    options.limits.max_drafts = 1;
    backend_ = *MakeBackend(options);
    store_ =
        *KvStore::Create(config_, {dtype, /*has_mtp=*/true, backend_->value_dtype()}, kNumBlocks, backend_->device());
    const std::vector<float> angles = MakeRopeTable(config_, kMaxTokens);
    const Tensor rope = New(DType::kF32, {kMaxTokens + 1, config_.qk_rope_head_dim});
    std::copy(angles.begin(), angles.end(), rope.row<float>(1));
    const RankExperts experts = DefaultExperts(config_, {.num_experts = config_.n_routed_experts}, 0);
    auto weights = ModelWeights::Load(config_, *checkpoint_, experts, true, backend_->ops());
    CHECK(weights.ok(), "{}", weights.status().ToString());
    model_ = *DeepSeek::Create(config_, *std::move(weights), *store_, {rope}, *backend_, options.limits,
                               ActivationFormat::kF32, experts);
    state_.block_table = New(DType::kI32, {2, kNumBlocks});
    for (int i = 0; i < kNumBlocks; ++i) state_.block_table.row<int32_t>(kSlot)[i] = (4 * i + 3) % kNumBlocks;
    state_.length = New(DType::kI32, {2});
  }

  // A chunk goes through the model, as in a step.
  void Feed(absl::Span<const int32_t> tokens, int start) {
    const StepArrays step = Arrays(tokens, start);
    model_->Forward(step);
    model_->FeedMtp(step);
    state_.length.as<int32_t>()[kSlot] = start + static_cast<int>(tokens.size());
    model_->KeepBorders(step);
  }

  // Log-probabilities of what follows `token`, which comes after all that has been fed.
  std::vector<float> Draft(int32_t token) {
    const StepArrays step = Arrays({&token, 1}, state_.length.as<int32_t>()[kSlot]);
    model_->ForwardMtp(step, model_->PreviousOutputs(step));
    return Logprobs(step);
  }

  // The main model's, of what follows `token`, which it feeds.
  std::vector<float> Next(int32_t token) {
    const int start = state_.length.as<int32_t>()[kSlot];
    Feed({&token, 1}, start);
    return Logprobs(Arrays({&token, 1}, start));
  }

 private:
  Tensor New(DType dtype, std::initializer_list<int64_t> dims) {
    Tensor tensor(nullptr, dtype, dims);
    buffers_.push_back(*backend_->device().Allocate(tensor.num_bytes(), Device::Memory::kDevice));
    tensor.data = buffers_.back().data();
    return tensor;
  }
  Tensor Ints(const std::vector<int32_t>& values) {
    const Tensor tensor = New(DType::kI32, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), tensor.as<int32_t>());
    return tensor;
  }
  std::vector<float> Logprobs(const StepArrays& step) {
    const float* logits = model_->Head(step, step.input.row_token).as<float>();
    std::vector<float> logprobs(logits, logits + config_.vocab_size);
    const float max = *std::max_element(logprobs.begin(), logprobs.end());
    const double sum = std::accumulate(logprobs.begin(), logprobs.end(), 0.0,
                                       [max](double total, float x) { return total + std::exp(double{x} - max); });
    for (float& x : logprobs) x -= max + static_cast<float>(std::log(sum));
    return logprobs;
  }
  // Rows of the sequence from `start` on, logits of the last.
  StepArrays Arrays(absl::Span<const int32_t> tokens, int start) {
    const int count = static_cast<int>(tokens.size());
    std::vector<int32_t> positions(count);
    std::iota(positions.begin(), positions.end(), start);
    StepArrays step;
    step.state = state_;
    step.rows = {Ints({tokens.begin(), tokens.end()}), Ints(positions), Ints(std::vector<int32_t>(count, kSlot))};
    step.input.seq_slot = Ints({kSlot});
    step.input.query_start = Ints({0, count});
    step.input.row_token = Ints({count - 1});
    return step;
  }

  const ModelConfig config_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Backend> backend_;
  std::vector<Buffer> buffers_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<DeepSeek> model_;
  SlotState state_;
};

class MtpGoldenTest : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Family, MtpGoldenTest, testing::Values("v3_like", "v31"),
                         [](const auto& info) { return std::string(info.param); });

// The largest difference to the reference's log-probabilities, drafting after every token of every prompt.
double LargestDifference(const Golden& golden, KvDType dtype, int* num_drafts) {
  double largest = 0;
  for (const GoldenPrompt& p : golden.prompts) {
    const int num_tokens = static_cast<int>(p.tokens.size());
    MtpWorld world(golden.model_dir, dtype);
    for (int i = 1; i < num_tokens; ++i) {
      world.Feed({&p.tokens[i - 1], 1}, i - 1);
      const std::vector<float> logprobs = world.Draft(p.tokens[i]);
      ++*num_drafts;
      if (i + 1 < num_tokens) {
        largest = std::max(largest, std::abs(logprobs[p.tokens[i + 1]] - p.mtp_logprobs[i - 1]));
        continue;
      }
      for (size_t t = 0; t < logprobs.size(); ++t) {
        largest = std::max(largest, std::abs(logprobs[t] - p.mtp_last_logprobs[t]));
      }
    }
  }
  return largest;
}

TEST_P(MtpGoldenTest, DraftsMatchTheReference) {
  const Golden golden = LoadGolden(GetParam());
  for (auto [dtype, name, bound] : {std::tuple{KvDType::kF32, "f32", 2e-3}, {KvDType::kBF16, "bf16", 3e-2}}) {
    int num_drafts = 0;
    const double largest = LargestDifference(golden, dtype, &num_drafts);
    std::printf("[ measured ] %s cache: max log-probability difference %.2e over %d drafts\n", name, largest,
                num_drafts);
    EXPECT_LT(largest, bound) << name;
    EXPECT_GT(num_drafts, 400);
  }
}

TEST_P(MtpGoldenTest, ChunksChangeNothing) {
  const Golden golden = LoadGolden(GetParam());
  const std::vector<int32_t>& tokens = golden.prompts[2].tokens;  // 150 tokens: three blocks
  const int num_tokens = static_cast<int>(tokens.size());
  MtpWorld whole(golden.model_dir, KvDType::kF32);
  whole.Feed(tokens, 0);
  const std::vector<float> expected = whole.Draft(17);
  for (int chunk : {1, 7, 63, 64, 65, 128, 149}) {
    MtpWorld world(golden.model_dir, KvDType::kF32);
    for (int start = 0; start < num_tokens; start += chunk) {
      world.Feed(absl::MakeConstSpan(tokens).subspan(start, chunk), start);
    }
    EXPECT_EQ(world.Draft(17), expected) << chunk;
  }
}

std::vector<double> Probabilities(const std::vector<float>& logprobs, float temperature) {
  double total = 0;
  std::vector<double> p;
  for (float x : logprobs) total += p.emplace_back(std::exp(x / temperature));
  for (double& x : p) x /= total;
  return p;
}

double TotalVariation(const std::vector<float>& a, const std::vector<float>& b, float temperature) {
  const std::vector<double> p = Probabilities(a, temperature), q = Probabilities(b, temperature);
  double distance = 0;
  for (size_t id = 0; id < p.size(); ++id) distance += std::abs(p[id] - q[id]) / 2;
  return distance;
}

// What share of drafts sampling accepts. With the same noise on both it is at least (1 - TV) / (1 + TV) and at most
// 1 - TV, which is rejection sampling's, where TV is the total variation between what the model and the layer predict.
TEST(DemoAcceptanceTest, SampledIsWithinItsBounds) {
  EngineOptions options;
  options.model_dir = DemoDir();
  options.device = "cpu";
  options.max_model_len = kMaxTokens;
  options.speculative_tokens = 1;
  MtpWorld world(DemoDir(), KvDType::kF32);
  for (float temperature : {1.0f, 2.0f}) {
    const std::vector<Request> requests = DemoRequests(temperature, 64);
    const auto engine = MakeEngine(options);
    const std::vector<Answer> answers = RunAll(*engine, requests);
    const EngineStats stats = engine->stats();

    double at_most = 0, at_least = 0;
    int num_tokens = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      const std::vector<int32_t>& prompt = requests[i].prompt;
      world.Feed(prompt, 0);
      for (size_t t = 0; t + 1 < answers[i].tokens.size(); ++t) {
        const std::vector<float> draft = world.Draft(answers[i].tokens[t]);
        const double distance = TotalVariation(world.Next(answers[i].tokens[t]), draft, temperature);
        at_most += 1 - distance;
        at_least += (1 - distance) / (1 + distance);
        ++num_tokens;
      }
    }
    at_most /= num_tokens, at_least /= num_tokens;
    const double num_drafts = static_cast<double>(stats.draft_tokens);
    const double share = static_cast<double>(stats.accepted_draft_tokens) / num_drafts;
    const double deviation = std::sqrt(share * (1 - share) / num_drafts);
    std::printf(
        "[ measured ] temperature %.1f: %.1f %% (deviation %.1f) of %.0f drafts accepted; over %d tokens (1 - TV) / (1 "
        "+ "
        "TV) %.1f %%, 1 - TV %.1f %%\n",
        temperature, 100 * share, 100 * deviation, num_drafts, num_tokens, 100 * at_least, 100 * at_most);
    EXPECT_GT(share, at_least - 3 * deviation);
    EXPECT_LT(share, at_most + 3 * deviation);
  }
}

}  // namespace
}  // namespace cachalot
