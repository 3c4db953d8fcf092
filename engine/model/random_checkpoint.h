// The checkpoint of a model that only its config is known of: the tensors' types and shapes, and no data.
#ifndef CACHALOT_ENGINE_MODEL_RANDOM_CHECKPOINT_H_
#define CACHALOT_ENGINE_MODEL_RANDOM_CHECKPOINT_H_

#include <memory>

#include "engine/model/config.h"
#include "engine/model/safetensors.h"

namespace cachalot {

// Every tensor that the model and its MTP layers need, stored as DeepSeek-V3's are. A backend makes up the values of
// weights without data (kernels/ops.h).
std::unique_ptr<Checkpoint> MakeRandomCheckpoint(const ModelConfig& config);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_RANDOM_CHECKPOINT_H_
