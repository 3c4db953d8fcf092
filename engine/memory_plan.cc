// Sizes of everything that is allocated at start, and how long a context the rest allows.
#include "engine/memory_plan.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_format.h"
#include "engine/expert_placement.h"
#include "engine/model/activations.h"
#include "engine/model/runner.h"
#include "engine/step_shapes.h"

namespace cachalot {
namespace {

constexpr double kCpuShare = 0.25, kGpuShare = 0.9;
constexpr int64_t kMiB = int64_t{1} << 20;
// Large allocations of CUDA are multiples of this.
constexpr int64_t kAllocationBytes = 2 * kMiB;
// Kernels' code and the driver's own; the graphs of a step of a thousand kernels; allocations other than weights that
// are rounded up.
constexpr int64_t kCodeReserve = 256 * kMiB, kGraphReserve = 8 * kMiB;
constexpr int kNumOtherAllocations = 64;

// Rows of a prompt whose logits are in memory at the same time, beside those of full decoding.
constexpr int kScoredAtOnce = 64;
// Rows of a step where none are asked for. Measured (tests/bench/results/2026-11-26-cuda-products.md): a GPU reads
// prompts twice as fast 4096 at a time as 512 at a time, and hardly faster 8192 at a time.
constexpr int kBatchTokens = 512, kGpuBatchTokens = 4096;
// Of all ranks together: each has room for all that they may send it.
constexpr int kGroupBatchTokens = 16384, kLeastBatchTokens = 256;

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
std::string Gigabytes(int64_t bytes) { return absl::StrFormat("%.2f GB", bytes * 1e-9); }

}  // namespace

std::string MemoryPlan::ToString() const {
  return absl::StrFormat(
      "GPU memory: %s free; weights %s, workspace %s, activations %s, state %s, graphs and code %s, KV cache %s (%d "
      "tokens)",
      Gigabytes(free), Gigabytes(weights), Gigabytes(workspace), Gigabytes(activations), Gigabytes(state),
      Gigabytes(reserve), Gigabytes(cache), int64_t{num_blocks} * kBlockTokens);
}

absl::StatusOr<KvDType> ParseKvDType(const std::string& name, bool on_cpu) {
  if (name.empty()) return on_cpu ? KvDType::kF32 : KvDType::kBF16;
  if (name == "f32" && !on_cpu) {
    return absl::InvalidArgumentError("kv-cache-dtype: found \"f32\", expected bf16 or fp8 on the GPU");
  }
  if (name == "f32") return KvDType::kF32;
  if (name == "bf16") return KvDType::kBF16;
  if (name == "fp8") return KvDType::kFP8;
  return absl::InvalidArgumentError(absl::StrFormat("kv-cache-dtype: found \"%s\", expected f32, bf16 or fp8", name));
}

int DefaultBatchTokens(bool on_gpu, int num_ranks) {
  if (!on_gpu) return kBatchTokens;
  return std::clamp(kGroupBatchTokens / num_ranks, kLeastBatchTokens, kGpuBatchTokens);
}

OpLimits MakeLimits(const ModelConfig& config, const EngineOptions& options, int num_ranks) {
  OpLimits limits = config.op_limits();
  limits.max_tokens = options.max_batch_tokens;
  limits.max_sequences = options.max_sequences;
  limits.max_drafts = options.speculative_tokens;
  limits.max_rows = options.max_sequences * (1 + limits.max_drafts) + kScoredAtOnce;
  limits.max_context = options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
  limits.max_context += DraftSlack(limits.max_drafts);
  if (num_ranks > 1) {
    limits.num_ranks = num_ranks;
    limits.num_local_experts = ServedPlacement(config, options).slots_per_rank();
  }
  return limits;
}

absl::StatusOr<MemoryPlan> PlanCache(const ModelConfig& config, const EngineOptions& options, const KvOptions& kv,
                                     int64_t left, double default_share) {
  MemoryPlan plan;
  plan.block_bytes = KvStore::BlockBytes(config, kv);
  const int64_t wanted_len = options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
  if (wanted_len > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrFormat("max-model-len: found %d, expected at most the model's %d",
                                                      wanted_len, config.max_position_embeddings));
  }
  const int64_t slack = DraftSlack(options.speculative_tokens);
  int64_t num_blocks = DivideUp(wanted_len + slack, kBlockTokens) * options.max_sequences;
  if (options.kv_cache_bytes > 0) {
    num_blocks = options.kv_cache_bytes / plan.block_bytes;
  } else if (options.kv_cache_share > 0) {
    num_blocks = static_cast<int64_t>(left * options.kv_cache_share) / plan.block_bytes;
  } else {
    num_blocks = std::min(num_blocks, static_cast<int64_t>(left * default_share) / plan.block_bytes);
  }
  num_blocks = std::min<int64_t>(num_blocks, 1 << 24);
  const int64_t max_len = std::min<int64_t>(wanted_len, num_blocks * kBlockTokens - slack);
  if (max_len < 1 || (options.max_model_len > 0 && max_len < options.max_model_len)) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "KV cache: %d tokens fit (%d bytes a token), but one sequence may have %d: raise --kv-cache-memory or lower "
        "--max-model-len",
        std::max<int64_t>(max_len, 0), plan.block_bytes / kBlockTokens, wanted_len));
  }
  plan.num_blocks = static_cast<int>(num_blocks);
  plan.max_model_len = static_cast<int>(max_len);
  plan.cache = num_blocks * plan.block_bytes;
  return plan;
}

