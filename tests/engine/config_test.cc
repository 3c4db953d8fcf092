// config.json: every spelling, every refusal, and the numbers derived from it.
#include "engine/model/config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/engine/checkpoint_writer.h"

namespace cachalot {
namespace {

using Json = nlohmann::json;

// Published field sets.
constexpr const char* kV3 = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001, "bos_token_id": 0,
  "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
  "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
  "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
  "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
  "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
})";

constexpr const char* kV2Lite = R"({
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
  "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
  "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
  "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
  "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40,
    "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
  "use_cache": true, "v_head_dim": 128, "vocab_size": 102400
})";

constexpr const char* kMoonlight = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "bos_token_id": 163584,
  "eos_token_id": 163586, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
  "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3",
  "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
  "norm_topk_prob": true, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
  "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": null, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 50000.0,
  "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "tie_word_embeddings": false, "topk_group": 1,
  "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 163840
})";

constexpr const char* kKimiK2 = R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "bos_token_id": 163584,
  "eos_token_id": 163585, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168,
  "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2",
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61,
  "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
    "quant_method": "fp8", "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "tie_word_embeddings": false,
  "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 163840
})";

// `base` with fields replaced; "DELETE" removes one (a merge patch cannot set null).
Json Patched(const char* base, const char* patch) {
  Json config = Json::parse(base);
  const Json changes = Json::parse(patch);
  for (const auto& [name, value] : changes.items()) {
    if (value == "DELETE") {
      config.erase(name);
    } else {
      config[name] = value;
    }
  }
  return config;
}
ModelConfig V3With(const char* patch) { return ParseConfig(Patched(kV3, patch)); }

TEST(ConfigTest, V3) {
  const ModelConfig c = ParseConfig(Json::parse(kV3));
  EXPECT_EQ(c.model_type, "deepseek_v3");
  EXPECT_EQ(c.vocab_size, 129280);
  EXPECT_EQ(c.hidden_size, 7168);
  EXPECT_EQ(c.intermediate_size, 18432);
  EXPECT_EQ(c.moe_intermediate_size, 2048);
  EXPECT_EQ(c.num_hidden_layers, 61);
  EXPECT_EQ(c.first_k_dense_replace, 3);
  EXPECT_EQ(c.num_nextn_predict_layers, 1);
  EXPECT_EQ(c.num_attention_heads, 128);
  EXPECT_EQ(c.q_lora_rank, 1536);
  EXPECT_EQ(c.kv_lora_rank, 512);
  EXPECT_EQ(c.qk_nope_head_dim, 128);
  EXPECT_EQ(c.qk_rope_head_dim, 64);
  EXPECT_EQ(c.v_head_dim, 128);
  EXPECT_EQ(c.n_routed_experts, 256);
  EXPECT_EQ(c.n_shared_experts, 1);
  EXPECT_EQ(c.num_experts_per_tok, 8);
  EXPECT_EQ(c.max_position_embeddings, 163840);
  EXPECT_EQ(c.rms_norm_eps, 1e-6);
  EXPECT_EQ(c.rope_theta, 10000.0);
  EXPECT_TRUE(c.rope_scaling.is_yarn);
  EXPECT_EQ(c.rope_scaling.factor, 40.0);
  EXPECT_EQ(c.rope_scaling.original_max_position_embeddings, 4096);
  EXPECT_TRUE(c.is_fp8);
  EXPECT_EQ(c.scale_rule, ScaleRule::kFP32);
  EXPECT_EQ(c.bos_token_id, 0);
  EXPECT_EQ(c.eos_token_ids, std::vector<int>{1});
  EXPECT_FALSE(c.is_moe_layer(2));
  EXPECT_TRUE(c.is_moe_layer(3));
  EXPECT_TRUE(c.has_correction_bias());

  const RouterOptions router = c.router_options();
  EXPECT_EQ(router.scoring, RouterOptions::Scoring::kSigmoid);
  EXPECT_EQ(router.group_score, RouterOptions::GroupScore::kTop2Sum);
  EXPECT_EQ(router.n_group, 8);
  EXPECT_EQ(router.topk_group, 4);
  EXPECT_TRUE(router.norm_topk_prob);
  EXPECT_EQ(router.routed_scaling_factor, 2.5f);
}

