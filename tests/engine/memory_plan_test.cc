// The GPU's memory plan: sizes that add up, and limits that name what to change.
#include "engine/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/expert_placement.h"
#include "engine/model/activations.h"
#include "engine/model/random_checkpoint.h"
#include "engine/model/runner.h"
#include "engine/model/tensor_table.h"
#include "engine/model/weights.h"
#include "tests/engine/checkpoint_writer.h"
#include "tests/engine/fake_ops.h"
#include "tests/engine/golden.h"

namespace cachalot {
namespace {

using testing::HasSubstr;

TEST(RandomCheckpointTest, HasEveryTensorOnce) {
  const ModelConfig config = ParseConfig(TinyConfig());
  const auto checkpoint = MakeRandomCheckpoint(config);
  EXPECT_FALSE(checkpoint->has_data());
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    const CheckpointTensor* tensor = checkpoint->Find(expected.name);
    ASSERT_EQ(tensor != nullptr, !expected.is_optional) << expected.name;
    if (tensor == nullptr) continue;
    EXPECT_EQ(tensor->shape, expected.shape) << expected.name;
    EXPECT_EQ(tensor->data, nullptr);
    const CheckpointTensor* scales = checkpoint->Find(expected.name + kScaleSuffix);
    ASSERT_EQ(scales != nullptr, tensor->dtype == "F8_E4M3") << expected.name;
    if (scales != nullptr) {
      EXPECT_EQ(scales->shape, ScaleShape(expected.shape));
    }
  }
}

// A backend that measures: what is stored, in bytes, of the Makes that it is asked for meanwhile.
class MeasuringOps : public FakeOps {
 public:
  using FakeOps::FakeOps;
  int64_t MeasureWeights(const std::function<void()>& make) override {
    bytes_ = 0;
    make();
    return bytes_;
  }
  std::unique_ptr<Weight> MakeVector(const Tensor& source) override {
    bytes_ += source.num_bytes();
    return FakeOps::MakeVector(source);
  }
  std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& parts) override {
    for (const WeightPart& part : parts) Count(part);
    return FakeOps::MakeLinear(parts);
  }
  std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) override {
    Count(kv_b);
    return FakeOps::MakeKvUp(kv_b, num_heads, nope_dim, v_dim);
  }
  std::unique_ptr<Weight> MakeExperts(const std::vector<std::vector<WeightPart>>& experts) override {
    for (const auto& parts : experts) {
      for (const WeightPart& part : parts) Count(part);
    }
    return FakeOps::MakeExperts(experts);
  }

 private:
  void Count(const WeightPart& part) {
    bytes_ += part.weight.num_bytes() + (part.weight.dtype == DType::kF8E4M3 ? part.scale.num_bytes() : 0);
  }
  int64_t bytes_ = 0;
};

TEST(MemoryPlanTest, WeightsTakeWhatADryRunOfTheirMakesSays) {
  const Golden golden = LoadGolden("v3_like");
  const auto config = ModelConfig::Load(golden.model_dir);
  const auto checkpoint = Checkpoint::Open(golden.model_dir);
  ASSERT_TRUE(config.ok() && checkpoint.ok());
  int64_t stored = 0, experts = 0, mtp = 0;
  for (const ExpectedTensor& expected : ExpectedTensors(*config)) {
    if (expected.mtp_layer >= 0 && expected.is_optional) continue;
    int64_t bytes = static_cast<int64_t>((*checkpoint)->Find(expected.name)->num_bytes);
    const CheckpointTensor* scales = (*checkpoint)->Find(expected.name + kScaleSuffix);
    if (scales != nullptr) bytes += static_cast<int64_t>(scales->num_bytes);
    if (expected.mtp_layer >= 0) {
      mtp += bytes;
      continue;
    }
    stored += bytes;
    if (expected.kind == TensorKind::kRoutedExperts) experts += bytes;
  }
  ASSERT_GT(mtp, 0);
  MeasuringOps ops(**checkpoint);
  const int all = config->n_routed_experts;
  const auto bytes = [&](int num_redundant, int num_ranks, bool with_mtp) {
    const RankExperts held = DefaultExperts(*config, {all, num_redundant, num_ranks}, num_ranks - 1);
    return *ModelWeights::DeviceBytes(*config, **checkpoint, held, with_mtp, ops);
  };
  EXPECT_EQ(bytes(0, 1, false), stored);
  EXPECT_EQ(bytes(0, 2, false), stored - experts / 2);
  EXPECT_EQ(bytes(4, 2, false), stored - experts / 2 + 2 * experts / all) << "copies too";
  EXPECT_EQ(bytes(0, 1, true), stored + mtp);
}

TEST(MemoryPlanTest, SlotsAndStepsTakeWhatADryRunSays) {
  const Golden golden = LoadGolden("v3_like");
  const auto config = ModelConfig::Load(golden.model_dir);
  ASSERT_TRUE(config.ok());
  BackendOptions options;
  options.device = "cpu";
  options.limits = config->op_limits();
  options.limits.max_tokens = 64;
  options.limits.max_sequences = 4;
  options.limits.max_rows = 8;
  options.limits.max_context = 256;
  const auto backend = MakeBackend(options);
  ASSERT_TRUE(backend.ok());
  const int64_t bytes = Runner::StateBytes(options.limits, **backend);
  options.limits.max_sequences = 5;
  const int64_t slot = Runner::StateBytes(options.limits, **backend) - bytes;
  EXPECT_GT(bytes, 4 * slot);
  EXPECT_GT(slot, kMaxTokenBiases * static_cast<int64_t>(sizeof(TokenBias)) + 2 * config->vocab_size);
  EXPECT_LT(slot, kMaxTokenBiases * 32 + 2 * config->vocab_size + 1024);
  options.limits.max_sequences = 4;
  options.limits.max_drafts = 1;
  EXPECT_GT(Runner::StateBytes(options.limits, **backend), bytes);
}

TEST(MemoryPlanTest, TheCacheTakesWhatIsAskedFor) {
  const ModelConfig config = ParseConfig(TinyConfig());
  EngineOptions options;
  options.max_sequences = 2;
  const auto plan = [&](int64_t left) { return PlanCache(config, options, {KvDType::kBF16}, left, 0.5); };
  const int64_t needed = int64_t{2} * ((config.max_position_embeddings + 63) / 64);

  EXPECT_EQ(plan(int64_t{1} << 40)->num_blocks, needed);
  const int64_t block_bytes = plan(int64_t{1} << 40)->block_bytes;
  EXPECT_EQ(plan(10 * block_bytes)->num_blocks, 5);
  options.kv_cache_share = 0.8;
  EXPECT_EQ(plan(10 * block_bytes)->num_blocks, 8);
  EXPECT_EQ(plan(10 * block_bytes)->max_model_len, std::min(512, config.max_position_embeddings));
  options.speculative_tokens = 2;
  EXPECT_EQ(plan(10 * block_bytes)->max_model_len, std::min(512 - 6, config.max_position_embeddings))
      << "drafts go beyond a sequence's end";
  options.speculative_tokens = 0;
  options.kv_cache_bytes = 3 * block_bytes;
  EXPECT_EQ(plan(0)->num_blocks, 3);
  options.max_model_len = config.max_position_embeddings;
  options.kv_cache_bytes = block_bytes;
  if (config.max_position_embeddings > 64) {
    EXPECT_THAT(std::string(plan(0).status().message()), HasSubstr("raise --kv-cache-memory"));
  }
}

}  // namespace
}  // namespace cachalot
