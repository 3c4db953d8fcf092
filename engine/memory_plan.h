// MemoryPlan: what of the device's memory goes where, settled before anything large is allocated.
#ifndef CACHALOT_ENGINE_MEMORY_PLAN_H_
#define CACHALOT_ENGINE_MEMORY_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/kv_store.h"
#include "engine/model/safetensors.h"
#include "engine/model/weights.h"
#include "engine/options.h"
#include "kernels/backend.h"

namespace cachalot {

// Bytes. On the CPU only the cache is planned: weights are mapped files, and memory is touched when it is used.
struct MemoryPlan {
  int64_t free = 0;  // before anything is allocated
  int64_t weights = 0, activations = 0, state = 0, workspace = 0, reserve = 0, cache = 0;
  int64_t block_bytes = 0;  // of all layers
  int num_blocks = 0;
  int max_model_len = 0;  // of one sequence

  std::string ToString() const;  // a line for the log
};

// What the plan depends on, besides the options.
struct MemoryDemand {
  OpLimits limits;
  KvOptions kv;
  ActivationFormat format = ActivationFormat::kF32;
  ExpertList experts;
};

// The cache, given what is left for it. `left` < 0: the rest alone does not fit. InvalidArgument or ResourceExhausted,
// naming the option to change. `limits.max_context` is not used.
absl::StatusOr<MemoryPlan> PlanCache(const ModelConfig& config, const EngineOptions& options, const KvOptions& kv,
                                     int64_t left, double default_share);

// The whole: PlanCache of what a backend's free memory leaves.
absl::StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config, const Checkpoint& checkpoint,
                                      const EngineOptions& options, const MemoryDemand& demand, Backend& backend);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MEMORY_PLAN_H_
