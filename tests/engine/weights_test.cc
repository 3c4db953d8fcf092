// Problems and Load: every contradiction in one line, every tensor to its place.
#include "engine/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <set>

#include "absl/strings/str_cat.h"
#include "engine/expert_placement.h"
#include "engine/model/tensor_table.h"
#include "tests/engine/checkpoint_writer.h"
#include "tests/engine/fake_ops.h"

namespace cachalot {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

constexpr const char* kMoe = "model.layers.1.mlp.";

RankExperts AllExperts(const ModelConfig& config) {
  return DefaultExperts(config, {.num_experts = config.n_routed_experts}, 0);
}

class WeightsTest : public testing::Test {
 protected:
  WeightsTest() : json_(TinyConfig()), tensors_(TinyTensors(ParseConfig(json_))) {}

  // Problems of the model as it stands; the temporary directory is left out of them.
  std::vector<std::string> Problems(bool deep = false) {
    WriteModel(dir_, json_, tensors_);
    const auto checkpoint = Checkpoint::Open(dir_.path());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    if (!checkpoint.ok()) return {};
    std::vector<std::string> problems = ModelWeights::Problems(ParseConfig(json_), **checkpoint, deep);
    for (std::string& problem : problems) {
      EXPECT_EQ(problem.find('\n'), problem.npos) << problem;
      if (problem.rfind(dir_.path(), 0) == 0) problem.erase(0, dir_.path().size());
    }
    return problems;
  }

