// The order of things: ports, tokenizer, engine, protocols, ready; and backwards.
#include "server/cli/serving.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/inspect.h"
#include "server/http/openai_error.h"
#include "server/listener.h"
#include "server/text/chat_template.h"

namespace cachalot {
namespace {

constexpr absl::Duration kStopGrace = absl::Seconds(2);
// Of a protocol: of the descriptors, so that one cannot take the other's; and of what memory each connection takes.
constexpr double kConnectionShare = 0.45;
constexpr int kMaxConnections = 16384;

// Two carry 300,000 events a second; the rest of a machine is for the model.
int NumIoThreads() { return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 8, 2, 8); }

}  // namespace

Serving::Serving(const ServeOptions& options)
    : options_(options),
      http_({.host = options.host, .port = options.port, .num_threads = NumIoThreads()}, HttpErrorResponse) {}

Serving::~Serving() { Stop(); }

absl::Status Serving::Bind() {
  RaiseFileLimit();
  if (absl::Status status = http_.Bind(); !status.ok() || options_.grpc_port < 0) return status;
  grpc_ = std::make_unique<GrpcServer>(
      GrpcFrontOptions{.host = options_.host, .port = options_.grpc_port, .num_threads = NumIoThreads()});
  return grpc_->Bind();
}

// NOTE: what is said about the tokenizer waits, so that a checkpoint that cannot be served gets one line.
absl::Status Serving::Load() {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(options_.engine.model_dir);
  const bool can_do_without = absl::IsNotFound(tokenizer.status()) || absl::IsUnimplemented(tokenizer.status());
  if (!tokenizer.ok() && !can_do_without) return tokenizer.status();
  TokenizerInfo info;
  if (tokenizer.ok()) info = {.valid_tokens = (*tokenizer)->vocab_size(), .eos_token_id = (*tokenizer)->eos_id()};
  absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(options_.engine, info);
  if (!engine.ok()) return engine.status();
  engine_ = *std::move(engine);
  TakeGenerationConfig();
  if (tokenizer.ok()) {
    tokenizer_ = *std::move(tokenizer);
    LoadChatTemplate();
  } else {
    spdlog::warn("no text, only token ids: {}", std::string(tokenizer.status().message()));
  }
  return absl::OkStatus();
}

void Serving::TakeGenerationConfig() {
  const ModelInfo& model = engine_->model();
  if (model.eos_token_ids.empty()) {
    spdlog::warn(
        "neither generation_config.json nor config.json nor the tokenizer names a token that ends answers: they go on "
        "until max_tokens, a stop string or the end of the context");
  }
  if (options_.generation_config == "none") return;
  generator_options_.sampling = model.sampling;
  const std::string sampling = DescribeSampling(model.sampling);
  if (sampling.empty()) return;
  spdlog::info("requests that say nothing are drawn with {} (generation_config.json)", sampling);
}

void Serving::LoadChatTemplate() {
  if (!options_.chat_template.empty()) {
    generator_options_.chat_template = ChatTemplate::ParseName(options_.chat_template);
    return;
  }
  const auto detected = ChatTemplate::Load(options_.engine.model_dir);
  if (!detected.ok()) {
    spdlog::warn("no chats, only completions: {}; --chat-template names one", std::string(detected.status().message()));
    return;
  }
  generator_options_.chat_template = detected->chat_template;
  if (!detected->is_exact) {
    spdlog::warn("the checkpoint's chat template is unknown but looks like {}: chats are written as that does",
                 detected->chat_template.Name());
  }
}

absl::Status Serving::Start() {
  generator_options_.allow_special_tokens = options_.allow_special_tokens;
  generator_options_.metrics = &metrics_;
  generator_options_.log = options_.log_requests;
  generator_ = std::make_unique<Generator>(engine_.get(), tokenizer_.get(), generator_options_);
  api_ = std::make_unique<OpenAiApi>(generator_.get(), &metrics_, options_.served_model_name, options_.engine.model_dir,
                                     std::string(Version()));
  api_->Register(&http_);
  // Everything else has its files open by now.
  const int max_http = MaxConnections(kConnectionShare, 1, kMaxConnections);
  if (grpc_ != nullptr) {
    const int max_grpc = MaxConnections(kConnectionShare, GrpcFront::kFilesAConnection, kMaxConnections);
    absl::Status status = grpc_->Start(max_grpc, generator_.get(), options_.served_model_name);
    if (!status.ok()) return status;
  }
  return http_.Start(max_http);
}

std::string Serving::ReadyLine() const {
  const ModelInfo& model = generator_->model();
  const auto& chat_template = generator_options_.chat_template;
  const std::string host =
      absl::StrContains(options_.host, ':') ? absl::StrCat("[", options_.host, "]") : options_.host;
  return absl::StrCat("ready: http://", host, ":", http_.port(),
                      grpc_ == nullptr ? "" : absl::StrCat(", gRPC ", host, ":", grpc_->port()), ", model ",
                      options_.served_model_name, " (", model.model_type, ") on ", model.backend, ", context ",
                      model.max_model_len, " tokens, KV cache ", model.kv_cache_tokens, " tokens, chats ",
                      chat_template.has_value() ? absl::StrCat("as ", std::string(chat_template->Name())) : "off");
}

void Serving::BeginDrain() {
  generator_->BeginDrain();
  if (grpc_ != nullptr) grpc_->SetServing(false);
}

void Serving::Stop() {
  http_.StopAccepting();
  if (grpc_ != nullptr) grpc_->SetServing(false);
  if (generator_ != nullptr) generator_->Stop();
  engine_.reset();
  http_.Stop(kStopGrace);
  if (grpc_ != nullptr) grpc_->Stop(kStopGrace);
}

void Serving::Abandon(absl::Duration grace) {
  const absl::Time deadline = absl::Now() + grace;
  http_.StopAccepting();
  if (grpc_ != nullptr) grpc_->SetServing(false);
  while (num_running() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(5));
  if (grpc_ != nullptr) grpc_->Stop((deadline - absl::Now()) / 2);
  http_.Stop(std::max(deadline - absl::Now(), absl::Milliseconds(50)));
}

}  // namespace cachalot