TEST(ConfigTest, V2Lite) {
  const ModelConfig c = ParseConfig(Json::parse(kV2Lite));
  EXPECT_EQ(c.q_lora_rank, 0);
  EXPECT_EQ(c.num_nextn_predict_layers, 0);
  EXPECT_FALSE(c.has_correction_bias());
  EXPECT_FALSE(c.is_fp8);
  const RouterOptions router = c.router_options();
  EXPECT_EQ(router.scoring, RouterOptions::Scoring::kSoftmax);
  EXPECT_EQ(router.group_score, RouterOptions::GroupScore::kMax);
  EXPECT_EQ(router.n_group, 1);
  EXPECT_FALSE(router.norm_topk_prob);
}

TEST(ConfigTest, V2UsesGroupsOnlyWhereTheMethodDoes) {
  const char* groups = R"({"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
                           "q_lora_rank": 1536, "topk_method": "group_limited_greedy"})";
  ModelConfig c = ParseConfig(Patched(kV2Lite, groups));
  EXPECT_EQ(c.router_options().n_group, 8);
  EXPECT_EQ(c.router_options().topk_group, 3);
  EXPECT_EQ(c.router_options().group_score, RouterOptions::GroupScore::kMax);
  c.topk_method = "greedy";
  EXPECT_EQ(c.router_options().n_group, 1);
  EXPECT_EQ(c.router_options().topk_group, 1);
}

TEST(ConfigTest, Moonlight) {
  const ModelConfig c = ParseConfig(Json::parse(kMoonlight));
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.rope_theta, 50000.0);
  EXPECT_FALSE(c.rope_scaling.is_yarn);
  EXPECT_TRUE(c.has_correction_bias());
  EXPECT_EQ(c.router_options().n_group, 1);
}

// Values of the specification, 3.3.
TEST(ConfigTest, SoftmaxScale) {
  EXPECT_NEAR(ParseConfig(Json::parse(kV3)).softmax_scale(), 0.1352337788608801, 1e-8);
  EXPECT_NEAR(ParseConfig(Json::parse(kV2Lite)).softmax_scale(), 0.11472138679292611, 1e-8);
  EXPECT_NEAR(ParseConfig(Json::parse(kKimiK2)).softmax_scale(), 0.13086079996295005, 1e-8);
  EXPECT_NEAR(ParseConfig(Json::parse(kMoonlight)).softmax_scale(), 0.07216878364870322, 1e-8);
  EXPECT_NEAR(V3With(R"({"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                                          "mscale_all_dim": 0}})")
                  .softmax_scale(),
              0.07216878364870322, 1e-8);
}

TEST(ConfigTest, V31ScaleFormatInEitherPlace) {
  EXPECT_EQ(V3With(R"({"scale_fmt": "ue8m0"})").scale_rule, ScaleRule::kUE8M0);
  const ModelConfig c = V3With(R"({"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
      "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}})");
  EXPECT_EQ(c.scale_rule, ScaleRule::kUE8M0);
}

TEST(ConfigTest, RopeSpellings) {
  for (const char* patch : {
           R"({"rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64}})",
           R"({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}})",
           R"({"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 8,
               "original_max_position_embeddings": 64.0}})",
           R"({"rope_scaling": "DELETE", "rope_theta": "DELETE", "rope_parameters": {"rope_theta": 10000.0,
               "rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64}})",
           R"({"rope_scaling": {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64},
               "rope_parameters": {"rope_theta": 10000, "rope_type": "yarn", "factor": 8,
               "original_max_position_embeddings": 64}})",
       }) {
    const ModelConfig c = V3With(patch);
    EXPECT_TRUE(c.rope_scaling.is_yarn) << patch;
    EXPECT_EQ(c.rope_scaling.factor, 8.0) << patch;
    EXPECT_EQ(c.rope_scaling.original_max_position_embeddings, 64) << patch;
    EXPECT_EQ(c.rope_scaling.beta_fast, 32.0) << patch;
    EXPECT_EQ(c.rope_scaling.beta_slow, 1.0) << patch;
    EXPECT_EQ(c.rope_scaling.mscale_all_dim, 0.0) << patch;
    EXPECT_EQ(c.rope_theta, 10000.0) << patch;
  }
  for (const char* patch :
       {R"({"rope_scaling": "DELETE"})", R"({"rope_scaling": null})", R"({"rope_scaling": {"rope_type": "default"}})",
        R"({"rope_scaling": null, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                                "rope_theta": null})"}) {
    EXPECT_FALSE(V3With(patch).rope_scaling.is_yarn) << patch;
    EXPECT_EQ(V3With(patch).rope_theta, 10000.0) << patch;
  }
}