  nlohmann::json json_;
  StoredTensors tensors_;
  TempDir dir_;
};

TEST_F(WeightsTest, NoProblems) { EXPECT_THAT(Problems(/*deep=*/true), IsEmpty()); }

// The table against the names of specification 2.1, written out.
TEST(TensorTableTest, NamesAndShapes) {
  std::map<std::string, std::vector<int64_t>> table;
  for (const ExpectedTensor& tensor : ExpectedTensors(ParseConfig(TinyConfig()))) {
    EXPECT_TRUE(table.emplace(tensor.name, tensor.shape).second) << tensor.name;
  }
  std::map<std::string, std::vector<int64_t>> expected = {
      {"model.embed_tokens.weight", {40, 64}}, {"model.norm.weight", {64}}, {"lm_head.weight", {40, 64}}};
  for (int layer = 0; layer < 3; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    expected[prefix + "input_layernorm.weight"] = expected[prefix + "post_attention_layernorm.weight"] = {64};
    expected[prefix + "self_attn.q_a_proj.weight"] = {48, 64};
    expected[prefix + "self_attn.q_a_layernorm.weight"] = {48};
    expected[prefix + "self_attn.q_b_proj.weight"] = {2 * (16 + 8), 48};
    expected[prefix + "self_attn.kv_a_proj_with_mqa.weight"] = {128 + 8, 64};
    expected[prefix + "self_attn.kv_a_layernorm.weight"] = {128};
    expected[prefix + "self_attn.kv_b_proj.weight"] = {2 * (16 + 16), 128};
    expected[prefix + "self_attn.o_proj.weight"] = {64, 2 * 16};
    std::vector<std::pair<std::string, int64_t>> mlps = {{"mlp.", 96}};
    if (layer > 0) {
      expected[prefix + "mlp.gate.weight"] = {4, 64};
      expected[prefix + "mlp.gate.e_score_correction_bias"] = {4};
      mlps = {{"mlp.experts.0.", 32},
              {"mlp.experts.1.", 32},
              {"mlp.experts.2.", 32},
              {"mlp.experts.3.", 32},
              {"mlp.shared_experts.", 64}};
    }
    for (const auto& [mlp, width] : mlps) {
      expected[prefix + mlp + "gate_proj.weight"] = expected[prefix + mlp + "up_proj.weight"] = {width, 64};
      expected[prefix + mlp + "down_proj.weight"] = {64, width};
    }
  }
  expected["model.layers.2.enorm.weight"] = expected["model.layers.2.hnorm.weight"] = {64};
  expected["model.layers.2.shared_head.norm.weight"] = {64};
  expected["model.layers.2.eh_proj.weight"] = {64, 128};
  expected["model.layers.2.embed_tokens.weight"] = expected["model.layers.2.shared_head.head.weight"] = {40, 64};
  EXPECT_EQ(table, expected);
}

TEST_F(WeightsTest, MissingTensor) {
  tensors_.erase("lm_head.weight");
  tensors_.erase("model.layers.1.mlp.experts.3.up_proj.weight");
  EXPECT_THAT(Problems(), ElementsAre(": model.layers.1.mlp.experts.3.up_proj.weight: found nothing, expected [32, 64]",
                                      ": lm_head.weight: found nothing, expected [40, 64]"));
}

TEST_F(WeightsTest, WrongShapeAndRank) {
  tensors_["model.layers.0.self_attn.q_b_proj.weight"].shape = {24, 96};
  tensors_["model.norm.weight"].shape = {64, 1};
  EXPECT_THAT(Problems(), ElementsAre("/model.safetensors: model.layers.0.self_attn.q_b_proj.weight: found "
                                      "F8_E4M3[24, 96], expected F8_E4M3[48, 48]",
                                      "/model.safetensors: model.norm.weight: found BF16[64, 1], expected BF16[64]"));
}

TEST_F(WeightsTest, WrongDtype) {
  tensors_["model.layers.0.self_attn.o_proj.weight"].dtype = "F8_E5M2";
  tensors_["model.layers.1.mlp.gate.weight"].dtype = "I16";
  tensors_["lm_head.weight"] = {"F8_E4M3", {40, 64}, std::string(40 * 64, 'x')};
  EXPECT_THAT(Problems(),
              ElementsAre("/model.safetensors: model.layers.0.self_attn.o_proj.weight: found F8_E5M2[64, 32], expected "
                          "BF16, F16, F32 or F8_E4M3",
                          "/model.safetensors: model.layers.1.mlp.gate.weight: found I16[4, 64], expected BF16, F16 or "
                          "F32",
                          "/model.safetensors: lm_head.weight: found F8_E4M3[40, 64], expected BF16, F16 or F32"));
}

TEST_F(WeightsTest, ScalesMissingOrMisshapen) {
  tensors_.erase("model.layers.0.self_attn.o_proj.weight_scale_inv");
  tensors_["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape = {1, 2};
  tensors_["model.layers.0.mlp.down_proj.weight_scale_inv"] = {"BF16", {1, 1}, "xx"};
  EXPECT_THAT(
      Problems(),
      ElementsAre("/model.safetensors: model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv: found F32[1, 2], "
                  "expected F32[2, 1]",
                  ": model.layers.0.self_attn.o_proj.weight_scale_inv: found nothing, expected F32[1, 1], as the "
                  "weight is F8_E4M3",
                  "/model.safetensors: model.layers.0.mlp.down_proj.weight_scale_inv: found BF16[1, 1], expected "
                  "F32[1, 1]"));
}

TEST_F(WeightsTest, ScalesThatAreNoScales) {
  const std::string name = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv";
  for (const auto& [value, text] :
       {std::pair(std::numeric_limits<float>::quiet_NaN(), "nan"),
        std::pair(std::numeric_limits<float>::infinity(), "inf"), std::pair(0.0f, "0"), std::pair(-0.5f, "-0.5")}) {
    SetFloat(&tensors_[name], 1, value);
    EXPECT_THAT(Problems(), ElementsAre(absl::StrCat("/model.safetensors: ", name, "[1, 0]: found ", text,
                                                     ", expected a finite scale above 0")));
  }
}

TEST_F(WeightsTest, ScalesWithoutFp8) {
  tensors_["model.layers.0.self_attn.o_proj.weight"] = {"BF16", {64, 32}, std::string(64 * 32 * 2, '\0')};
  EXPECT_THAT(Problems(), ElementsAre("/model.safetensors: model.layers.0.self_attn.o_proj.weight_scale_inv: found "
                                      "F32[1, 1], expected no scales, as the weight is not FP8"));
  tensors_.erase("model.layers.0.self_attn.o_proj.weight_scale_inv");
  EXPECT_THAT(Problems(), IsEmpty());  // a weight that is not quantised among those that are
}

TEST_F(WeightsTest, StackedAlike) {
  const std::string name = "model.layers.0.mlp.up_proj.weight";
  tensors_[name] = {"F16", {96, 64}, std::string(96 * 64 * 2, '\0')};
  tensors_.erase(name + "_scale_inv");
  EXPECT_THAT(Problems(), ElementsAre("/model.safetensors: model.layers.0.mlp.up_proj.weight: found F16[96, 64], "
                                      "expected F8_E4M3, as those it is stacked with"));
}

TEST_F(WeightsTest, Fp8WithoutQuantizationConfig) {
  json_.erase("quantization_config");
  const std::vector<std::string> problems = Problems();
  ASSERT_FALSE(problems.empty());
  EXPECT_EQ(problems[0],
            "/model.safetensors: model.layers.0.self_attn.q_a_proj.weight: found F8_E4M3[48, 64], expected BF16, F16 "
            "or F32, as config.json has no quantization_config");
  tensors_ = TinyTensors(ParseConfig(json_));
  EXPECT_THAT(Problems(), IsEmpty());
  json_ = TinyConfig();  // says FP8, and nothing is
  EXPECT_THAT(Problems(), IsEmpty());
}

TEST_F(WeightsTest, NormsAndBiasesAreFinite) {
  const StoredTensors good = tensors_;
  tensors_["model.layers.1.self_attn.kv_a_layernorm.weight"].bytes[2 * 5 + 1] = '\x7f';
  tensors_["model.layers.1.self_attn.kv_a_layernorm.weight"].bytes[2 * 5] = '\xc0';
  SetFloat(&tensors_["model.layers.1.mlp.gate.e_score_correction_bias"], 3, -std::numeric_limits<float>::infinity());
  EXPECT_THAT(Problems(),
              ElementsAre("/model.safetensors: model.layers.1.self_attn.kv_a_layernorm.weight[5]: found NaN "
                          "or infinity, expected a finite value",
                          "/model.safetensors: model.layers.1.mlp.gate.e_score_correction_bias[3]: found "
                          "NaN or infinity, expected a finite value"));
  tensors_ = good;
  const double too_large = 1e300;
  std::string bias(4 * 8, '\0');
  std::memcpy(bias.data() + 8, &too_large, 8);
  tensors_["model.layers.1.mlp.gate.e_score_correction_bias"] = {"F64", {4}, bias};
  EXPECT_THAT(Problems(), ElementsAre(HasSubstr("e_score_correction_bias[1]: found NaN or infinity")));
}

TEST_F(WeightsTest, DeepScanFindsWhatTheQuickOneLeaves) {
  tensors_["model.layers.1.mlp.experts.2.up_proj.weight"].bytes[64 * 7 + 9] = '\xff';
  std::string& head = tensors_["lm_head.weight"].bytes;
  head[2 * (64 * 39 + 63)] = '\x80';
  head[2 * (64 * 39 + 63) + 1] = '\xff';
  tensors_["model.layers.1.mlp.gate.weight"] = {"F16", {4, 64}, std::string(4 * 64 * 2, '\x7e')};
  tensors_["model.embed_tokens.weight"] = {"F32", {40, 64}, std::string(40 * 64 * 4, '\0')};
  SetFloat(&tensors_["model.embed_tokens.weight"], 64, std::nanf(""));
  EXPECT_THAT(Problems(), IsEmpty());
  EXPECT_THAT(Problems(/*deep=*/true),
              ElementsAre(HasSubstr("model.embed_tokens.weight[1, 0]: found NaN"),
                          HasSubstr("model.layers.1.mlp.gate.weight[0, 0]: found NaN"),
                          HasSubstr("model.layers.1.mlp.experts.2.up_proj.weight[7, 9]: found NaN"),
                          HasSubstr("lm_head.weight[39, 63]: found NaN")));
}

TEST_F(WeightsTest, MtpLayersAreAllOrNothing) {
  tensors_.erase("model.layers.2.embed_tokens.weight");
  tensors_.erase("model.layers.2.shared_head.head.weight");
  EXPECT_THAT(Problems(), IsEmpty());
  tensors_.erase("model.layers.2.eh_proj.weight");
  EXPECT_THAT(Problems(), ElementsAre(": model.layers.2.eh_proj.weight: found nothing, expected [64, 128]"));
  std::erase_if(tensors_, [](const auto& item) { return item.first.rfind("model.layers.2.", 0) == 0; });
  EXPECT_THAT(Problems(), IsEmpty());
  tensors_["model.layers.2.embed_tokens.weight"] = {"BF16", {40, 32}, std::string(40 * 32 * 2, '\0')};
  EXPECT_THAT(Problems().front(),
              HasSubstr("model.layers.2.embed_tokens.weight: found BF16[40, 32], expected BF16[40, 64]"));
}

TEST_F(WeightsTest, WhatContradictsTheConfig) {
  const StoredTensor vector = {"BF16", {1}, "xx"};
  const std::map<std::string, std::string> cases = {
      {"model.layers.3.input_layernorm.weight", "no layer beyond num_hidden_layers 2 + num_nextn_predict_layers 1"},
      {"model.layers.99999999999.x", "no layer beyond num_hidden_layers 2 + num_nextn_predict_layers 1"},
      {"model.layers.1.mlp.experts.4.up_proj.weight", "no expert beyond n_routed_experts 4"},
      {"model.layers.0.mlp.experts.0.up_proj.weight", "no experts, as the layer is dense"},
      {"model.layers.0.mlp.gate.e_score_correction_bias", "no router, as the layer is dense"},
      {"model.layers.1.self_attn.q_proj.weight", "no such weight in this architecture"},
      {"model.layers.1.self_attn.indexer.wk.weight", "no such weight in this architecture"},
      {"model.layers.1.self_attn.o_proj.bias", "no bias"},
      {"lm_head.bias", "no bias"},
  };
  for (const auto& [name, expected] : cases) {
    tensors_ = TinyTensors(ParseConfig(json_));
    tensors_[name] = vector;
    EXPECT_THAT(Problems(),
                ElementsAre(absl::StrCat("/model.safetensors: ", name, ": found BF16[1], expected ", expected)));
  }
}

TEST_F(WeightsTest, BiasThatTheMethodDoesNotHave) {
  json_["scoring_func"] = "softmax";
  json_["topk_method"] = "greedy";
  json_["norm_topk_prob"] = false;
  EXPECT_THAT(Problems(),
              ElementsAre(HasSubstr("model.layers.1.mlp.gate.e_score_correction_bias: found F32[4], expected "
                                    "no bias, as topk_method is greedy"),
                          HasSubstr("model.layers.2.mlp.gate.e_score_correction_bias")));
}

TEST_F(WeightsTest, WhatIsHarmless) {
  const StoredTensor vector = {"F32", {1}, "xxxx"};
  for (const char* name : {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
                           "anything.weight", "model.layers.x.weight", "model.layers.0.self_attn.k_scale"}) {
    tensors_[name] = vector;
  }
  EXPECT_THAT(Problems(), IsEmpty());
}

TEST_F(WeightsTest, ThousandsOfProblemsAreCounted) {
  json_["n_routed_experts"] = 1004;
  const std::vector<std::string> problems = Problems();
  ASSERT_THAT(problems, SizeIs(1001));
  // Two MoE layers lack 1000 experts of three weights each, and their routers have other shapes.
  EXPECT_EQ(problems.back(), "... and 5004 more problems");
}

// ---- Load.

std::string Made(const WeightPtr& weight) {
  return weight == nullptr ? "nothing" : static_cast<const FakeWeight*>(weight.get())->made;
}

TEST_F(WeightsTest, LoadsEveryTensorOnce) {
  WriteModel(dir_, json_, tensors_);
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  FakeOps ops(**checkpoint);
  const auto weights =
      ModelWeights::Load(ParseConfig(json_), **checkpoint, AllExperts(ParseConfig(json_)), /*with_mtp=*/false, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  std::set<std::string> expected;
  for (const auto& [name, tensor] : tensors_) {
    if (name.rfind("model.layers.2.", 0) != 0) expected.insert(name);  // MTP is not loaded
  }
  EXPECT_EQ(ops.used, expected);
  EXPECT_TRUE(weights->converted.empty());

  EXPECT_EQ(Made(weights->embed_tokens), "linear model.embed_tokens.weight");
  EXPECT_EQ(Made(weights->norm), "vector model.norm.weight");
  EXPECT_EQ(Made(weights->lm_head), "linear lm_head.weight");
  ASSERT_THAT(weights->layers, SizeIs(2));
  const LayerWeights& dense = weights->layers[0];
  const std::string attn = "model.layers.0.self_attn.";
  EXPECT_EQ(Made(dense.input_layernorm), "vector model.layers.0.input_layernorm.weight");
  EXPECT_EQ(Made(dense.post_attention_layernorm), "vector model.layers.0.post_attention_layernorm.weight");
  EXPECT_EQ(Made(dense.q_kv_a_proj), "linear " + attn + "q_a_proj.weight*|" + attn + "kv_a_proj_with_mqa.weight*");
  EXPECT_EQ(dense.q_kv_a_proj->rows(), 48 + 128 + 8);
  EXPECT_EQ(Made(dense.q_a_layernorm), "vector " + attn + "q_a_layernorm.weight");
  EXPECT_EQ(Made(dense.q_b_proj), "linear " + attn + "q_b_proj.weight*");
  EXPECT_EQ(Made(dense.kv_a_layernorm), "vector " + attn + "kv_a_layernorm.weight");
  EXPECT_EQ(Made(dense.kv_b_proj), "kv_up " + attn + "kv_b_proj.weight*");
  EXPECT_EQ(dense.kv_b_proj->rows(), 2 * (16 + 16));
  EXPECT_EQ(Made(dense.o_proj), "linear " + attn + "o_proj.weight*");
  EXPECT_EQ(Made(dense.gate_up_proj), "linear model.layers.0.mlp.gate_proj.weight*|model.layers.0.mlp.up_proj.weight*");
  EXPECT_EQ(Made(dense.down_proj), "linear model.layers.0.mlp.down_proj.weight*");
  EXPECT_EQ(Made(dense.gate), "nothing");
  EXPECT_EQ(Made(dense.experts_down_proj), "nothing");

  const LayerWeights& moe = weights->layers[1];
  const std::string mlp = kMoe;
  EXPECT_EQ(Made(moe.gate), "linear " + mlp + "gate.weight");
  EXPECT_EQ(Made(moe.e_score_correction_bias), "vector " + mlp + "gate.e_score_correction_bias");
  EXPECT_EQ(Made(moe.gate_up_proj),
            "linear " + mlp + "shared_experts.gate_proj.weight*|" + mlp + "shared_experts.up_proj.weight*");
  EXPECT_EQ(moe.gate_up_proj->rows(), 2 * 2 * 32);
  EXPECT_EQ(Made(moe.down_proj), "linear " + mlp + "shared_experts.down_proj.weight*");
}

// Its embedding and head are the main model's, whether or not the checkpoint has copies.
TEST_F(WeightsTest, LoadsTheMtpLayerButNoCopies) {
  for (bool has_copies : {true, false}) {
    if (!has_copies) {
      tensors_.erase("model.layers.2.embed_tokens.weight");
      tensors_.erase("model.layers.2.shared_head.head.weight");
    }
    WriteModel(dir_, json_, tensors_);
    const auto checkpoint = Checkpoint::Open(dir_.path());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_TRUE(ModelWeights::HasMtp(ParseConfig(json_), **checkpoint));
    FakeOps ops(**checkpoint);
    const auto weights =
        ModelWeights::Load(ParseConfig(json_), **checkpoint, AllExperts(ParseConfig(json_)), /*with_mtp=*/true, ops);
    ASSERT_TRUE(weights.ok()) << weights.status();
    std::set<std::string> expected;
    for (const auto& [name, tensor] : tensors_) expected.insert(name);
    expected.erase("model.layers.2.embed_tokens.weight");
    expected.erase("model.layers.2.shared_head.head.weight");
    EXPECT_EQ(ops.used, expected);
    ASSERT_NE(weights->mtp, nullptr);
    const MtpWeights& mtp = *weights->mtp;
    EXPECT_EQ(Made(mtp.enorm), "vector model.layers.2.enorm.weight");
    EXPECT_EQ(Made(mtp.hnorm), "vector model.layers.2.hnorm.weight");
    EXPECT_EQ(Made(mtp.eh_proj), "linear model.layers.2.eh_proj.weight");
    EXPECT_EQ(mtp.eh_proj->cols(), 2 * mtp.eh_proj->rows());
    EXPECT_EQ(Made(mtp.shared_head_norm), "vector model.layers.2.shared_head.norm.weight");
    EXPECT_EQ(Made(mtp.layer.o_proj), "linear model.layers.2.self_attn.o_proj.weight*");
    EXPECT_EQ(Made(mtp.layer.gate), "linear model.layers.2.mlp.gate.weight");
  }
}

TEST_F(WeightsTest, LoadsItsShareOfTheExperts) {
  WriteModel(dir_, json_, tensors_);
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  FakeOps ops(**checkpoint);
  RankExperts experts;
  experts.held = {{0, 0}, {3, 1}, {1, 2}};  // of a dense layer, then of one with experts and of the MTP layer
  const auto weights = ModelWeights::Load(ParseConfig(json_), **checkpoint, experts, /*with_mtp=*/true, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const std::string first = std::string(kMoe) + "experts.3.", second = std::string(kMoe) + "experts.1.";
  EXPECT_EQ(Made(weights->layers[1].experts_gate_up_proj), "experts " + first + "gate_proj.weight*|" + first +
                                                               "up_proj.weight* " + second + "gate_proj.weight*|" +
                                                               second + "up_proj.weight*");
  EXPECT_EQ(weights->layers[1].experts_gate_up_proj->rows(), 64);
  EXPECT_EQ(Made(weights->layers[1].experts_down_proj),
            "experts " + first + "down_proj.weight* " + second + "down_proj.weight*");
  EXPECT_FALSE(ops.used.contains(std::string(kMoe) + "experts.0.down_proj.weight"));
  const std::string mtp = "model.layers.2.mlp.experts.";
  EXPECT_EQ(Made(weights->mtp->layer.experts_down_proj),
            "experts " + mtp + "1.down_proj.weight* " + mtp + "2.down_proj.weight*");
}

TEST_F(WeightsTest, LoadsV2Lite) {
  json_.update({{"q_lora_rank", nullptr},
                {"n_shared_experts", 0},
                {"scoring_func", "softmax"},
                {"topk_method", "greedy"},
                {"norm_topk_prob", false},
                {"num_nextn_predict_layers", 0},
                {"quantization_config", nullptr}});
  tensors_ = TinyTensors(ParseConfig(json_));
  WriteModel(dir_, json_, tensors_);
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  FakeOps ops(**checkpoint);
  const auto weights =
      ModelWeights::Load(ParseConfig(json_), **checkpoint, AllExperts(ParseConfig(json_)), /*with_mtp=*/false, ops);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(ops.used.size(), tensors_.size());
  const LayerWeights& layer = weights->layers[1];
  EXPECT_EQ(Made(layer.q_kv_a_proj),
            "linear model.layers.1.self_attn.q_proj.weight|model.layers.1.self_attn.kv_a_proj_with_mqa.weight");
  EXPECT_EQ(layer.q_kv_a_proj->rows(), 2 * (16 + 8) + 128 + 8);
  for (const WeightPtr* absent :
       {&layer.q_a_layernorm, &layer.q_b_proj, &layer.gate_up_proj, &layer.down_proj, &layer.e_score_correction_bias}) {
    EXPECT_EQ(*absent, nullptr);
  }
}

TEST_F(WeightsTest, KeepsTheBiasInF32) {
  const uint16_t bf16 = 0xc020, f16 = 0x3555, tiny_f16 = 0x8001;
  const double f64 = 2.0200000001;
  auto bytes = [](auto value) { return std::string(reinterpret_cast<const char*>(&value), sizeof value); };
  for (const auto& [dtype, one, expected] :
       {std::tuple("BF16", bytes(bf16), -2.5f), std::tuple("F16", bytes(f16), 0.333251953125f),
        std::tuple("F16", bytes(tiny_f16), -0x1p-24f), std::tuple("F64", bytes(f64), 2.02f),
        std::tuple("F32", bytes(-1.5f), -1.5f)}) {
    tensors_["model.layers.1.mlp.gate.e_score_correction_bias"] = {dtype, {4}, one + one + one + one};
    WriteModel(dir_, json_, tensors_);
    const auto checkpoint = Checkpoint::Open(dir_.path());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    FakeOps ops(**checkpoint);
    const auto weights =
        ModelWeights::Load(ParseConfig(json_), **checkpoint, AllExperts(ParseConfig(json_)), /*with_mtp=*/false, ops);
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(weights->converted.size(), dtype == std::string("F32") ? 0u : 1u);
    int num_biases = 0;
    for (const FakeOps::Vector& vector : ops.vectors) {
      if (vector.source.dtype != DType::kF32) continue;
      EXPECT_EQ(vector.first, expected) << dtype;
      EXPECT_EQ(vector.source.ToString(), "f32[4]");
      EXPECT_TRUE(weights->converted.empty() || vector.source.data == weights->converted[0].data());
      ++num_biases;
    }
    EXPECT_EQ(num_biases, 1) << dtype;
  }
}

TEST_F(WeightsTest, LoadRefusesWhatProblemsFinds) {
  tensors_.erase("model.norm.weight");
  tensors_.erase("lm_head.weight");
  WriteModel(dir_, json_, tensors_);
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  FakeOps ops(**checkpoint);
  const auto weights =
      ModelWeights::Load(ParseConfig(json_), **checkpoint, AllExperts(ParseConfig(json_)), /*with_mtp=*/false, ops);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(weights.status().message(),
            dir_.path() + ": model.norm.weight: found nothing, expected [64] (and 1 more problems)");
  EXPECT_TRUE(ops.used.empty());
}

// Every golden checkpoint loads.
TEST(GoldenCheckpointsTest, HaveNoProblems) {
  const std::filesystem::path data = std::filesystem::path(CACHALOT_TEST_DATA_DIR) / "golden" / "data";
  if (!std::filesystem::exists(data)) GTEST_SKIP() << data << " is not there";
  int num_models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(data)) {
    if (!std::filesystem::exists(entry.path() / "config.json")) continue;
    const auto config = ModelConfig::Load(entry.path().string());
    ASSERT_TRUE(config.ok()) << config.status();
    const auto checkpoint = Checkpoint::Open(entry.path().string());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_THAT(ModelWeights::Problems(*config, **checkpoint, /*deep=*/true), IsEmpty()) << entry.path();
    FakeOps ops(**checkpoint);
    const bool has_mtp = ModelWeights::HasMtp(*config, **checkpoint);
    EXPECT_EQ(has_mtp, config->num_nextn_predict_layers > 0);
    EXPECT_TRUE(ModelWeights::Load(*config, **checkpoint, AllExperts(*config), has_mtp, ops).ok()) << entry.path();
    EXPECT_TRUE((*checkpoint)->unindexed().empty()) << entry.path();
    ++num_models;
  }
  EXPECT_GT(num_models, 0);
}

}  // namespace
}  // namespace cachalot
