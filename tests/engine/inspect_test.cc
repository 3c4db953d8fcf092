// The report, and the sums of the real V3 that the specification states.
#include "engine/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "engine/model/tensor_table.h"
#include "tests/engine/checkpoint_writer.h"

namespace cachalot {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

ModelConfig V3Config() {
  nlohmann::json json = TinyConfig();
  json.update({{"vocab_size", 129280},
               {"hidden_size", 7168},
               {"intermediate_size", 18432},
               {"moe_intermediate_size", 2048},
               {"num_hidden_layers", 61},
               {"first_k_dense_replace", 3},
               {"num_attention_heads", 128},
               {"q_lora_rank", 1536},
               {"kv_lora_rank", 512},
               {"qk_nope_head_dim", 128},
               {"qk_rope_head_dim", 64},
               {"v_head_dim", 128},
               {"n_routed_experts", 256},
               {"n_shared_experts", 1},
               {"num_experts_per_tok", 8},
               {"n_group", 8},
               {"topk_group", 4}});
  return ParseConfig(json);
}

// Specification 2.2, from a scan of the published files.
TEST(TensorTableTest, SumsOfV3) {
  const ModelConfig config = V3Config();
  const ParameterCounts counts = CountParameters(config);
  EXPECT_EQ(counts.main, 671'026'419'200);
  EXPECT_EQ(counts.active, 37'552'282'624);
  EXPECT_EQ(counts.mtp, 13'463'426'304);

  int64_t num_tensors = 0, bytes = 0, elements = 0;
  std::map<TensorKind, int64_t> by_kind;
  for (const ExpectedTensor& tensor : ExpectedTensors(config)) {
    const int64_t n = tensor.num_elements();
    ++num_tensors;
    elements += n;
    by_kind[tensor.kind] += n;
    bytes += tensor.use == TensorUse::kLinear ? n : tensor.use == TensorUse::kBias ? n * 4 : n * 2;
    if (tensor.use != TensorUse::kLinear) continue;
    const std::vector<int64_t> scales = ScaleShape(tensor.shape);
    ++num_tensors;
    elements += scales[0] * scales[1];
    bytes += scales[0] * scales[1] * 4;
  }
  EXPECT_EQ(num_tensors, 91'991);
  EXPECT_EQ(elements, 684'531'386'000);
  EXPECT_EQ(bytes, 688'574'839'360);
  EXPECT_EQ(by_kind[TensorKind::kMtp], counts.mtp);
  EXPECT_EQ(by_kind[TensorKind::kEmbedding], 129280LL * 7168);
  EXPECT_EQ(by_kind[TensorKind::kRoutedExperts], 58LL * 256 * 3 * 2048 * 7168);
}

TEST(InspectTest, Report) {
  TempDir dir;
  StoredTensors tensors = TinyTensors(ParseConfig(TinyConfig()));
  tensors["something.else"] = {"I64", {1}, std::string(8, '\0')};
  WriteModel(dir, TinyConfig(), tensors);
  const auto report = Inspect(dir.path(), /*deep=*/true);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_THAT(report->problems, IsEmpty());
  for (const char* part :
       {"deepseek_v3", "hidden 64, vocabulary 40, dense MLP 96", "2: 1 dense, 1 MoE; 1 MTP",
        "2 heads of nope 16 + rope 8, v 16; q_lora_rank 48, kv_lora_rank 128",
        "4 routed, 2 a token, 2 shared, width 32", "sigmoid, noaux_tc; 1 of 2 groups; normalised", "fp8 e4m3",
        "theta 10000, plain", "4096 tokens", "1 file, ", "model.safetensors",
        "1 not part of the model:\n  something.else", "F8_E4M3", "routed experts", "scales", "MTP"}) {
    EXPECT_THAT(report->text, HasSubstr(part));
  }
  // (128 + 8) values of 4 bytes, two layers; three with MTP. FP8: 128 + 4 + 16 bytes.
  EXPECT_THAT(report->text, HasSubstr("f32 1,088 bytes (1,632 with MTP), bf16 544 bytes (816 with MTP), "
                                      "fp8 296 bytes (444 with MTP)"));
  EXPECT_THAT(report->text, Not(HasSubstr("not in the index")));
}

TEST(InspectTest, ListsProblemsAndWhatTheIndexLeavesOut) {
  TempDir dir;
  StoredTensors tensors = TinyTensors(ParseConfig(TinyConfig()));
  tensors.erase("model.norm.weight");
  WriteModel(dir, TinyConfig(), tensors);
  nlohmann::json index;
  for (const auto& [name, tensor] : tensors) index["weight_map"][name] = "model.safetensors";
  index["weight_map"].erase("lm_head.weight");
  WriteFile(dir / "model.safetensors.index.json", index.dump());
  const auto report = Inspect(dir.path(), /*deep=*/false);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->problems,
            std::vector<std::string>{dir.path() + ": model.norm.weight: found nothing, expected [64]"});
  EXPECT_THAT(report->text, HasSubstr("1 not in the index:\n  lm_head.weight"));
}

TEST(InspectTest, WhatCannotBeReadIsTheStatus) {
  TempDir dir;
  EXPECT_EQ(Inspect(dir.path(), false).status().code(), absl::StatusCode::kNotFound);
  WriteFile(dir / "config.json", TinyConfig().dump());
  EXPECT_EQ(Inspect(dir.path(), false).status().code(), absl::StatusCode::kNotFound);
  WriteFile(dir / "model.safetensors", "x");
  EXPECT_EQ(Inspect(dir.path(), false).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace cachalot
