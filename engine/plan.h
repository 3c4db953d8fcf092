// Plan: what a model would take of so many GPUs, and how fast they could be; for people and for tests.
#ifndef CACHALOT_ENGINE_PLAN_H_
#define CACHALOT_ENGINE_PLAN_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine/options.h"

namespace cachalot {

struct PlanOptions {
  EngineOptions engine;    // model_dir may hold a config.json alone; num_ranks is not used
  int num_gpus = 0;        // a rank each
  int64_t gpu_memory = 0;  // bytes of each, as its name says
  int context = 4096;      // tokens of each sequence of the expected step
  bool has_table = false;  // of other numbers of GPUs
};

// Of one rank. Bytes are the backend's own count, by a dry run of what it does at start.
struct RankPlan {
  int expert_slots = 0;       // of an MoE layer
  int redundant_experts = 0;  // slots of all ranks beyond the experts
  int64_t free = 0, weights = 0, workspace = 0, activations = 0, state = 0, reserve = 0, cache = 0;
  int64_t cache_tokens = 0;
  int max_batch_tokens = 0;
  // One decode step of as many sequences of `context` tokens as the cache holds, at most max_sequences.
  int num_sequences = 0;
  double roofline_seconds = 0;
};

// ResourceExhausted where it does not fit; InvalidArgument for a model that is not of the family, and for more GPUs
// than there may be; NotFound where libcachalot_cuda.so is not there, which counts.
absl::StatusOr<RankPlan> PlanRank(const PlanOptions& options, int num_gpus);

// The report that `cachalot plan` prints. ResourceExhausted where it does not fit: a line that says how many GPUs would
// do.
absl::StatusOr<std::string> Plan(const PlanOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_PLAN_H_