TEST(ConfigTest, OtherSpellings) {
  EXPECT_EQ(V3With(R"({"eos_token_id": [1, 7]})").eos_token_ids, (std::vector<int>{1, 7}));
  EXPECT_TRUE(V3With(R"({"eos_token_id": null, "bos_token_id": null})").eos_token_ids.empty());
  EXPECT_EQ(V3With(R"({"hidden_size": 7168.0, "dtype": "bfloat16", "torch_dtype": "DELETE"})").hidden_size, 7168);
  EXPECT_EQ(V3With(R"({"head_dim": 64, "qk_head_dim": 192, "rope_interleave": true})").qk_head_dim(), 192);
  EXPECT_EQ(V3With(R"({"q_lora_rank": "DELETE"})").q_lora_rank, 0);
  EXPECT_EQ(V3With(R"({"num_nextn_predict_layers": "DELETE"})").num_nextn_predict_layers, 0);
  EXPECT_EQ(V3With(R"({"n_group": null, "topk_group": null})").router_options().n_group, 1);
  EXPECT_EQ(V3With(R"({"scoring_func": "DELETE", "topk_method": "DELETE"})").topk_method, "noaux_tc");
  EXPECT_EQ(ParseConfig(Patched(kV2Lite, R"({"scoring_func": "DELETE"})")).scoring_func, "softmax");
  EXPECT_EQ(V3With(R"({"n_shared_experts": null})").n_shared_experts, 0);
  EXPECT_FALSE(V3With(R"({"n_routed_experts": null})").is_moe_layer(60));
  EXPECT_FALSE(V3With(R"({"first_k_dense_replace": 99})").is_moe_layer(60));
}

struct Refusal {
  const char* patch;
  absl::StatusCode code;
  const char* message;  // a part of it
};
constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

