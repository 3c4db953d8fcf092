// `cachalot plan` against arithmetic by hand: DeepSeek-V3 on so many GPUs. Needs the CUDA backend's library, no GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "engine/plan.h"
#include "tests/engine/checkpoint_writer.h"

namespace cachalot {
namespace {

using testing::HasSubstr;

constexpr int64_t kGiB = int64_t{1} << 30;

class PlanTest : public testing::Test {
 protected:
  PlanTest() {
    std::filesystem::copy_file(std::string(CACHALOT_TEST_DATA_DIR) + "/bench/deepseek_v3.json",
                               dir_.path() + "/config.json");
    options_.engine.model_dir = dir_.path();
    options_.engine.max_sequences = 128;
    options_.gpu_memory = 80 * kGiB;
  }
  TempDir dir_;
  PlanOptions options_;
};

// What CUDA gives for an allocation of so many bytes.
double Allocated(double bytes) { return std::ceil(bytes / (2 << 20)) * (2 << 20); }
double Fp8(double rows, double cols) { return Allocated(rows * cols + rows * cols / (128 * 128) * 4); }
double Bf16(double rows, double cols) { return Allocated(rows * cols * 2); }

// Of a rank with `slots` experts of each of the 58 MoE layers.
double WeightsByHand(int slots) {
  const double attention = Fp8(1536 + 576, 7168) + Fp8(24576, 1536) + 2 * Bf16(128 * 128, 512) + Fp8(7168, 16384);
  const double dense = Fp8(2 * 18432, 7168) + Fp8(7168, 18432);
  const double shared = Fp8(2 * 2048, 7168) + Fp8(7168, 2048), router = Bf16(256, 7168);
  const double experts = Fp8(slots * 2.0 * 2048, 7168) + Fp8(slots * 7168.0, 2048);
  return 2 * Bf16(129280, 7168) + 61 * attention + 3 * dense + 58 * (shared + router + experts);
}

TEST_F(PlanTest, WeightsAndCacheAreThoseOfAPencil) {
  struct Case {
    int gpus, slots, redundant;
  };
  for (const int64_t memory : {80 * kGiB, 141'000'000'000}) {
    for (const Case& c : {Case{8, 32, 0}, Case{16, 16, 0}, Case{32, 8, 0}, Case{144, 2, 32}, Case{320, 1, 64}}) {
      options_.gpu_memory = memory;
      const auto plan = PlanRank(options_, c.gpus);
      if (c.gpus == 8 && memory == 80 * kGiB) {  // 103 GB of weights
        EXPECT_TRUE(absl::IsResourceExhausted(plan.status())) << plan.status();
        continue;
      }
      ASSERT_TRUE(plan.ok()) << plan.status();
      EXPECT_EQ(plan->expert_slots, c.slots);
      EXPECT_EQ(plan->redundant_experts, c.redundant);
      EXPECT_NEAR(plan->weights / WeightsByHand(c.slots), 1, 0.015) << c.gpus << " GPUs";
      // bf16: 576 values a token and layer; nine tenths of what is left.
      EXPECT_EQ(plan->cache, plan->cache_tokens * 61 * 576 * 2);
      const int64_t left =
          plan->free - plan->weights - plan->workspace - plan->activations - plan->state - plan->reserve;
      EXPECT_NEAR(static_cast<double>(plan->cache) / left, 0.9, 0.001);
      EXPECT_EQ(plan->num_sequences, std::min<int64_t>(128, plan->cache_tokens / 4096));
      // A step reads all but the embedding and most of the cache once, and no card reads more than 4.6 TB/s.
      const double read =
          plan->weights - Bf16(129280, 7168) - 61 * Bf16(128 * 128, 512) + plan->num_sequences * 4096.0 * 61 * 576 * 2;
      EXPECT_GT(plan->roofline_seconds, 0.9 * read / 4.6e12);
      EXPECT_LT(plan->roofline_seconds, 3 * read / 3.0e12);
    }
  }
}

// Beyond a node's eight GPUs rows go by the network, 43 GB/s a GPU: what that adds to a step is bytes by hand.
TEST_F(PlanTest, AStepWaitsForTheNetwork) {
  options_.gpu_memory = 141'000'000'000;
  options_.context = 1024;
  constexpr double kRow = 7168 * 1.03 + 2 * 7168;  // fp8 with scales there, bf16 back
  const auto seconds = [&](int gpus, int sequences) {
    options_.engine.max_sequences = sequences;
    const auto plan = PlanRank(options_, gpus);
    EXPECT_TRUE(plan.ok() && plan->num_sequences == sequences) << plan.status();
    return plan->roofline_seconds;
  };
  // From 32 sequences to 64 every expert of a rank is read anyway and no product has operations enough to count: what
  // is new is attention, to 1024 keys by 128 heads of 1088 products each, and what is sent.
  struct Case {
    int gpus;
    double nodes, ranks;  // that are others, and have experts of a token
  };
  for (const Case& c : {Case{8, 0, 4.60}, Case{32, 2.70, 6.96}, Case{64, 3.15, 7.45}}) {
    const double sent = 58 * 32 * kRow * (c.ranks / 360e9 + c.nodes / 43e9);
    const double attention = 61 * 32 * 1024.0 * 128 * 2 * 1088 / 0.77e15;
    EXPECT_NEAR((seconds(c.gpus, 64) - seconds(c.gpus, 32)) / (sent + attention), 1, 0.03) << c.gpus << " GPUs";
  }
}

TEST_F(PlanTest, SaysWhatWouldDo) {
  options_.num_gpus = 8;
  const auto report = Plan(options_);
  ASSERT_TRUE(absl::IsResourceExhausted(report.status()));
  EXPECT_THAT(std::string(report.status().message()), HasSubstr("8 GPUs of 80 GiB: does not fit, needs at least 1"));
  const std::string words(report.status().message());
  const int least = std::stoi(words.substr(words.find("at least ") + 9));
  EXPECT_TRUE(PlanRank(options_, least).ok());
  EXPECT_FALSE(PlanRank(options_, least - 1).ok());
  options_.gpu_memory = 16 * kGiB;  // attention alone is more
  EXPECT_THAT(std::string(Plan(options_).status().message()), HasSubstr("nor does it on any number of them"));
}

TEST_F(PlanTest, DraftsAndFp8TakeWhatTheyTake) {
  const auto plain = PlanRank(options_, 32);
  options_.engine.speculative_tokens = 1;
  const auto drafting = PlanRank(options_, 32);
  options_.engine.speculative_tokens = 0;
  options_.engine.kv_cache_dtype = "fp8";
  const auto small = PlanRank(options_, 32);
  ASSERT_TRUE(plain.ok() && drafting.ok() && small.ok());
  // The MTP layer: one more MoE layer and a projection of [7168, 14336] in fp8.
  const double layer = WeightsByHand(8) / 61;
  EXPECT_NEAR((drafting->weights - plain->weights) / layer, 1, 0.25);
  EXPECT_NEAR(static_cast<double>(small->cache_tokens) / plain->cache_tokens, 576 * 2 / 656.0, 0.01);
}

TEST_F(PlanTest, RefusesWhatMakesNoSense) {
  EXPECT_THAT(std::string(PlanRank(options_, 0).status().message()), HasSubstr("gpus: found 0"));
  options_.context = 1 << 20;
  EXPECT_THAT(std::string(PlanRank(options_, 32).status().message()), HasSubstr("expected 1 to the model's 163840"));
  options_.context = 4096;
  options_.engine.kv_cache_dtype = "f32";
  EXPECT_THAT(std::string(PlanRank(options_, 32).status().message()), HasSubstr("kv-cache-dtype: found \"f32\""));
  options_.engine.model_dir = "/nowhere";
  EXPECT_THAT(std::string(PlanRank(options_, 32).status().message()), HasSubstr("/nowhere"));
}

}  // namespace
}  // namespace cachalot
