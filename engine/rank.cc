// Rank: its making at start, then the step thread's short loop.
#include "engine/rank.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/draft_step_times.h"
#include "engine/expert_placement.h"
#include "engine/loading_log.h"

namespace cachalot {
namespace {

// What a step may take in any case. NOTE: a CPU does not hang, but it may have to read the weights from disk again.
constexpr absl::Duration kLeastStepLimit = absl::Seconds(5), kLeastStepLimitOnCpu = absl::Minutes(10);
constexpr int kWarmUpTokens = 512;
constexpr uint64_t kPaddingStep = 0;  // StepPlan::step of those that nobody here has work for
constexpr uint64_t kAborted = ~uint64_t{0};
constexpr absl::Duration kDraftStepsBudget = absl::Seconds(1);
// While a step takes longer than this, arrivals, cancels and deadlines are seen to in between.
constexpr absl::Duration kWaitSlice = absl::Milliseconds(100);

// The least that ranks can do is what each of them can.
absl::Status AgreeOnMemory(Mesh* mesh, MemoryPlan* plan) {
  const auto all = ExchangeAll<std::array<int32_t, 2>>(*mesh, {plan->num_blocks, plan->max_model_len}, "plans");
  if (!all.ok()) return all.status();
  for (const auto& [num_blocks, max_model_len] : *all) {
    plan->num_blocks = std::min(plan->num_blocks, num_blocks);
    plan->max_model_len = std::min(plan->max_model_len, max_model_len);
  }
  plan->cache = plan->num_blocks * plan->block_bytes;
  return absl::OkStatus();
}

}  // namespace

// What the model runs on, and in which types.
absl::StatusOr<MemoryDemand> Rank::ChooseBackend() {
  if (options_.num_nodes > 1) options_.device = "cpu";  // GPUs of several processes do not meet
  // NOTE: before the backend is known; it decides for the CPU, where the GPU's rounding is imitated.
  BackendOptions options;
  options.device = options_.device;
  options.activation = options_.wants_fp8() ? ActivationFormat::kFP8 : ActivationFormat::kF32;
  options.value_dtype = options_.activation == "fp8" ? DType::kBF16 : DType::kF32;
  options.is_exact = options_.is_exact;
  options.scale_rule = model_.config.scale_rule;
  options.num_threads = options_.num_threads;
  if (links_.num_ranks() > 1) {
    options.ordinal = links_.rank() % links_.num_local;
    options.mesh = links_.experts;
    const int num_threads =
        options_.num_threads > 0 ? options_.num_threads : static_cast<int>(std::thread::hardware_concurrency());
    options.num_threads = std::max(num_threads / links_.num_local, 1);
  }
  const bool has_batch_tokens = options_.max_batch_tokens > 0;
  if (!has_batch_tokens) options_.max_batch_tokens = DefaultBatchTokens(options_.device != "cpu", links_.num_ranks());
  options.limits = MakeLimits(model_.config, options_, links_.num_ranks());
  if (options_.device == "cpu") {  // whatever is wrong is known before anything is made
    if (auto kv_dtype = ParseKvDType(options_.kv_cache_dtype, true); !kv_dtype.ok()) return kv_dtype.status();
  }
  auto backend = MakeBackend(options);
  if (!has_batch_tokens && options_.device == "auto" && backend.ok() && !(*backend)->is_gpu()) {
    options.device = "cpu";
    options_.max_batch_tokens = DefaultBatchTokens(/*on_gpu=*/false, links_.num_ranks());
    options.limits = MakeLimits(model_.config, options_, links_.num_ranks());
    backend = MakeBackend(options);
  }
  if (absl::IsResourceExhausted(backend.status())) {
    return absl::ResourceExhaustedError(
        absl::StrCat(backend.status().message(), ": lower --max-batch-tokens, --max-sequences or --max-model-len"));
  }
  if (!backend.ok()) return backend.status();
  backend_ = *std::move(backend);

  const bool on_cpu = !backend_->is_gpu();
  if (options_.random_weights && on_cpu) {
    return absl::InvalidArgumentError("random-weights: needs the CUDA backend");
  }
  auto kv_dtype = ParseKvDType(options_.kv_cache_dtype, on_cpu);
  if (!kv_dtype.ok()) return kv_dtype.status();
  if (on_cpu && links_.num_ranks() > 1) {  // all may go to one rank: of each token, no expert twice
    OpLimits& limits = options.limits;
    limits.max_expert_rows =
        limits.num_ranks * limits.max_tokens * std::min(limits.num_experts_per_tok, limits.num_local_experts);
  }
  const bool is_quantised = options_.wants_fp8() || (options_.activation == "auto" && !on_cpu && model_.config.is_fp8);
  const ActivationFormat plain = on_cpu ? ActivationFormat::kF32 : ActivationFormat::kBF16;
  const KvOptions kv = {*kv_dtype, /*has_mtp=*/options_.speculative_tokens > 0, backend_->value_dtype()};
  return MemoryDemand{options.limits, kv, is_quantised ? ActivationFormat::kFP8 : plain,
                      DefaultExperts(model_.config, ServedPlacement(model_.config, options_), links_.rank())};
}

absl::Status Rank::Load() {
  auto demand = ChooseBackend();
  if (!demand.ok()) return demand.status();
  auto plan = PlanMemory(model_.config, *model_.checkpoint, options_, *demand, *backend_);
  if (!plan.ok()) return plan.status();
  if (links_.num_ranks() > 1) {
    if (absl::Status status = AgreeOnMemory(links_.experts, &*plan); !status.ok()) return status;
  }
  plan_ = *plan;
  if (plan->weights > 0) spdlog::info("{}", plan->ToString());

  RunnerOptions runner_options;
  runner_options.limits = demand->limits;
  runner_options.limits.max_context = plan->max_model_len + DraftSlack(runner_options.limits.max_drafts);
  runner_options.kv = demand->kv;
  runner_options.format = demand->format;
  runner_options.experts = demand->experts;
  runner_options.num_blocks = plan->num_blocks;
  runner_options.num_valid_tokens = model_.num_valid_tokens;
  const absl::Time begin = absl::Now();
  std::optional<LoadingLog> log;
  if (plan->weights > 0) log.emplace(backend_->ops(), plan->weights);
  auto runner = Runner::Create(model_.config, *model_.checkpoint, runner_options, *backend_);
  log.reset();
  if (!runner.ok()) return runner.status();
  runner_ = *std::move(runner);
  shapes_ = std::make_unique<StepShapes>(runner_options.limits, backend_->device(), options_.adapts_drafts);
  if (plan->weights > 0) {
    const double seconds = absl::ToDoubleSeconds(absl::Now() - begin), gigabytes = plan->weights * 1e-9;
    spdlog::info("{:.2f} GB of weights in {:.1f} s: {:.2f} GB/s", gigabytes, seconds, gigabytes / seconds);
  }

  std::random_device random;
  pool_ = std::make_unique<BlockPool>(
      plan->num_blocks, options_.prefix_cache ? BlockPool::PrefixCache::kOn : BlockPool::PrefixCache::kOff,
      uint64_t{random()} << 32 | random());
  const SchedulerLimits limits = {options_.max_batch_tokens, options_.max_sequences,      plan->max_model_len,
                                  model_.eos_token_ids,      options_.speculative_tokens, options_.adapts_drafts};
  scheduler_ = std::make_unique<Scheduler>(limits, pool_.get());
  return absl::OkStatus();
}

// A real step or two: everything that serving will touch has been touched before anybody is told that we are ready.
absl::Status Rank::WarmUp() {
  if (links_.num_ranks() > 1) {  // from here on devices wait for each other
    if (absl::Status status = links_.experts->Exchange().status(); !status.ok()) return status;
  }
  watch_.emplace(backend_->is_gpu() ? kLeastStepLimit : kLeastStepLimitOnCpu);
  const auto graphs = runner_->Prepare(shapes_->Decode());
  if (!graphs.ok()) return graphs.status();
  if (!graphs->empty()) spdlog::info("{}", *graphs);
  auto sequence = std::make_unique<Sequence>();
  // More rows than a decode step's; on a GPU, enough to know how long the longest steps may take, and a long chunk,
  // which has kernels of its own.
  const int num_tokens = backend_->is_gpu() ? std::min(options_.max_batch_tokens, kWarmUpTokens) : 5;
  sequence->num_prompt_tokens = std::clamp(plan_.max_model_len - 2, 1, num_tokens);
  sequence->tokens.assign(sequence->num_prompt_tokens, 0);
  sequence->sampling.max_tokens = std::min(2, plan_.max_model_len - sequence->num_prompt_tokens);
  sequence->sampling.ignore_eos = true;
  sequence->sampling.logit_bias = {{0, 0.0f}};
  Scheduler scheduler(scheduler_->limits(), pool_.get());  // its own, lest these steps be counted
  scheduler.Add(std::move(sequence));
  while (true) {
    const StepPlan plan = scheduler.Plan(absl::Now());
    const auto agreed = Agree(plan, /*is_leaving=*/false);
    if (!agreed.ok()) return agreed.status();
    if (!agreed->has_work) break;
    Launch(plan, *agreed);
    Scheduler::Deltas deltas;
    auto result = runner_->Wait(watch_->Limit());
    if (!result.ok()) return result.status();
    watch_->Completed(absl::Now());
    if (result->step != kPaddingStep) scheduler.Commit(*result, absl::Now(), &deltas);
  }
  absl::Status status;
  // NOTE: how many steps that takes is a matter of time, and ranks would not agree on it: they learn as they serve.
  if (options_.adapts_drafts && links_.num_ranks() == 1) {
    status = MeasureDraftSteps(*shapes_, kDraftStepsBudget, runner_.get(), pool_.get(), scheduler_.get());
  }
  pool_->ResetPrefixCache();
  return status;
}

Rank::Rank(const EngineOptions& options, const ServedModel& model, RankLinks links)
    : options_(options), model_(model), links_(links) {
  if (links_.num_ranks() == 1) return;
  agreement_.emplace(links_.steps);
  links_.steps->OnAwaited([this](uint64_t num_begun) {
    std::lock_guard lock(inbox_mutex_);
    num_votes_begun_ = std::max(num_votes_begun_, num_begun > 0 ? num_begun : kAborted);
    inbox_filled_.notify_one();
  });
}

Rank::~Rank() {
  Stop();
  if (links_.steps != nullptr) links_.steps->OnAwaited(nullptr);
}

absl::StatusOr<std::unique_ptr<Rank>> Rank::Create(const EngineOptions& options, const ServedModel& model,
                                                   RankLinks links) {
  std::unique_ptr<Rank> rank(new Rank(options, model, links));
  absl::Status status = rank->Load();
  if (status.ok()) status = rank->WarmUp();
  if (!status.ok()) {
    rank->AbortOthers(status);
    return status;
  }
  rank->stats_ = rank->scheduler_->stats();
  return rank;
}

void Rank::Start(Output output) {
  output_ = std::move(output);
  step_thread_ = std::thread([this] { RunSteps(); });
}

void Rank::BeginStop() {
  {
    std::lock_guard lock(inbox_mutex_);
    is_stopping_ = true;
  }
  inbox_filled_.notify_all();
}

void Rank::Stop() {
  BeginStop();
  if (step_thread_.joinable()) step_thread_.join();
}

absl::Status Rank::Submit(std::unique_ptr<Sequence> sequence) {
  std::lock_guard lock(inbox_mutex_);
  if (!health_.ok()) return absl::UnavailableError(health_.message());
  if (is_stopping_) return absl::UnavailableError("the server is stopping");
  new_sequences_.push_back(std::move(sequence));
  inbox_filled_.notify_one();
  return absl::OkStatus();
}

void Rank::Cancel(RequestId id) {
  std::lock_guard lock(inbox_mutex_);
  cancelled_.push_back(id);
  inbox_filled_.notify_one();
}

void Rank::ResetPrefixCache() {
  std::lock_guard lock(inbox_mutex_);
  wants_reset_ = true;
  inbox_filled_.notify_one();
}

EngineStats Rank::stats() const {
  std::lock_guard lock(inbox_mutex_);
  EngineStats stats = stats_;
  stats.waiting += static_cast<int>(new_sequences_.size());
  return stats;
}

absl::Status Rank::health() const {
  std::lock_guard lock(inbox_mutex_);
  return health_;
}

// Moves what has arrived into the scheduler and ends what is past its deadline; false when it is time to stop.
bool Rank::TakeInbox(bool may_sleep, Scheduler::Deltas* deltas) {
  std::vector<std::unique_ptr<Sequence>> arrived;
  std::vector<RequestId> cancelled;
  {
    std::unique_lock lock(inbox_mutex_);
    if (may_sleep) {
      inbox_filled_.wait(lock, [this] {
        return is_stopping_ || wants_reset_ || !new_sequences_.empty() || !cancelled_.empty() || IsAwaited();
      });
    }
    if (is_stopping_) return false;
    if (std::exchange(wants_reset_, false)) pool_->ResetPrefixCache();
    arrived.swap(new_sequences_);
    cancelled.swap(cancelled_);
    stats_.waiting += static_cast<int>(arrived.size());
  }
  const absl::Time now = absl::Now();
  for (auto& sequence : arrived) scheduler_->Add(std::move(sequence));
  for (RequestId id : cancelled) scheduler_->Cancel(id, now, deltas);
  scheduler_->Expire(now, deltas);
  return true;
}

// Whether there is a step to run, here or elsewhere.
absl::StatusOr<StepVote> Rank::Agree(const StepPlan& plan, bool is_leaving) {
  StepVote mine = {.has_work = plan.empty() ? 0 : 1,
                   .leaver = is_leaving ? links_.rank() + 1 : 0,
                   .num_proposed = plan.num_proposed,
                   .work = StepWatch::WorkOf(plan.num_rows, plan.num_keys)};
  if (!agreement_.has_value()) return mine;
  if (!plan.empty()) {
    const StepShape shape = shapes_->Of(plan);
    mine.is_mixed = shape.path == StepShape::Path::kMixed ? 1 : 0;
    mine.num_sequences = shape.num_sequences;
    mine.num_tokens = shape.num_tokens;
    mine.num_rows = shape.num_rows;
  }
  // NOTE: ranks have the same number of steps under way, and vote while there are any; then who has work votes, which
  // calls the others.
  bool is_awaited = false;
  {
    std::lock_guard lock(inbox_mutex_);
    is_awaited = IsAwaited();
  }
  if (plan.empty() && !is_leaving && !is_awaited && runner_->num_in_flight() == 0) return mine;
  return agreement_->Vote(mine);
}

void Rank::Launch(const StepPlan& plan, const StepVote& agreed) {
  StepShape shape = plan.empty() ? shapes_->Padding(agreed.num_proposed) : shapes_->Of(plan);
  if (agreement_.has_value() && backend_->is_gpu()) {
    // The same T everywhere, and where all decode a shape that there is a graph of.
    shape.path = agreed.is_mixed != 0 ? StepShape::Path::kMixed : StepShape::Path::kDecode;
    shape.num_sequences = agreed.num_sequences;
    shape.num_tokens = agreed.num_tokens;
    shape.num_rows = agreed.num_rows;
  }
  shape.num_proposed = agreed.num_proposed;
  runner_->Launch(plan, shape);
  watch_->Launched(agreed.work, absl::Now());
}

void Rank::AbortOthers(const absl::Status& status) {
  if (links_.num_ranks() == 1) return;
  const absl::Status reason = absl::AbortedError(absl::StrCat("rank ", links_.rank(), ": ", status.message()));
  links_.steps->Abort(reason);
  links_.experts->Abort(reason);
}

// The result of the oldest step in flight.
absl::StatusOr<StepResult> Rank::WaitForStep(Scheduler::Deltas* deltas) {
  for (absl::Duration waited; true; waited += kWaitSlice) {
    if (!deltas->empty()) Publish(deltas);
    auto result = runner_->Wait(kWaitSlice);
    if (result.ok()) watch_->Completed(absl::Now());
    if (result.ok() || !absl::IsDeadlineExceeded(result.status())) return result;
    if (waited >= watch_->Limit()) {
      return absl::DeadlineExceededError(absl::StrCat("a step has not ended within ", absl::FormatDuration(waited)));
    }
    TakeInbox(false, deltas);
  }
}

// The loop of engine/schedule/step.h: plan and launch while a step runs, at most two in flight.
void Rank::RunSteps() {
  bool is_idle = false, is_left = false;
  absl::Status status;
  Scheduler::Deltas deltas;
  while (true) {
    const bool is_leaving = !TakeInbox(is_idle, &deltas);
    if (is_leaving && !agreement_.has_value()) break;
    absl::Time begin = absl::Now();
    const StepPlan plan = is_leaving ? StepPlan() : scheduler_->Plan(begin);
    host_time_ += absl::Now() - begin;
    const auto agreed = Agree(plan, is_leaving);
    status = agreed.status();
    if (!status.ok()) break;
    if (agreed->leaver != 0) {
      const int leaver = agreed->leaver - 1;
      is_left = !is_leaving && links_.node_of(leaver) != links_.node_of(links_.rank());
      if (is_left) status = absl::UnavailableError(absl::StrCat("rank ", leaver, " has left, and so all do"));
      break;
    }
    begin = absl::Now();
    if (!plan.empty() && agreed->num_proposed > plan.num_proposed) scheduler_->Proposes(agreed->num_proposed);
    if (agreed->has_work) Launch(plan, *agreed);
    host_time_ += absl::Now() - begin;
    // NOTE: a commit frees blocks and slots, so only a turn that neither planned nor committed has nothing to do: then
    // nothing waits either, and no deadline need wake us.
    const int num_in_flight = runner_->num_in_flight();
    is_idle = !agreed->has_work && num_in_flight == 0;
    if (num_in_flight == kMaxStepsInFlight || (!agreed->has_work && !is_idle)) {
      auto result = WaitForStep(&deltas);
      if (!result.ok()) {
        status = result.status();
        break;
      }
      begin = absl::Now();
      if (result->step != kPaddingStep) scheduler_->Commit(*result, begin, &deltas);
      host_time_ += absl::Now() - begin;
    }
    Publish(&deltas);
  }

  // The end: nothing may be left without its last delta.
  if (is_left) {
    spdlog::error("rank {} stops: {}", links_.rank(), status.ToString());
  } else if (!status.ok()) {
    spdlog::critical("rank {} is dead: {}", links_.rank(), status.ToString());
    AbortOthers(status);
  }
  {
    std::lock_guard lock(inbox_mutex_);
    is_stopping_ = true;
    health_ = status;
    for (auto& sequence : new_sequences_) scheduler_->Add(std::move(sequence));
    new_sequences_.clear();
  }
  while ((status.ok() || is_left) && runner_->num_in_flight() > 0) {
    auto result = runner_->Wait(watch_->Limit());
    if (!result.ok()) break;
    watch_->Completed(absl::Now());
    if (result->step != kPaddingStep) scheduler_->Commit(*result, absl::Now(), &deltas);
  }
  scheduler_->Fail(absl::UnavailableError(status.ok() ? "the server is stopping" : status.message()), absl::Now(),
                   &deltas);
  Publish(&deltas);
}

// The statistics first: who has seen a request's end finds it counted.
void Rank::Publish(Scheduler::Deltas* deltas) {
  {
    std::lock_guard lock(inbox_mutex_);
    stats_ = scheduler_->stats();
    stats_.host_seconds = absl::ToDoubleSeconds(host_time_);
  }
  if (!deltas->empty()) output_(deltas);
}

}  // namespace cachalot
