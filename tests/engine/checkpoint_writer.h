// Small checkpoints for tests, written to a directory that goes away.
#ifndef CACHALOT_TESTS_ENGINE_CHECKPOINT_WRITER_H_
#define CACHALOT_TESTS_ENGINE_CHECKPOINT_WRITER_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/model/config.h"

namespace cachalot {

class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

void WriteFile(const std::string& path, const std::string& bytes);

struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using StoredTensors = std::map<std::string, StoredTensor>;

// The bytes of a safetensors file: any header, right or wrong, before any data.
std::string SafetensorsBytes(const std::string& header, const std::string& data);
std::string SafetensorsBytes(const StoredTensors& tensors);

// V3 in small: FP8, groups, one dense and one MoE layer, one MTP layer.
nlohmann::json TinyConfig();
ModelConfig ParseConfig(const nlohmann::json& json);

// Every tensor of the model: linear weights F8_E4M3 with scales (BF16 without quantization), the rest BF16, biases F32.
StoredTensors TinyTensors(const ModelConfig& config);

// config.json and model.safetensors.
void WriteModel(const TempDir& dir, const nlohmann::json& config, const StoredTensors& tensors);

// One float at element `i` of an F32 tensor.
void SetFloat(StoredTensor* tensor, int64_t i, float value);

}  // namespace cachalot

#endif  // CACHALOT_TESTS_ENGINE_CHECKPOINT_WRITER_H_
