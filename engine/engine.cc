// Engine: one checkpoint, its ranks, and the way of requests there and of deltas back.
#include "engine/engine.h"

#include <algorithm>
#include <condition_variable>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/expert_placement.h"
#include "engine/model/generation_config.h"
#include "engine/model/random_checkpoint.h"
#include "engine/rank.h"
#include "engine/rank_meshes.h"
#include "engine/router.h"
#include "engine/validation.h"

namespace cachalot {
namespace {

// A request that has not ended.
struct OpenRequest {
  DeltaSink sink;
  Router::Route route;
  bool has_begun = false;  // its first token is there
};

class EngineImpl : public Engine {
 public:
  explicit EngineImpl(const EngineOptions& options) : options_(options), router_(std::max(options.num_ranks, 1)) {}
  ~EngineImpl() override;

  absl::Status Start(const TokenizerInfo& tokenizer);
  absl::StatusOr<RequestId> Submit(Request request, DeltaSink sink) override;
  void Cancel(RequestId id) override;
  void ResetPrefixCache() override;
  std::vector<EngineStats> rank_stats() const override;
  const ModelInfo& model() const override { return model_info_; }
  absl::Status health() const override;

 private:
  absl::Status Open();
  absl::Status ReadEndTokens(const TokenizerInfo& tokenizer);
  absl::Status MakeRanks();
  void Emit(Scheduler::Deltas* deltas);
  void RunOutput();

  const EngineOptions options_;
  ServedModel model_;
  ModelInfo model_info_;
  RankMeshes meshes_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  Router router_;

  std::mutex submit_mutex_;  // from the count of those that wait until there is one more; ids rise with arrival
  RequestId next_id_ = 1;

  // Delta queue: step thread -> output thread.
  std::mutex output_mutex_;
  std::condition_variable output_filled_;
  Scheduler::Deltas output_;
  bool is_output_done_ = false;

  // NOTE: a lock of their own: the output thread takes it for every delta, and the step thread must not wait for one
  // who was interrupted while holding it.
  mutable std::mutex open_mutex_;
  absl::flat_hash_map<RequestId, std::unique_ptr<OpenRequest>> open_;

