// Memory from the backend's dry run; time from bytes and operations.
#include "engine/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <vector>

#include "absl/strings/str_format.h"
#include "engine/expert_placement.h"
#include "engine/memory_plan.h"
#include "engine/model/config.h"
#include "engine/model/random_checkpoint.h"
#include "engine/model/tensor_table.h"
#include "engine/validation.h"
#include "kernels/backend.h"

namespace cachalot {
namespace {

constexpr int kMaxGpus = 4096;
constexpr double kGiB = 1073741824.0;
// What the driver keeps of a GPU's memory, and a context takes: an H100 of "80 GiB" has 79.2 when a program has begun.
constexpr int64_t kDriverBytes = int64_t{800} << 20;

// Measured on the cards (tests/bench/results): what a plain read loop gets, and products in fp8 and bf16 at their best;
// NVLink a direction. Cards of more than 100 GiB are taken for H200s.
struct Card {
  const char* name;
  double read_bytes, fp8_flops, bf16_flops, link_bytes;  // a second
};
constexpr Card kH100 = {"H100 or H800", 3.09e12, 1.24e15, 0.77e15, 160e9},
               kH200 = {"H200", 4.55e12, 1.24e15, 0.77e15, 360e9};
const Card& CardOf(int64_t memory) { return memory > 100 * kGiB ? kH200 : kH100; }

// GPUs of a node; what one of them gets of others' memory by RDMA, as DeepEP measured it with 400 Gb/s for each GPU.
constexpr int kNodeGpus = 8;
constexpr double kNetworkBytes = 43e9;

// What a dispatch and a combine take beside their bytes (tests/bench/results/2026-11-27-expert-parallel.md), and the
// share of the roofline that steps of one H200 reach (2026-11-27-decode-steps.md).
constexpr double kExchangeSeconds = 20e-6, kReachedShare = 0.5;

// A model that need not be there.
struct Planned {
  ModelConfig config;
  std::unique_ptr<Checkpoint> checkpoint;
};

absl::StatusOr<Planned> Open(const PlanOptions& options, int num_gpus) {
  if (num_gpus < 1 || num_gpus > kMaxGpus) {
    return absl::InvalidArgumentError(absl::StrFormat("gpus: found %d, expected 1 to %d", num_gpus, kMaxGpus));
  }
  if (absl::Status status = ValidateOptions(options.engine); !status.ok()) return status;
  auto config = ModelConfig::Load(options.engine.model_dir);
  if (!config.ok()) return config.status();
  if (options.context < 1 || options.context > config->max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrFormat("context: found %d, expected 1 to the model's %d",
                                                      options.context, config->max_position_embeddings));
  }
  Planned planned = {*std::move(config), nullptr};
  planned.checkpoint = MakeRandomCheckpoint(planned.config);
  return planned;
}

// Bytes of stored weights by what reads them: routed experts of one layer each, and the rest that every token reads.
struct WeightBytes {
  double expert = 0, others = 0;  // of one expert of one layer; of all layers
};
WeightBytes CountBytes(const ModelConfig& config, const Checkpoint& checkpoint, bool has_mtp) {
  WeightBytes bytes;
  int num_moe = 0;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) num_moe += config.is_moe_layer(layer) ? 1 : 0;
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    const CheckpointTensor* tensor = checkpoint.Find(expected.name);
    if (tensor == nullptr || expected.kind == TensorKind::kEmbedding) continue;
    if (expected.mtp_layer >= 0 && !has_mtp) continue;
    const double stored = static_cast<double>(expected.num_elements()) * (tensor->dtype == "F8_E4M3" ? 1 : 2);
    (expected.kind == TensorKind::kRoutedExperts ? bytes.expert : bytes.others) += stored;
  }
  bytes.expert /= std::max(num_moe * config.n_routed_experts, 1);
  return bytes;
}

// Nodes other than its own that a token's experts are on, as routing by even chance has it. Where there is a group of
// experts to a node, or less than one, topk_group bounds how many nodes they come from.
double OtherNodes(const ModelConfig& config, int num_gpus) {
  const double nodes = std::ceil(static_cast<double>(num_gpus) / kNodeGpus);
  const double allowed = nodes >= config.n_group ? nodes * config.topk_group / config.n_group : nodes;
  return allowed * (1 - std::pow(1 - 1 / allowed, config.num_experts_per_tok)) * (1 - 1 / nodes);
}

