// The GPU's memory plan: sizes that add up, and limits that name what to change.
#include "engine/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "engine/model/activations.h"
#include "engine/model/random_checkpoint.h"
#include "engine/model/tensor_table.h"
#include "tests/engine/checkpoint_writer.h"

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

TEST(MemoryPlanTest, WeightsTakeWhatIsStoredAndLittleMore) {
  const ModelConfig config = ParseConfig(TinyConfig());
  const auto checkpoint = MakeRandomCheckpoint(config);
  OpLimits limits;
  limits.num_experts = limits.num_local_experts = config.n_routed_experts;
  int64_t elements = 0;
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    if (expected.mtp_layer < 0) elements += expected.num_elements();
  }
  const int64_t all = DeviceWeightBytes(config, *checkpoint, limits);
  EXPECT_GT(all, elements);
  EXPECT_LT(all, elements * 5 + 512 * 100);
  limits.max_drafts = 1;
  int64_t mtp = 0;
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    if (expected.mtp_layer >= 0 && !expected.is_optional) mtp += expected.num_elements();
  }
  EXPECT_GT(DeviceWeightBytes(config, *checkpoint, limits), all + mtp);
  limits.max_drafts = 0;
  limits.num_local_experts /= 2;
  EXPECT_LT(DeviceWeightBytes(config, *checkpoint, limits), all);
}

TEST(MemoryPlanTest, TheCacheTakesWhatIsAskedFor) {
  const ModelConfig config = ParseConfig(TinyConfig());
  EngineOptions options;
  options.max_sequences = 2;
  const auto plan = [&](int64_t left) { return PlanCache(config, options, {KvDType::kBF16}, left, 0.5); };
  const int64_t needed = int64_t{2} * ((config.max_position_embeddings + 63) / 64);

  EXPECT_EQ(plan(int64_t{1} << 40)->num_blocks, needed);
  const int64_t block_bytes = plan(int64_t{1} << 40)->block_bytes;
  EXPECT_EQ(plan(10 * (block_bytes + 12))->num_blocks, 5);
  options.kv_cache_share = 0.8;
  EXPECT_EQ(plan(10 * (block_bytes + 12))->num_blocks, 8);
  EXPECT_EQ(plan(10 * (block_bytes + 12))->max_model_len, std::min(512, config.max_position_embeddings));
  options.speculative_tokens = 2;
  EXPECT_EQ(plan(10 * (block_bytes + 12))->max_model_len, std::min(512 - 6, config.max_position_embeddings))
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