  std::thread output_thread_;
};

// Everything that comes before the backend: it may take seconds to make, mistakes should not.
absl::Status EngineImpl::Open() {
  auto config = ModelConfig::Load(options_.model_dir);
  if (!config.ok()) return config.status();
  model_.config = *std::move(config);
  if (options_.wants_fp8() && !model_.config.is_fp8) {
    return absl::InvalidArgumentError("activation: fp8 needs a checkpoint with FP8 weights");
  }
  if (options_.random_weights) {
    model_.checkpoint = MakeRandomCheckpoint(model_.config);
  } else {
    auto checkpoint = Checkpoint::Open(options_.model_dir);
    if (!checkpoint.ok()) return checkpoint.status();
    model_.checkpoint = *std::move(checkpoint);
  }
  if (options_.speculative_tokens > 0 && !ModelWeights::HasMtp(model_.config, *model_.checkpoint)) {
    return absl::InvalidArgumentError(absl::StrFormat("speculative-tokens: found %d, but %s has no MTP layer",
                                                      options_.speculative_tokens, options_.model_dir));
  }
  return absl::OkStatus();
}

// A checkpoint may name them in any of three files; what ends an answer in one ends it in all.
absl::Status EngineImpl::ReadEndTokens(const TokenizerInfo& tokenizer) {
  const int vocab_size = model_.config.vocab_size;
  const absl::StatusOr<GenerationConfig> generation = GenerationConfig::Load(options_.model_dir, vocab_size);
  if (!generation.ok()) return generation.status();
  model_info_.sampling = generation->sampling;
  std::vector<int>& ids = model_.eos_token_ids = model_.config.eos_token_ids;
  ids.insert(ids.end(), generation->eos_token_ids.begin(), generation->eos_token_ids.end());
  const int from_tokenizer = tokenizer.eos_token_id.value_or(vocab_size);
  if (from_tokenizer < vocab_size) ids.push_back(from_tokenizer);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return absl::OkStatus();
}

// Side by side: ranks that share experts warm up together, and when one cannot none can.
absl::Status EngineImpl::MakeRanks() {
  const int num_ranks = options_.num_ranks;
  if (absl::Status status = CheckPlacement(ServedPlacement(model_.config, options_)); !status.ok()) return status;
  auto meshes = MakeRankMeshes(options_);
  if (!meshes.ok()) return meshes.status();
  meshes_ = *std::move(meshes);
  std::vector<absl::StatusOr<std::unique_ptr<Rank>>> made(num_ranks);
  std::vector<std::thread> makers;
  for (int r = 0; r < num_ranks; ++r) {
    RankLinks links;
    if (!meshes_.steps.empty()) links = {meshes_.steps[r].get(), meshes_.experts[r].get(), num_ranks};
    makers.emplace_back([this, links, &rank = made[r]] { rank = Rank::Create(options_, model_, links); });
  }
  for (std::thread& maker : makers) maker.join();
  // NOTE: one that failed has aborted the others, whose error says no more than that.
  absl::Status status;
  for (auto& rank : made) {
    if (rank.ok()) {
      ranks_.push_back(*std::move(rank));
    } else if (status.ok() || absl::IsAborted(status)) {
      status = rank.status();
    }
  }
  return status;
}

absl::Status EngineImpl::Start(const TokenizerInfo& tokenizer) {
  absl::Status status = ValidateOptions(options_);
  if (status.ok()) status = Open();
  if (status.ok()) status = ReadEndTokens(tokenizer);
  if (!status.ok()) return status;
  const int vocab_size = model_.config.vocab_size;
  model_.num_valid_tokens = tokenizer.valid_tokens > 0 ? std::min(tokenizer.valid_tokens, vocab_size) : vocab_size;
  if (status = MakeRanks(); !status.ok()) return status;

  model_info_.model_type = model_.config.model_type;
  model_info_.backend = ranks_[0]->backend_name();
  model_info_.vocab_size = vocab_size;
  model_info_.max_model_len = ranks_[0]->max_model_len();
  model_info_.max_waiting = options_.max_waiting;
  model_info_.first_rank = options_.node_rank * options_.num_ranks;
  for (const auto& rank : ranks_) model_info_.kv_cache_tokens += rank->kv_cache_tokens();
  model_info_.kv_bytes_per_token = ranks_[0]->kv_bytes_per_token();
  model_info_.bos_token_id = model_.config.bos_token_id;
  model_info_.eos_token_ids = model_.eos_token_ids;
  output_thread_ = std::thread([this] { RunOutput(); });
  for (const auto& rank : ranks_) rank->Start([this](Scheduler::Deltas* deltas) { Emit(deltas); });
  return absl::OkStatus();
}

// NOTE: whoever waits for an answer has its end before the device's memory is freed.
EngineImpl::~EngineImpl() {
  for (const auto& rank : ranks_) rank->BeginStop();
  for (const auto& rank : ranks_) rank->Stop();
  {
    std::lock_guard lock(output_mutex_);
    is_output_done_ = true;
  }
  output_filled_.notify_all();
  if (output_thread_.joinable()) output_thread_.join();
}

absl::StatusOr<RequestId> EngineImpl::Submit(Request request, DeltaSink sink) {
  const absl::Status status = ValidateRequest(request, model_info_);
  if (!status.ok()) return status;
  auto sequence = std::make_unique<Sequence>();
  sequence->sampling = std::move(request.sampling);
  sequence->priority = request.priority;
  sequence->client = std::move(request.client);
  sequence->cache_salt = std::move(request.cache_salt);
  sequence->submitted = absl::Now();
  sequence->deadline = request.deadline;
  sequence->num_prompt_tokens = static_cast<int>(request.prompt.size());
  sequence->tokens = std::move(request.prompt);
  std::lock_guard lock(submit_mutex_);
  if (const absl::Status bad = health(); !bad.ok()) return absl::UnavailableError(bad.message());
  if (stats().waiting >= options_.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrFormat("%d requests are waiting already", options_.max_waiting));
  }
  const RequestId id = next_id_++;
  sequence->id = id;
  auto open = std::make_unique<OpenRequest>();
  open->sink = std::move(sink);
  const Router::Route route = open->route = router_.Choose(sequence->cache_salt, sequence->tokens);
  {
    std::lock_guard open_lock(open_mutex_);
    open_[id] = std::move(open);
  }
  if (absl::Status refused = ranks_[route.rank]->Submit(std::move(sequence)); !refused.ok()) {
    router_.HasEnded(route, /*has_begun=*/false);
    std::lock_guard open_lock(open_mutex_);
    open_.erase(id);
    return refused;
  }
  return id;
}

void EngineImpl::Cancel(RequestId id) {
  int rank = 0;
  {
    std::lock_guard lock(open_mutex_);
    const auto it = open_.find(id);
    if (it == open_.end()) return;
    rank = it->second->route.rank;
  }
  ranks_[rank]->Cancel(id);
}

void EngineImpl::ResetPrefixCache() {
  router_.Forget();
  for (const auto& rank : ranks_) rank->ResetPrefixCache();
}

std::vector<EngineStats> EngineImpl::rank_stats() const {
  std::vector<EngineStats> each;
  for (const auto& rank : ranks_) each.push_back(rank->stats());
  return each;
}

absl::Status EngineImpl::health() const {
  for (const auto& rank : ranks_) {
    if (absl::Status health = rank->health(); !health.ok()) return health;
  }
  return absl::OkStatus();
}

void EngineImpl::Emit(Scheduler::Deltas* deltas) {
  std::lock_guard lock(output_mutex_);
  if (output_.empty()) output_.swap(*deltas);
  std::move(deltas->begin(), deltas->end(), std::back_inserter(output_));
  deltas->clear();
  output_filled_.notify_one();
}

void EngineImpl::RunOutput() {
  Scheduler::Deltas batch;
  while (true) {
    {
      std::unique_lock lock(output_mutex_);
      output_filled_.wait(lock, [this] { return is_output_done_ || !output_.empty(); });
      if (output_.empty()) return;
      batch.swap(output_);
    }
    for (auto& [id, delta] : batch) {
      const bool is_last = delta.finish_reason != FinishReason::kNone;
      OpenRequest* open = nullptr;
      std::unique_ptr<OpenRequest> ending;
      {
        std::lock_guard lock(open_mutex_);
        auto it = open_.find(id);
        CHECK(it != open_.end(), "request {} is not open", id);
        open = it->second.get();
        if (is_last) {
          ending = std::move(it->second);
          open_.erase(it);
        }
      }
      if (is_last) {
        router_.HasEnded(open->route, open->has_begun);
      } else if (!open->has_begun && !delta.tokens.empty()) {
        open->has_begun = true;
        router_.HasBegun(open->route);
      }
      open->sink(std::move(delta));
    }
    batch.clear();
  }
}

}  // namespace