// Patches of V3, and why each is refused.
constexpr Refusal kRefusals[] = {
    {R"({"model_type": "deepseek_v32"})", kUnimplemented,
     "model_type: found \"deepseek_v32\", expected a model without"},
    {R"({"index_topk": 2048})", kUnimplemented, "sparse attention"},
    {R"({"model_type": "llama"})", kUnimplemented, "model_type: found \"llama\", expected deepseek_v3"},
    {R"({"model_type": "DELETE"})", kInvalid, "model_type: found nothing, expected a string"},
    {R"({"scoring_func": "relu"})", kUnimplemented, "scoring_func"},
    {R"({"topk_method": "greedy"})", kUnimplemented, "topk_method: found \"greedy\", expected noaux_tc"},
    {R"({"scoring_func": "softmax"})", kUnimplemented, "topk_method: found \"noaux_tc\", expected greedy"},
    {R"({"scoring_func": "softmax", "topk_method": "greedy"})", kUnimplemented, "norm_topk_prob: found true"},
    {R"({"rope_interleave": false})", kUnimplemented, "rope_interleave"},
    {R"({"attention_bias": true})", kUnimplemented, "attention_bias"},
    {R"({"tie_word_embeddings": true})", kUnimplemented, "tie_word_embeddings"},
    {R"({"hidden_act": "gelu"})", kUnimplemented, "hidden_act: found \"gelu\", expected silu"},
    {R"({"moe_layer_freq": 2})", kUnimplemented, "moe_layer_freq"},
    {R"({"quantization_config": {"quant_method": "awq", "bits": 4}})", kUnimplemented,
     "quantization_config.quant_method: found \"awq\", expected fp8"},
    {R"({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}})",
     kUnimplemented, "quantization_config.fmt"},
    {R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 128]}})", kUnimplemented,
     "quantization_config.weight_block_size: found [64,128], expected [128, 128]"},
    {R"({"quantization_config": {"quant_method": "fp8"}})", kUnimplemented, "weight_block_size: found nothing"},
    {R"({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static",
          "weight_block_size": [128, 128]}})",
     kUnimplemented, "activation_scheme"},
    {R"({"quantization_config": "fp8"})", kInvalid, "quantization_config: found \"fp8\", expected an object"},
    {R"({"scale_fmt": "e5m3"})", kUnimplemented, "scale_fmt"},
    {R"({"rope_scaling": {"type": "linear", "factor": 2}})", kUnimplemented, "rope_scaling.type: found \"linear\""},
    {R"({"rope_scaling": {"factor": 2}})", kInvalid, "rope_scaling.rope_type: found nothing"},
    {R"({"rope_scaling": {"type": "yarn", "rope_type": "linear"}})", kInvalid, "rope_scaling.rope_type"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 40}})", kInvalid,
     "rope_scaling.original_max_position_embeddings: found nothing"},
    {R"({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}})", kInvalid,
     "rope_scaling.factor: found nothing"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "beta_fast": 1,
          "beta_slow": 2}})",
     kInvalid, "rope_scaling.beta_slow: found 2, expected at most beta_fast = 1"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64,
          "attention_factor": 1.3}})",
     kUnimplemented, "rope_scaling.attention_factor"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64,
          "truncate": false}})",
     kUnimplemented, "rope_scaling.truncate"},
    {R"({"rope_scaling": 3})", kInvalid, "rope_scaling: found 3, expected an object"},
    {R"({"rope_parameters": {"rope_type": "default"}})", kInvalid, "rope_parameters: found"},
    {R"({"rope_scaling": null, "rope_parameters": {"rope_type": "default", "rope_theta": 5}})", kInvalid,
     "rope_parameters.rope_theta: found 5"},
    {R"({"rope_theta": "DELETE"})", kInvalid, "rope_theta: found nothing"},
    {R"({"hidden_size": "7168"})", kInvalid, "hidden_size: found \"7168\", expected an integer"},
    {R"({"hidden_size": 7168.5})", kInvalid, "hidden_size: found 7168.5, expected an integer"},
    {R"({"hidden_size": 0})", kInvalid, "hidden_size: found 0"},
    {R"({"hidden_size": -7168})", kInvalid, "hidden_size"},
    {R"({"hidden_size": 16777217})", kInvalid, "hidden_size"},
    {R"({"hidden_size": true})", kInvalid, "hidden_size: found true"},
    {R"({"vocab_size": 18446744073709551615})", kInvalid, "vocab_size"},
    {R"({"num_hidden_layers": 1e300})", kInvalid, "num_hidden_layers"},
    {R"({"num_attention_heads": 16777216})", kInvalid, "num_attention_heads"},
    {R"({"qk_rope_head_dim": 63})", kInvalid, "qk_rope_head_dim: found 63, expected an even number"},
    {R"({"qk_head_dim": 128})", kInvalid, "qk_head_dim: found 128"},
    {R"({"q_lora_rank": 0})", kInvalid, "q_lora_rank"},
    {R"({"topk_group": 9})", kInvalid, "topk_group: found 9, expected at most n_group = 8"},
    {R"({"n_group": 7, "topk_group": 1})", kInvalid, "n_routed_experts: found 256, expected a multiple of n_group = 7"},
    {R"({"n_group": 256, "topk_group": 8})", kInvalid, "n_group: found 256, expected groups of at least two"},
    {R"({"n_group": 128, "topk_group": 3})", kInvalid, "num_experts_per_tok: found 8, expected at most the 6"},
    {R"({"num_experts_per_tok": 33})", kInvalid, "num_experts_per_tok"},
    {R"({"num_experts_per_tok": 0})", kInvalid, "num_experts_per_tok"},
    {R"({"n_routed_experts": 16384, "n_group": 1, "topk_group": 1})", kInvalid, "experts in all layers"},
    {R"({"norm_topk_prob": 1})", kInvalid, "norm_topk_prob: found 1, expected true or false"},
    {R"({"eos_token_id": 129280})", kInvalid, "eos_token_id: found 129280"},
    {R"({"eos_token_id": [1, "2"]})", kInvalid, "eos_token_id: found \"2\""},
    {R"({"bos_token_id": -1})", kInvalid, "bos_token_id"},
};

