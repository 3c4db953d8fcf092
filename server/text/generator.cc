// Generator: checks, token ids, submission; the engine's deltas become events on its output thread.
#include "server/text/generator.h"

#include <atomic>
#include <mutex>
#include <optional>
#include <random>
#include <shared_mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/mutex.h"
#include "server/request_error.h"
#include "server/text/answer_stream.h"
#include "server/text/generation_record.h"

namespace cachalot {
namespace {

constexpr size_t kMaxStopStrings = 16;
constexpr size_t kMaxStopBytes = 1024;  // of one string: bounds the search per token

absl::Status CheckStop(const std::vector<std::string>& stop) {
  if (stop.size() > kMaxStopStrings) {
    return FieldError("stop", absl::StrCat("stop may hold at most ", kMaxStopStrings, " strings"));
  }
  for (const std::string& text : stop) {
    if (text.empty() || text.size() > kMaxStopBytes) {
      return FieldError("stop", absl::StrCat("a stop string must have between 1 and ", kMaxStopBytes, " bytes"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

// The engine, until it is taken away.
class Generator::Gate {
 public:
  explicit Gate(Engine* engine) : engine_(engine) {}

  absl::StatusOr<RequestId> Submit(Request request, DeltaSink sink) {
    std::shared_lock lock(mutex_);
    if (engine_ == nullptr || is_draining_) return Stopping();
    num_running_.fetch_add(1);
    absl::StatusOr<RequestId> id = engine_->Submit(std::move(request), std::move(sink));
    if (!id.ok()) OnEnd();
    return id;
  }
  void OnEnd() { num_running_.fetch_sub(1); }
  int num_running() const { return num_running_.load(); }
  void Cancel(RequestId id) {
    std::shared_lock lock(mutex_);
    if (engine_ != nullptr) engine_->Cancel(id);
  }
  absl::Status ResetPrefixCache() {
    std::shared_lock lock(mutex_);
    if (engine_ == nullptr) return Stopping();
    engine_->ResetPrefixCache();
    return absl::OkStatus();
  }
  absl::Status Health() {
    std::shared_lock lock(mutex_);
    return engine_ == nullptr ? Stopping() : engine_->health();
  }
  std::vector<EngineStats> RankStats() {
    std::shared_lock lock(mutex_);
    return engine_ == nullptr ? std::vector<EngineStats>(1) : engine_->rank_stats();
  }
  void BeginDrain() { is_draining_ = true; }
  bool is_draining() const { return is_draining_; }
  void Close() {
    std::unique_lock lock(mutex_);
    engine_ = nullptr;
  }

 private:
  static absl::Status Stopping() { return absl::UnavailableError("the server is stopping"); }

  std::shared_mutex mutex_;
  Engine* engine_;  // guarded by mutex_; shared: may be called
  std::atomic<bool> is_draining_ = false;
  std::atomic<int> num_running_ = 0;
};

// The engine's sink keeps it alive until the last delta, its starter as long as it may cancel.
class Generator::LiveGeneration : public Generation {
 public:
  LiveGeneration(std::shared_ptr<Gate> gate, const GeneratorOptions& options, std::shared_ptr<const GeneratePlan> plan,
                 const Tokenizer* tokenizer, EventSink sink)
      : gate_(std::move(gate)),
        record_(options.metrics, options.log, *plan, tokenizer),
        stream_(std::move(plan), tokenizer),
        sink_(std::move(sink)) {}

  // On the engine's output thread.
  void OnDelta(Delta delta) {
    if (stream_.ended()) return;
    const bool engine_ended = delta.finish_reason != FinishReason::kNone;
    const RequestTimes times = delta.times;
    GenerateEvent event = stream_.Next(std::move(delta));
    const bool ended = stream_.ended();
    record_.OnEvent(event, times);
    if (ended && !engine_ended) Cancel();
    const bool is_empty = event.text.empty() && event.reasoning.empty() && event.tokens.empty() && event.scores.empty();
    if (ended || !is_empty) sink_(std::move(event));
    if (!ended) return;
    sink_ = nullptr;
    gate_->OnEnd();
  }

  void Cancel() override {
    std::optional<RequestId> id;
    {
      MutexLock lock(&mutex_);
      is_cancelled_ = true;
      id = id_;
    }
    if (id.has_value()) gate_->Cancel(*id);
  }

  // The id is known only after Submit: a cancellation that came before is made up for.
  void SetId(RequestId id) {
    bool is_cancelled;
    {
      MutexLock lock(&mutex_);
      id_ = id;
      is_cancelled = is_cancelled_;
    }
    if (is_cancelled) gate_->Cancel(id);
  }

 private:
  const std::shared_ptr<Gate> gate_;
  GenerationRecord record_;  // this and the next two: the output thread's
  AnswerStream stream_;
  EventSink sink_;
  Mutex mutex_;
  std::optional<RequestId> id_ ABSL_GUARDED_BY(mutex_);
  bool is_cancelled_ ABSL_GUARDED_BY(mutex_) = false;
};

Generator::Generator(Engine* engine, const Tokenizer* tokenizer, GeneratorOptions options)
    : gate_(std::make_shared<Gate>(engine)), model_(engine->model()), tokenizer_(tokenizer), options_(options) {}

Generator::~Generator() { Stop(); }

void Generator::Stop() { gate_->Close(); }

void Generator::BeginDrain() { gate_->BeginDrain(); }

absl::Status Generator::health() const {
  return gate_->is_draining() ? absl::UnavailableError("the server is stopping") : gate_->Health();
}

absl::Status Generator::engine_health() const { return gate_->Health(); }

absl::Status Generator::ResetPrefixCache() { return gate_->ResetPrefixCache(); }

std::vector<EngineStats> Generator::rank_stats() const { return gate_->RankStats(); }

int Generator::num_running() const { return gate_->num_running(); }

absl::StatusOr<std::vector<int32_t>> Generator::Tokenize(std::string_view text, bool add_special_tokens,
                                                         bool match_special) const {
  if (tokenizer_ == nullptr) {
    return FieldError("prompt", "this model is served without a tokenizer: send the prompt as token ids");
  }
  const bool add_bos = add_special_tokens && tokenizer_->add_bos_token();
  absl::StatusOr<std::vector<int32_t>> ids =
      tokenizer_->Encode(text, {.match_special = match_special, .add_bos = add_bos});
  if (!ids.ok()) return WithField(ids.status(), "prompt");
  return ids;
}

absl::StatusOr<std::vector<int32_t>> Generator::Tokenize(const ChatPrompt& chat) const {
  ReasoningStart reasoning;
  return TokenizeChat(chat, &reasoning);
}

absl::StatusOr<std::string> Generator::Detokenize(std::span<const int32_t> ids, std::string_view field,
                                                  size_t max_bytes) const {
  if (tokenizer_ == nullptr) return FieldError(field, "this model is served without a tokenizer");
  const absl::string_view name(field.data(), field.size());
  size_t num_bytes = 0;
  for (const int32_t token : ids) {
    if (token < 0 || token >= model_.vocab_size) {
      return FieldError(field, absl::StrCat(name, " holds ", token, "; token ids are 0 to ", model_.vocab_size - 1));
    }
    num_bytes += tokenizer_->num_token_bytes(token);
  }
  // NOTE: a token of three bytes in a request may be a hundred of text.
  if (num_bytes > max_bytes) {
    return FieldError(field, absl::StrCat("the text of ", name, " has ", num_bytes, " bytes, more than ", max_bytes));
  }
  return tokenizer_->Decode(ids, /*skip_special=*/false);
}

absl::StatusOr<std::vector<int32_t>> Generator::TokenizeChat(const ChatPrompt& chat, ReasoningStart* reasoning) const {
  if (tokenizer_ == nullptr) {
    return FieldError("messages", "this model is served without a tokenizer: send a prompt of token ids");
  }
  if (!options_.chat_template.has_value()) {
    return FieldError("messages", absl::StrCat("no chat template is known for this model: start the server with "
                                               "--chat-template and one of ",
                                               ChatTemplate::Names()));
  }
  const std::optional<int32_t> bos = tokenizer_->bos_id();
  const absl::StatusOr<RenderedChat> rendered =
      options_.chat_template->Render(chat, bos.has_value() ? tokenizer_->TokenBytes(*bos) : "");
  if (!rendered.ok()) return rendered.status();
  if (absl::Status status = CheckTextFits(rendered->text, "messages"); !status.ok()) return status;
  *reasoning = rendered->reasoning;
  EncodeOptions options;
  if (!options_.allow_special_tokens) options.trusted = &rendered->trusted;
  absl::StatusOr<std::vector<int32_t>> ids = tokenizer_->Encode(rendered->text, options);
  if (!ids.ok()) return WithField(ids.status(), "messages");
  return ids;
}

absl::StatusOr<std::shared_ptr<const GeneratePlan>> Generator::Prepare(GenerateCall call) const {
  auto plan = std::make_shared<GeneratePlan>();
  plan->sampling = std::move(call.sampling);
  if (call.fill_context) plan->sampling.max_tokens = model_.max_model_len;
  if (absl::Status status = ValidateSampling(plan->sampling, model_); !status.ok()) return status;
  if (plan->sampling.max_tokens == 0 && !call.echo) {
    return FieldError("max_tokens", "max_tokens must be at least 1, or 0 together with echo");
  }
  if (absl::Status status = CheckStop(call.stop); !status.ok()) return status;
  if (!call.stop.empty() && tokenizer_ == nullptr) {
    return FieldError("stop", "this model is served without a tokenizer: stop at stop_token_ids");
  }
  if (absl::Status status = MakePrompt(&call, plan.get()); !status.ok()) return status;
  if (call.fill_context) {
    plan->sampling.max_tokens = model_.max_model_len - static_cast<int>(plan->prompt.size());
    if (absl::Status status = ValidateSampling(plan->sampling, model_); !status.ok()) return status;
  }
  plan->sampling.prompt_logprobs = call.echo ? plan->sampling.logprobs : -1;
  plan->stop = std::move(call.stop);
  plan->echo = call.echo;
  plan->include_stop = call.include_stop;
  plan->skip_special_tokens = call.skip_special_tokens;
  plan->priority = call.priority;
  plan->client = std::move(call.client);
  plan->cache_salt = std::move(call.cache_salt);
  plan->deadline = call.deadline;
  return plan;
}

absl::Status Generator::MakePrompt(GenerateCall* call, GeneratePlan* plan) const {
  const bool needs_room = plan->sampling.max_tokens > 0;
  if (const auto* chat = std::get_if<ChatPrompt>(&call->prompt)) {
    absl::StatusOr<std::vector<int32_t>> ids = TokenizeChat(*chat, &plan->reasoning);
    if (!ids.ok()) return ids.status();
    plan->prompt = std::move(*ids);
    return CheckPrompt(plan->prompt, needs_room, "messages");
  }
  if (const auto* text = std::get_if<std::string>(&call->prompt)) {
    if (absl::Status status = CheckTextFits(*text, "prompt"); !status.ok()) return status;
    absl::StatusOr<std::vector<int32_t>> ids = Tokenize(*text, call->add_special_tokens, call->match_special);
    if (!ids.ok()) return ids.status();
    plan->prompt = std::move(*ids);
    plan->num_added = call->add_special_tokens && tokenizer_->add_bos_token() ? 1 : 0;
  } else {
    plan->prompt = std::move(std::get<std::vector<int32_t>>(call->prompt));
  }
  return CheckPrompt(plan->prompt, needs_room, "prompt");
}

// A text so long that no tokens could be long enough is not worth the time to make them.
absl::Status Generator::CheckTextFits(std::string_view text, std::string_view field) const {
  const size_t most = tokenizer_ == nullptr ? 0 : tokenizer_->max_token_bytes() * model_.max_model_len;
  if (tokenizer_ == nullptr || text.size() <= most) return absl::OkStatus();
  return FieldError(field,
                    absl::StrCat("This model's maximum context length is ", model_.max_model_len,
                                 " tokens, and the prompt's ", text.size(), " bytes have more"),
                    "context_length_exceeded");
}

absl::Status Generator::CheckPrompt(const std::vector<int32_t>& prompt, bool needs_room, std::string_view field) const {
  if (prompt.empty()) return FieldError(field, "the prompt must hold at least one token");
  for (const int32_t token : prompt) {
    if (token >= 0 && token < model_.vocab_size) continue;
    return FieldError(
        field, absl::StrCat("the prompt holds token id ", token, "; token ids are 0 to ", model_.vocab_size - 1));
  }
  const size_t needed = prompt.size() + (needs_room ? 1 : 0);
  if (needed <= static_cast<size_t>(model_.max_model_len)) return absl::OkStatus();
  return FieldError(field,
                    absl::StrCat("This model's maximum context length is ", model_.max_model_len,
                                 " tokens, but the prompt has ", prompt.size(), " and needs room for an answer"),
                    "context_length_exceeded");
}

absl::StatusOr<std::shared_ptr<Generation>> Generator::Start(std::shared_ptr<const GeneratePlan> plan, uint32_t choice,
                                                             EventSink sink) {
  Request request{.prompt = plan->prompt,
                  .sampling = plan->sampling,
                  .priority = plan->priority,
                  .client = plan->client,
                  .cache_salt = plan->cache_salt,
                  .deadline = plan->deadline};
  request.sampling.choice = choice;
  auto generation = std::make_shared<LiveGeneration>(gate_, options_, std::move(plan), tokenizer_, std::move(sink));
  absl::StatusOr<RequestId> id =
      gate_->Submit(std::move(request), [generation](Delta delta) { generation->OnDelta(std::move(delta)); });
  if (!id.ok()) return id.status();
  generation->SetId(*id);
  return generation;
}

uint64_t RandomSeed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

}  // namespace cachalot