void EngineStats::Add(const EngineStats& other) {
  for (const auto member :
       {&EngineStats::running, &EngineStats::waiting, &EngineStats::blocks_total, &EngineStats::blocks_used,
        &EngineStats::blocks_idle, &EngineStats::waiting_for_slots, &EngineStats::waiting_for_blocks}) {
    this->*member += other.*member;
  }
  for (const auto member : {&EngineStats::steps, &EngineStats::prompt_tokens, &EngineStats::cached_prompt_tokens,
                            &EngineStats::prefix_cache_queries, &EngineStats::prefix_cache_evictions,
                            &EngineStats::recomputed_tokens, &EngineStats::generated_tokens, &EngineStats::preemptions,
                            &EngineStats::draft_tokens, &EngineStats::accepted_draft_tokens, &EngineStats::drafts}) {
    this->*member += other.*member;
  }
  for (size_t i = 0; i < accepted_by_place.size(); ++i) accepted_by_place[i] += other.accepted_by_place[i];
  host_seconds += other.host_seconds;
  step_rows.Add(other.step_rows);
}

EngineStats Engine::stats() const {
  EngineStats all;
  for (const EngineStats& rank : rank_stats()) all.Add(rank);
  return all;
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, const TokenizerInfo& tokenizer) {
  auto engine = std::make_unique<EngineImpl>(options);
  const absl::Status status = engine->Start(tokenizer);
  if (!status.ok()) return status;
  return engine;
}

}  // namespace cachalot