TEST(ConfigTest, Refusals) {
  for (const Refusal& refusal : kRefusals) {
    const auto config = ModelConfig::Parse(Patched(kV3, refusal.patch).dump(), "config.json");
    ASSERT_FALSE(config.ok()) << refusal.patch;
    const std::string message(config.status().message());
    EXPECT_EQ(config.status().code(), refusal.code) << message;
    EXPECT_NE(message.find(refusal.message), message.npos) << refusal.patch << "\n" << message;
    EXPECT_EQ(message.rfind("config.json: ", 0), 0u) << message;
  }
}

TEST(ConfigTest, NamesEveryMissingField) {
  for (const char* name :
       {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "first_k_dense_replace", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "v_head_dim", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "norm_topk_prob",
        "routed_scaling_factor", "rms_norm_eps", "max_position_embeddings"}) {
    Json json = Json::parse(kV3);
    json.erase(name);
    const auto config = ModelConfig::Parse(json.dump(), "config.json");
    ASSERT_FALSE(config.ok()) << name;
    const std::string expected = std::string("config.json: ") + name + ": found nothing, expected ";
    EXPECT_EQ(std::string(config.status().message()).rfind(expected, 0), 0u) << config.status();
  }
  const auto v2 = ModelConfig::Parse(Patched(kV2Lite, R"({"topk_method": "DELETE"})").dump(), "config.json");
  EXPECT_EQ(v2.status().message(), "config.json: topk_method: found nothing, expected a string");
}

TEST(ConfigTest, TextThatIsNoConfig) {
  const std::string v3 = kV3;
  for (const std::string& text : {std::string(), std::string("[]"), std::string("null"), v3.substr(0, v3.size() - 2),
                                  v3 + "x", std::string("{\"a\": 1e999}"), std::string("{\"model_type\": \"\xff\"}"),
                                  std::string(1'000'000, '['), std::string("{\"vocab_size\": 1, \"vocab_size\": 2}")}) {
    const auto config = ModelConfig::Parse(text, "config.json");
    ASSERT_FALSE(config.ok()) << text.substr(0, 40);
    EXPECT_EQ(config.status().code(), kInvalid);
    EXPECT_EQ(std::string(config.status().message()).rfind("config.json: ", 0), 0u) << config.status();
    EXPECT_EQ(std::string(config.status().message()).find('\n'), std::string::npos) << config.status();
  }
}

// Bytes changed at random: any answer but a crash, and a refusal is one line.
TEST(ConfigTest, SurvivesDamage) {
  const std::string good = Json::parse(kV3).dump();
  std::mt19937 random(1);
  int num_accepted = 0, num_refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text = good;
    for (int changes = 1 + static_cast<int>(random() % 2); changes > 0; --changes) {
      text[random() % text.size()] =
          random() % 2 == 0 ? static_cast<char>(random()) : "0123456789[]{},:\"e-"[random() % 19];
    }
    const auto config = ModelConfig::Parse(text, "config.json");
    ++(config.ok() ? num_accepted : num_refused);
    EXPECT_EQ(std::string(config.status().message()).find('\n'), std::string::npos) << config.status();
  }
  EXPECT_GT(num_accepted, 0);
  EXPECT_GT(num_refused, 0);
}

TEST(ConfigTest, Load) {
  TempDir dir;
  EXPECT_EQ(ModelConfig::Load(dir.path()).status().code(), absl::StatusCode::kNotFound);
  WriteFile(dir / "config.json", kV3);
  ASSERT_TRUE(ModelConfig::Load(dir.path()).ok());
  EXPECT_EQ(ModelConfig::Load(dir.path() + "/")->hidden_size, 7168);
}

// `yarn.inv_freq` of the specification's vectors: V3, in double.
constexpr double kInvFreqV3[32] = {1.0,
                                   0.7498942093324559,
                                   0.5623413251903491,
                                   0.4216965034285823,
                                   0.31622776601683794,
                                   0.23713737056616555,
                                   0.1778279410038923,
                                   0.1333521432163324,
                                   0.1,
                                   0.07498942093324558,
                                   0.056234132519034905,
                                   0.03900692656714386,
                                   0.026879360111431223,
                                   0.018378146218877827,
                                   0.01244795587027246,
                                   0.008334508951020777,
                                   0.0055,
                                   0.0035619974943291656,
                                   0.002249365300761396,
                                   0.0013705136361428923,
                                   0.0007905694150420947,
                                   0.0004149903984907897,
                                   0.0001778279410038922,
                                   3.33380358040831e-05,
                                   2.5e-05,
                                   1.8747355233311396e-05,
                                   1.4058533129758727e-05,
                                   1.0542412585714557e-05,
                                   7.905694150420949e-06,
                                   5.9284342641541385e-06,
                                   4.445698525097307e-06,
                                   3.3338035804083097e-06};