absl::StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config, const Checkpoint& checkpoint,
                                      const EngineOptions& options, const MemoryDemand& demand, Backend& backend) {
  const int64_t free = static_cast<int64_t>(backend.device().FreeMemory());
  const bool is_gpu = backend.is_gpu();
  // NOTE: ranks on the CPU share one memory.
  if (!is_gpu) return PlanCache(config, options, demand.kv, free / options.num_ranks, kCpuShare);

  const absl::StatusOr<int64_t> weights =
      ModelWeights::DeviceBytes(config, checkpoint, demand.experts, demand.kv.has_mtp, backend.ops());
  if (!weights.ok()) return weights.status();
  const int64_t activations = ActivationBuffers::Bytes(config, backend.value_dtype(), demand.limits, demand.format);
  const int64_t state = Runner::StateBytes(demand.limits, backend) + DeepSeek::ExpertTableBytes(demand.experts);
  const int64_t num_shapes = std::ssize(StepShapes(demand.limits, backend.device(), options.adapts_drafts).Decode());
  const int64_t reserve = kCodeReserve + kGraphReserve * kMaxStepsInFlight * num_shapes +
                          kAllocationBytes * (kNumOtherAllocations + config.num_hidden_layers + 2);
  const int64_t workspace = static_cast<int64_t>(backend.workspace_bytes());
  const int64_t left = free - *weights - workspace - activations - state - reserve;
  if (left <= 0) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "GPU memory: %s free, but weights need %s, workspace %s, activations %s, state %s, graphs and code %s: lower "
        "--max-batch-tokens, --max-sequences or --max-model-len, or serve a smaller model",
        Gigabytes(free), Gigabytes(*weights), Gigabytes(workspace), Gigabytes(activations), Gigabytes(state),
        Gigabytes(reserve)));
  }
  absl::StatusOr<MemoryPlan> plan = PlanCache(config, options, demand.kv, left, kGpuShare);
  if (!plan.ok()) return plan.status();
  if (plan->cache > left) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "GPU memory: a KV cache of %s is asked for, but the model leaves %s of %s: lower --kv-cache-memory, "
        "--max-batch-tokens or --max-sequences",
        Gigabytes(plan->cache), Gigabytes(left), Gigabytes(free)));
  }
  plan->free = free;
  plan->weights = *weights;
  plan->activations = activations;
  plan->state = state;
  plan->reserve = reserve;
  plan->workspace = workspace;
  return plan;
}

}  // namespace cachalot
