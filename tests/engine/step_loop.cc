// StepLoop: what engine.cc does, one turn at a time.
#include "tests/engine/step_loop.h"

#include <utility>

#include "engine/expert_placement.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

}  // namespace

StepLoop::StepLoop(const std::string& model_dir, SchedulerLimits limits, int num_blocks, int max_logits_rows,
                   BlockPool::PrefixCache prefix_cache)
    : config_(Must(ModelConfig::Load(model_dir))), checkpoint_(Must(Checkpoint::Open(model_dir))) {
  BackendOptions backend;
  backend.device = "cpu";
  backend.scale_rule = config_.scale_rule;
  backend.limits = config_.op_limits();
  backend.limits.max_tokens = limits.max_batch_tokens;
  backend.limits.max_sequences = limits.max_sequences;
  backend.limits.max_rows = max_logits_rows > 0 ? max_logits_rows : limits.max_batch_tokens;
  backend.limits.max_drafts = limits.max_drafts;
  backend.limits.max_context = limits.max_model_len + DraftSlack(limits.max_drafts);
  backend_ = Must(MakeBackend(backend));
  RunnerOptions options;
  options.limits = backend.limits;
  options.experts = DefaultExperts(config_, {.num_experts = config_.n_routed_experts}, 0);
  options.kv = {KvDType::kF32, /*has_mtp=*/limits.max_drafts > 0, backend_->value_dtype()};
  options.num_blocks = num_blocks;
  options.num_valid_tokens = config_.vocab_size;
  runner_ = Must(Runner::Create(config_, *checkpoint_, options, *backend_));
  shapes_ = std::make_unique<StepShapes>(options.limits, backend_->device());
  pool_ = std::make_unique<BlockPool>(num_blocks, prefix_cache);
  limits.eos_token_ids = config_.eos_token_ids;
  scheduler_ = std::make_unique<Scheduler>(limits, pool_.get());
}

void StepLoop::Add(const Request& request) {
  auto sequence = std::make_unique<Sequence>();
  sequence->id = answers_.size();
  sequence->sampling = request.sampling;
  sequence->priority = request.priority;
  sequence->client = request.client;
  sequence->cache_salt = request.cache_salt;
  sequence->submitted = absl::Now();
  sequence->num_prompt_tokens = static_cast<int>(request.prompt.size());
  sequence->tokens = request.prompt;
  answers_.emplace_back();
  scheduler_->Add(std::move(sequence));
}

bool StepLoop::Turn() {
  const StepPlan plan = scheduler_->Plan(absl::Now());
  if (!plan.empty()) runner_->Launch(plan, shapes_->Of(plan));
  if (scheduler_->num_in_flight() == 0) return false;
  if (scheduler_->num_in_flight() < kMaxStepsInFlight && !plan.empty()) return true;
  Scheduler::Deltas deltas;
  scheduler_->Commit(Must(runner_->Wait(absl::InfiniteDuration())), absl::Now(), &deltas);
  Take(std::move(deltas));
  return true;
}

void StepLoop::Take(Scheduler::Deltas deltas) {
  for (auto& [id, delta] : deltas) AppendDelta(std::move(delta), &answers_[id]);
}

std::vector<Answer> StepLoop::Run(const std::vector<Request>& requests) {
  for (const Request& request : requests) Add(request);
  while (Turn()) continue;
  return answers_;
}

}  // namespace cachalot
