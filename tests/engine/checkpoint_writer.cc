// Writing what the loader reads.
#include "tests/engine/checkpoint_writer.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "engine/model/tensor_table.h"
#include "kernels/check.h"

namespace cachalot {

TempDir::TempDir() {
  std::string pattern = (std::filesystem::temp_directory_path() / "cachalot_test_XXXXXX").string();
  CHECK(mkdtemp(pattern.data()) != nullptr, "{}", pattern);
  path_ = pattern;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void WriteFile(const std::string& path, const std::string& bytes) {
  std::filesystem::remove(path);  // NOTE: ext4 flushes a file that is written over
  std::ofstream file(path, std::ios::binary);
  file << bytes;
  file.close();
  CHECK(file.good(), "{}", path);
}

std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + header + data;
}

std::string SafetensorsBytes(const StoredTensors& tensors) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    header[name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  return SafetensorsBytes(header.dump(), data);
}

nlohmann::json TinyConfig() {
  return nlohmann::json::parse(R"({
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 48, "kv_lora_rank": 128,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "attention_bias": false,
    "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 2.5,
    "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 10000, "rope_scaling": null,
    "max_position_embeddings": 4096, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]}
  })");
}

ModelConfig ParseConfig(const nlohmann::json& json) {
  absl::StatusOr<ModelConfig> config = ModelConfig::Parse(json.dump(), "config.json");
  CHECK(config.ok(), "{}", std::string(config.status().message()));
  return *config;
}

StoredTensors TinyTensors(const ModelConfig& config) {
  StoredTensors tensors;
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    StoredTensor tensor = {"BF16", expected.shape, std::string(expected.num_elements() * 2, '\x3f')};
    if (expected.use == TensorUse::kBias)
      tensor = {"F32", expected.shape, std::string(expected.num_elements() * 4, '\0')};
    if (expected.use == TensorUse::kLinear && config.is_fp8) {
      tensor = {"F8_E4M3", expected.shape, std::string(expected.num_elements(), '\x38')};
      const std::vector<int64_t> shape = ScaleShape(expected.shape);
      StoredTensor scales = {"F32", shape, std::string(shape[0] * shape[1] * 4, '\0')};
      for (int64_t i = 0; i < shape[0] * shape[1]; ++i) SetFloat(&scales, i, 0.5f + static_cast<float>(i));
      tensors[expected.name + kScaleSuffix] = scales;
    }
    tensors[expected.name] = tensor;
  }
  return tensors;
}

void WriteModel(const TempDir& dir, const nlohmann::json& config, const StoredTensors& tensors) {
  WriteFile(dir / "config.json", config.dump());
  WriteFile(dir / "model.safetensors", SafetensorsBytes(tensors));
}

void SetFloat(StoredTensor* tensor, int64_t i, float value) {
  std::memcpy(tensor->bytes.data() + i * sizeof value, &value, sizeof value);
}

}  // namespace cachalot