// A decode step of `batch` sequences a rank: every product takes what its bytes or its operations take, one after the
// other; so does attention; each MoE layer sends a token once to every other node that has experts of its, there on to
// the ranks that have them, and gets as much back.
double Roofline(const Planned& model, const PlanOptions& options, const RankPlan& plan, int num_gpus) {
  const ModelConfig& c = model.config;
  const Card& card = CardOf(options.gpu_memory);
  const double B = plan.num_sequences, all = B * num_gpus, K = c.num_experts_per_tok,
               E = std::max(c.n_routed_experts, 1);
  const double layers = c.num_hidden_layers;
  const bool is_fp8 = c.is_fp8;
  const double flops = is_fp8 ? card.fp8_flops : card.bf16_flops, element = is_fp8 ? 1 : 2;
  const WeightBytes bytes = CountBytes(c, *model.checkpoint, false);
  double moe = 0;
  for (int layer = 0; layer < c.num_hidden_layers; ++layer) moe += c.is_moe_layer(layer) ? 1 : 0;
  const auto time = [&](double read, double operations, double rate) {
    return std::max(read / card.read_bytes, operations / rate);
  };
  // Of a rank's slots, those that any token of any rank has chosen.
  const double chosen = plan.expert_slots * (1 - std::pow(1 - K / E, all));
  double seconds = time(bytes.others, 2 * B * bytes.others / element, flops);
  if (moe > 0) {
    seconds += moe * time(chosen * bytes.expert, 2 * B * K * bytes.expert / element, flops);
    if (num_gpus > 1) {
      const double D = c.hidden_size, ranks = num_gpus * (1 - std::pow(1 - 1.0 / num_gpus, K)) * (1 - 1.0 / num_gpus);
      const double row = D * (element + 0.03) + 2 * D;  // with its scales, and what comes back
      seconds += moe * (kExchangeSeconds + B * ranks * row / card.link_bytes);
      seconds += moe * B * OtherNodes(c, num_gpus) * row / kNetworkBytes;
    }
  }
  const double H = c.num_attention_heads, latent = c.kv_lora_rank, rope = c.qk_rope_head_dim;
  const double keys = B * options.context;
  const KvDType dtype = *ParseKvDType(options.engine.kv_cache_dtype, false);
  return seconds + layers * time(keys * KvTokenBytes(dtype, c.kv_lora_rank, c.qk_rope_head_dim),
                                 2 * keys * H * (2 * latent + rope), card.bf16_flops);
}

absl::StatusOr<RankPlan> PlanOf(const Planned& model, const PlanOptions& asked, int num_gpus) {
  const ModelConfig& config = model.config;
  EngineOptions options = asked.engine;
  if (options.max_batch_tokens == 0) options.max_batch_tokens = DefaultBatchTokens(true, num_gpus);
  const auto kv_dtype = ParseKvDType(options.kv_cache_dtype, /*on_cpu=*/false);
  if (!kv_dtype.ok()) return kv_dtype.status();
  BackendOptions backend_options;
  backend_options.device = "cuda";
  backend_options.activation = config.is_fp8 ? ActivationFormat::kFP8 : ActivationFormat::kBF16;
  backend_options.planned_memory = asked.gpu_memory - kDriverBytes;
  if (backend_options.planned_memory <= 0) return absl::ResourceExhaustedError("GPU memory: the driver takes it all");
  options.num_ranks = num_gpus;
  const int num_experts = config.n_routed_experts;
  options.num_redundant_experts = (num_experts + num_gpus - 1) / num_gpus * num_gpus - num_experts;
  const PlacementShape placement = ServedPlacement(config, options);
  if (absl::Status status = CheckPlacement(placement); !status.ok()) return status;
  backend_options.limits = MakeLimits(config, options, num_gpus);
  auto backend = MakeBackend(backend_options);
  if (!backend.ok()) return backend.status();
  const OpLimits& limits = backend_options.limits;
  const MemoryDemand demand = {limits,
                               {*kv_dtype, options.speculative_tokens > 0, (*backend)->value_dtype()},
                               config.is_fp8 ? ActivationFormat::kFP8 : ActivationFormat::kBF16,
                               DefaultExperts(config, placement, 0)};
  // NOTE: how much cache there is room for is asked, not how much there is use for.
  options.max_sequences = kMaxSequences;
  const auto plan = PlanMemory(config, *model.checkpoint, options, demand, **backend);
  if (!plan.ok()) return plan.status();
  RankPlan rank;
  rank.expert_slots = limits.num_local_experts;
  rank.redundant_experts = options.num_redundant_experts;
  rank.free = plan->free;
  rank.weights = plan->weights;
  rank.workspace = plan->workspace;
  rank.activations = plan->activations;
  rank.state = plan->state;
  rank.reserve = plan->reserve;
  rank.cache = plan->cache;
  rank.cache_tokens = int64_t{plan->num_blocks} * kBlockTokens;
  rank.max_batch_tokens = options.max_batch_tokens;
  if (rank.cache_tokens < asked.context) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("the KV cache would hold %d tokens, not a sequence of %d", rank.cache_tokens, asked.context));
  }
  rank.num_sequences =
      static_cast<int>(std::min<int64_t>(asked.engine.max_sequences, rank.cache_tokens / std::max(asked.context, 1)));
  rank.roofline_seconds = Roofline(model, asked, rank, num_gpus);
  return rank;
}

std::string Gigabytes(int64_t bytes) { return absl::StrFormat("%.2f", bytes * 1e-9); }

// The fewest GPUs that hold the model and a sequence.
int LeastGpus(const Planned& model, const PlanOptions& options) {
  int low = 0, high = 1;  // `low` does not do
  while (high <= kMaxGpus && !PlanOf(model, options, high).ok()) low = high, high *= 2;
  if (high > kMaxGpus) return 0;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (PlanOf(model, options, middle).ok() ? high : low) = middle;
  }
  return high;
}