TEST(RopeTableTest, V3) {
  const ModelConfig config = ParseConfig(Json::parse(kV3));
  const std::vector<float> table = MakeRopeTable(config, 163840);
  ASSERT_EQ(table.size(), 163840u * 64);
  for (int position : {0, 1, 7, 4095, 4096, 163839}) {
    for (int i = 0; i < 32; ++i) {
      // NOTE: a last-bit difference of pow() may round an inverse frequency to the neighbouring float.
      const double angle = static_cast<float>(position) * static_cast<float>(kInvFreqV3[i]);
      const double tolerance = 1e-7 + angle * 1.2e-7;
      EXPECT_NEAR(table[position * 64 + i], std::cos(angle), tolerance) << position << " " << i;
      EXPECT_NEAR(table[position * 64 + 32 + i], std::sin(angle), tolerance) << position << " " << i;
    }
  }
}

// `rope_example` of the specification's vectors: x = (1..64)/64 rotated to position 7.
TEST(RopeTableTest, RotatesTheExample) {
  const ModelConfig config = ParseConfig(Json::parse(kV3));
  const std::vector<float> table = MakeRopeTable(config, 8);
  const double expected[10] = {-0.008751108485848022, 0.03382486105320935,  0.07768127653204576, -0.008314740005065407,
                               0.012190270830739189,  -0.12142477268693253, -0.13098519045032,   -0.10213114367171944,
                               -0.2093617656252004,   0.018897201361542035};
  for (int i = 0; i < 5; ++i) {
    const double a = (2 * i + 1) / 64.0, b = (2 * i + 2) / 64.0;
    const double cos = table[7 * 64 + i], sin = table[7 * 64 + 32 + i];
    EXPECT_NEAR(a * cos - b * sin, expected[2 * i], 1e-6);
    EXPECT_NEAR(a * sin + b * cos, expected[2 * i + 1], 1e-6);
  }
}

TEST(RopeTableTest, PlainAndScaled) {
  const std::vector<float> plain = MakeRopeTable(ParseConfig(Json::parse(kMoonlight)), 2);
  for (int i = 0; i < 32; ++i) EXPECT_NEAR(plain[64 + 32 + i], std::sin(std::pow(50000.0, -i / 32.0)), 1e-7);

  // mscale differs from mscale_all_dim: the table carries their ratio.
  const ModelConfig scaled = V3With(R"({"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0,
      "mscale_all_dim": 0.0, "original_max_position_embeddings": 4096}})");
  EXPECT_NEAR(MakeRopeTable(scaled, 1)[0], 1.3688879454113936, 1e-6);
}

TEST(RopeTableTest, RampOfNoWidth) {
  // Both corrections clamp to dimension 0: it stays as it is, all others are divided by the factor.
  const ModelConfig config = V3With(R"({"rope_scaling": {"type": "yarn", "factor": 40,
      "original_max_position_embeddings": 6, "mscale_all_dim": 1}})");
  const std::vector<float> table = MakeRopeTable(config, 2);
  EXPECT_NEAR(table[64 + 32], std::sin(1.0), 1e-6);
  for (int i = 1; i < 32; ++i) EXPECT_NEAR(table[64 + 32 + i], std::sin(std::pow(10000.0, -i / 32.0) / 40), 1e-7);
}

// Kimi-K2: beta_fast = beta_slow = 1, so the ramp is the one dimension between floor and ceil.
TEST(RopeTableTest, KimiK2) {
  const std::vector<float> table = MakeRopeTable(ParseConfig(Json::parse(kKimiK2)), 2);
  const double corr = 64 * std::log(4096 / (2 * M_PI)) / (2 * std::log(50000.0));  // 19.16
  for (int i = 0; i < 32; ++i) {
    const double freq = std::pow(50000.0, -i / 32.0);
    EXPECT_NEAR(table[64 + 32 + i], std::sin(i <= std::floor(corr) ? freq : freq / 32), 1e-7) << i;
  }
}

}  // namespace
}  // namespace cachalot
