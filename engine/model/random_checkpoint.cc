// From the table of expected tensors to a checkpoint without files.
#include "engine/model/random_checkpoint.h"

#include <utility>

#include "engine/model/tensor_table.h"

namespace cachalot {

std::unique_ptr<Checkpoint> MakeRandomCheckpoint(const ModelConfig& config) {
  absl::flat_hash_map<std::string, CheckpointTensor> tensors;
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    if (expected.is_optional) continue;
    CheckpointTensor tensor;
    tensor.dtype = expected.use == TensorUse::kBias ? "F32" : "BF16";
    tensor.shape = expected.shape;
    if (config.is_fp8 && expected.use == TensorUse::kLinear) {
      tensor.dtype = "F8_E4M3";
      CheckpointTensor scales;
      scales.dtype = "F32";
      scales.shape = ScaleShape(expected.shape);
      tensors.emplace(expected.name + kScaleSuffix, std::move(scales));
    }
    tensors.emplace(expected.name, std::move(tensor));
  }
  return Checkpoint::WithoutData(std::move(tensors));
}

}  // namespace cachalot
