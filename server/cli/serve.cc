// The order of things: ports, tokenizer, engine, servers, ready; and backwards.
#include "server/cli/serve.h"

#include <signal.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/engine.h"
#include "server/grpc/grpc_server.h"
#include "server/http/http_server.h"
#include "server/http/openai.h"
#include "server/http/openai_error.h"
#include "server/text/generator.h"
#include "server/text/tokenizer.h"

namespace cachalot {
namespace {

constexpr absl::Duration kHealthPeriod = absl::Seconds(1);
constexpr absl::Duration kStopGrace = absl::Seconds(2);

// SIGTERM and SIGINT as something to wait for.
class StopSignals {
 public:
  StopSignals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    signal(SIGPIPE, SIG_IGN);
  }
  // True if one came within `timeout`.
  bool Wait(absl::Duration timeout) const {
    const timespec time = absl::ToTimespec(timeout);
    return sigtimedwait(&set_, nullptr, &time) > 0;
  }
  // The next one ends the process, as it would have without us.
  void Unblock() const { pthread_sigmask(SIG_UNBLOCK, &set_, nullptr); }

 private:
  sigset_t set_;
};

// A load cannot be interrupted from within: as long as this lives, a signal ends the process.
class ExitOnSignal {
 public:
  explicit ExitOnSignal(const StopSignals& signals)
      : thread_([this, &signals] {
          while (!is_done_) {
            if (signals.Wait(absl::Milliseconds(50))) std::_Exit(0);
          }
        }) {}
  ~ExitOnSignal() {
    is_done_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> is_done_ = false;
  std::thread thread_;
};

int Fail(const absl::Status& status) {
  const std::string line = absl::StrReplaceAll(status.message(), {{"\n", " "}});
  std::fprintf(stderr, "cachalot: %s\n", line.c_str());
  return 1;
}

std::string ReadyLine(const ServeOptions& options, const ModelInfo& model, int port, const GrpcServer* grpc) {
  return absl::StrCat("ready: http://", options.host, ":", port,
                      grpc == nullptr ? "" : absl::StrCat(", gRPC ", options.host, ":", grpc->port()), ", model ",
                      options.served_model_name, " (", model.model_type, ") on ", model.backend, ", context ",
                      model.max_model_len, " tokens, KV cache ", model.kv_cache_tokens, " tokens");
}

}  // namespace

int Serve(const ServeOptions& options) {
  const StopSignals signals;
  HttpServer http({.host = options.host, .port = options.port}, HttpErrorResponse);
  if (absl::Status status = http.Bind(); !status.ok()) return Fail(status);
  if (options.grpc_port >= 0) {
    if (absl::Status status = GrpcServer::CheckPort(options.host, options.grpc_port); !status.ok()) return Fail(status);
  }

  // Load. What is said about the tokenizer waits, so that a checkpoint that cannot be served gets one line.
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = absl::UnknownError("");
  absl::StatusOr<std::unique_ptr<Engine>> engine = absl::UnknownError("");
  {
    const ExitOnSignal exit_on_signal(signals);
    tokenizer = Tokenizer::Load(options.engine.model_dir);
    const bool can_do_without = absl::IsNotFound(tokenizer.status()) || absl::IsUnimplemented(tokenizer.status());
    if (!tokenizer.ok() && !can_do_without) return Fail(tokenizer.status());
    engine = Engine::Create(options.engine, tokenizer.ok() ? (*tokenizer)->vocab_size() : 0);
  }
  if (!engine.ok()) return Fail(engine.status());
  if (!tokenizer.ok()) {
    spdlog::warn("no text, only token ids: {}", std::string(tokenizer.status().message()));
  }

  // Serve.
  Generator generator(engine->get(), tokenizer.ok() ? tokenizer->get() : nullptr);
  OpenAiApi api(&generator, options.served_model_name, options.engine.model_dir, std::string(Version()));
  api.Register(&http);
  std::unique_ptr<GrpcServer> grpc;
  if (options.grpc_port >= 0) {
    auto started = GrpcServer::Start(options.host, options.grpc_port, &generator, options.served_model_name);
    if (!started.ok()) return Fail(started.status());
    grpc = std::move(*started);
  }
  if (absl::Status status = http.Start(); !status.ok()) return Fail(status);
  spdlog::info("{}", ReadyLine(options, generator.model(), http.port(), grpc.get()));
  absl::Status health;
  while (health.ok() && !signals.Wait(kHealthPeriod)) health = generator.health();

  // Stop: no new requests, those in flight end with an error, which is still sent.
  spdlog::info("stopping{}", health.ok() ? "" : ": the engine failed");
  signals.Unblock();
  http.StopAccepting();
  if (grpc != nullptr) grpc->SetServing(false);
  generator.Stop();
  engine->reset();
  http.Stop(kStopGrace);
  if (grpc != nullptr) grpc->Stop(kStopGrace);
  return health.ok() ? 0 : 1;
}

}  // namespace cachalot
