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
  RankExperts experts;
};

// f32, bf16 or fp8, empty for the device's own choice; InvalidArgument for others.
absl::StatusOr<KvDType> ParseKvDType(const std::string& name, bool on_cpu);
// Rows of a step where EngineOptions asks for none.
int DefaultBatchTokens(bool on_gpu, int num_ranks);
// Of one of so many ranks; where they do not divide the experts, some are there twice. `options` with max_batch_tokens.
OpLimits MakeLimits(const ModelConfig& config, const EngineOptions& options, int num_ranks);

// The cache, given what is left for it. `left` < 0: the rest alone does not fit. InvalidArgument or ResourceExhausted,
// naming the option to change. `limits.max_context` is not used.
absl::StatusOr<MemoryPlan> PlanCache(const ModelConfig& config, const EngineOptions& options, const KvOptions& kv,
                                     int64_t left, double default_share);

// The whole: PlanCache of what a backend's free memory leaves.
absl::StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config, const Checkpoint& checkpoint,
                                      const EngineOptions& options, const MemoryDemand& demand, Backend& backend);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MEMORY_PLAN_H_