void Describe(const Planned& model, const PlanOptions& options, const RankPlan& plan, std::string* text) {
  const auto line = [text](const std::string& words) { *text += words + "\n"; };
  const int N = options.num_gpus;
  const Card& card = CardOf(options.gpu_memory);
  const ParameterCounts parameters = CountParameters(model.config);
  line(absl::StrFormat("%s, %.1fB parameters of which a token uses %.1fB, on %d GPU%s of %.0f GiB (%s)",
                       model.config.model_type, parameters.main * 1e-9, parameters.active * 1e-9, N, N == 1 ? "" : "s",
                       options.gpu_memory / kGiB, card.name));
  line(absl::StrFormat(
      "  a rank      attention, shared experts and head whole; %d of %d routed experts a layer%s", plan.expert_slots,
      model.config.n_routed_experts,
      plan.redundant_experts > 0 ? absl::StrFormat(" (in all %d are there once more)", plan.redundant_experts) : ""));
  line(absl::StrFormat(
      "  GB a rank   free %s; weights %s, workspace %s, activations %s, state %s, graphs and code %s, KV "
      "cache %s",
      Gigabytes(plan.free), Gigabytes(plan.weights), Gigabytes(plan.workspace), Gigabytes(plan.activations),
      Gigabytes(plan.state), Gigabytes(plan.reserve), Gigabytes(plan.cache)));
  line(absl::StrFormat(
      "  cache       %d tokens a rank, %d in all; sequences of 4096 tokens: %d, of 32768: %d, of 131072: %d",
      plan.cache_tokens, plan.cache_tokens * N, plan.cache_tokens / 4096 * N, plan.cache_tokens / 32768 * N,
      plan.cache_tokens / 131072 * N));
  const double rate = plan.num_sequences / plan.roofline_seconds;
  line(absl::StrFormat(
      "  a step      of %d sequences of %d tokens a rank: roofline %.1f ms, %.0f tok/s a rank, %.0f in all; "
      "expected, at the half of it that steps reach today, %.1f ms and %.0f tok/s in all",
      plan.num_sequences, options.context, plan.roofline_seconds * 1e3, rate, rate * N,
      plan.roofline_seconds * 1e3 / kReachedShare, rate * N * kReachedShare));
  line(absl::StrFormat(
      "  reckoned    with %.2f TB/s, %.0f TFLOP/s in fp8 and %.0f in bf16, %.0f GB/s between GPUs of a node%s; at most "
      "%d rows of a step a rank",
      card.read_bytes * 1e-12, card.fp8_flops * 1e-12, card.bf16_flops * 1e-12, card.link_bytes * 1e-9,
      N > kNodeGpus ? absl::StrFormat(" of %d and %.0f between nodes", kNodeGpus, kNetworkBytes * 1e-9) : "",
      plan.max_batch_tokens));
}

void DescribeTable(const Planned& model, const PlanOptions& options, std::string* text) {
  *text += absl::StrFormat("\n%6s %7s %10s %10s %14s %11s %14s\n", "GPUs", "experts", "weights GB", "cache GB",
                           "tokens a rank", "sequences", "roofline tok/s");
  for (const int n : {1, 2, 4, 8, 16, 32, 64, 72, 96, 128, 144, 256, 320}) {
    const auto plan = PlanOf(model, options, n);
    if (!plan.ok()) {
      *text += absl::StrFormat("%6d  does not fit\n", n);
      continue;
    }
    *text += absl::StrFormat("%6d %7d %10s %10s %14d %11d %14.0f\n", n, plan->expert_slots, Gigabytes(plan->weights),
                             Gigabytes(plan->cache), plan->cache_tokens, plan->cache_tokens / options.context * n,
                             plan->num_sequences / plan->roofline_seconds * n);
  }
}

}  // namespace

absl::StatusOr<RankPlan> PlanRank(const PlanOptions& options, int num_gpus) {
  const auto model = Open(options, num_gpus);
  if (!model.ok()) return model.status();
  return PlanOf(*model, options, num_gpus);
}

absl::StatusOr<std::string> Plan(const PlanOptions& options) {
  const auto model = Open(options, options.num_gpus);
  if (!model.ok()) return model.status();
  const auto plan = PlanOf(*model, options, options.num_gpus);
  if (!plan.ok() && !absl::IsResourceExhausted(plan.status())) return plan.status();
  if (!plan.ok()) {
    const int least = LeastGpus(*model, options);
    return absl::ResourceExhaustedError(
        absl::StrFormat("%d GPU%s of %.0f GiB: does not fit, %s (%s)", options.num_gpus,
                        options.num_gpus == 1 ? "" : "s", options.gpu_memory / kGiB,
                        least > 0 ? absl::StrFormat("needs at least %d", least) : "nor does it on any number of them",
                        plan.status().message()));
  }
  std::string text;
  Describe(*model, options, *plan, &text);
  if (options.has_table) DescribeTable(*model, options, &text);
  return text;
}

}  // namespace cachalot
