// Engine: one checkpoint, its rank, and the way of requests there and of deltas back.
#include "engine/engine.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_format.h"
#include "engine/model/generation_config.h"
#include "engine/model/random_checkpoint.h"
#include "engine/rank.h"
#include "engine/validation.h"

namespace cachalot {
namespace {

class EngineImpl : public Engine {
 public:
  explicit EngineImpl(const EngineOptions& options) : options_(options) {}
  ~EngineImpl() override;

  absl::Status Start(const TokenizerInfo& tokenizer);
  absl::StatusOr<RequestId> Submit(Request request, DeltaSink sink) override;
  void Cancel(RequestId id) override { rank_->Cancel(id); }
  void ResetPrefixCache() override { rank_->ResetPrefixCache(); }
  EngineStats stats() const override { return rank_->stats(); }
  const ModelInfo& model() const override { return model_info_; }
  absl::Status health() const override { return rank_->health(); }

 private:
  absl::Status Open();
  absl::Status ReadEndTokens(const TokenizerInfo& tokenizer);
  void Emit(Scheduler::Deltas* deltas);
  void RunOutput();

  const EngineOptions options_;
  ServedModel model_;
  ModelInfo model_info_;
  std::unique_ptr<Rank> rank_;

  std::mutex submit_mutex_;  // from the count of those that wait until there is one more; ids rise with arrival
  RequestId next_id_ = 1;

  // Delta queue: step thread -> output thread.
  std::mutex output_mutex_;
  std::condition_variable output_filled_;
  std::deque<std::pair<RequestId, Delta>> output_;
  bool is_output_done_ = false;

  // NOTE: a lock of their own: the output thread takes it for every delta, and the step thread must not wait for one
  // who was interrupted while holding it.
  std::mutex sinks_mutex_;
  absl::flat_hash_map<RequestId, std::unique_ptr<DeltaSink>> sinks_;

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

absl::Status EngineImpl::Start(const TokenizerInfo& tokenizer) {
  absl::Status status = ValidateOptions(options_);
  if (status.ok()) status = Open();
  if (status.ok()) status = ReadEndTokens(tokenizer);
  if (!status.ok()) return status;
  const int vocab_size = model_.config.vocab_size;
  model_.num_valid_tokens = tokenizer.valid_tokens > 0 ? std::min(tokenizer.valid_tokens, vocab_size) : vocab_size;
  auto rank = Rank::Create(options_, model_);
  if (!rank.ok()) return rank.status();
  rank_ = *std::move(rank);

  model_info_.model_type = model_.config.model_type;
  model_info_.backend = rank_->backend_name();
  model_info_.vocab_size = vocab_size;
  model_info_.max_model_len = rank_->max_model_len();
  model_info_.max_waiting = options_.max_waiting;
  model_info_.kv_cache_tokens = rank_->kv_cache_tokens();
  model_info_.kv_bytes_per_token = rank_->kv_bytes_per_token();
  model_info_.bos_token_id = model_.config.bos_token_id;
  model_info_.eos_token_ids = model_.eos_token_ids;
  output_thread_ = std::thread([this] { RunOutput(); });
  rank_->Start([this](Scheduler::Deltas* deltas) { Emit(deltas); });
  return absl::OkStatus();
}

// NOTE: whoever waits for an answer has its end before the device's memory is freed.
EngineImpl::~EngineImpl() {
  if (rank_ != nullptr) rank_->Stop();
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
  if (const absl::Status health = rank_->health(); !health.ok()) return absl::UnavailableError(health.message());
  if (rank_->stats().waiting >= options_.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrFormat("%d requests are waiting already", options_.max_waiting));
  }
  const RequestId id = next_id_++;
  sequence->id = id;
  {
    std::lock_guard sinks_lock(sinks_mutex_);
    sinks_[id] = std::make_unique<DeltaSink>(std::move(sink));
  }
  if (absl::Status refused = rank_->Submit(std::move(sequence)); !refused.ok()) {
    std::lock_guard sinks_lock(sinks_mutex_);
    sinks_.erase(id);
    return refused;
  }
  return id;
}

void EngineImpl::Emit(Scheduler::Deltas* deltas) {
  std::lock_guard lock(output_mutex_);
  for (auto& delta : *deltas) output_.push_back(std::move(delta));
  deltas->clear();
  output_filled_.notify_one();
}

void EngineImpl::RunOutput() {
  std::deque<std::pair<RequestId, Delta>> batch;
  while (true) {
    {
      std::unique_lock lock(output_mutex_);
      output_filled_.wait(lock, [this] { return is_output_done_ || !output_.empty(); });
      if (output_.empty()) return;
      batch.swap(output_);
    }
    for (auto& [id, delta] : batch) {
      const bool is_last = delta.finish_reason != FinishReason::kNone;
      DeltaSink* sink = nullptr;
      std::unique_ptr<DeltaSink> ending;
      {
        std::lock_guard lock(sinks_mutex_);
        auto it = sinks_.find(id);
        CHECK(it != sinks_.end(), "request {} has no sink", id);
        sink = it->second.get();
        if (is_last) {
          ending = std::move(it->second);
          sinks_.erase(it);
        }
      }
      (*sink)(std::move(delta));
    }
    batch.clear();
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, const TokenizerInfo& tokenizer) {
  auto engine = std::make_unique<EngineImpl>(options);
  const absl::Status status = engine->Start(tokenizer);
  if (!status.ok()) return status;
  return engine;
}

}  // namespace cachalot
