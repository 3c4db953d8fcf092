// Serving: everything between the command line and the sockets: ports, tokenizer, engine, protocols.
#ifndef CACHALOT_SERVER_CLI_SERVING_H_
#define CACHALOT_SERVER_CLI_SERVING_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "engine/engine.h"
#include "server/grpc/grpc_server.h"
#include "server/http/http_server.h"
#include "server/http/openai.h"
#include "server/metrics.h"
#include "server/options.h"
#include "server/text/generator.h"
#include "server/text/tokenizer.h"

namespace cachalot {

// Bind, Load, Start, then BeginDrain and Stop; from one thread. What is logged is the caller's to set up.
class Serving {
 public:
  explicit Serving(const ServeOptions& options);
  ~Serving();  // stops

  // Takes the ports, so that one in use is known before a slow load.
  absl::Status Bind();
  // Loads the tokenizer and the model. Cannot be interrupted.
  absl::Status Load();
  // Serves from now on.
  absl::Status Start();

  int http_port() const { return http_.port(); }
  // "ready: http://...": where, what and how much.
  std::string ReadyLine() const;
  // The engine's health, from Start on.
  absl::Status health() const { return engine_->health(); }

  // Takes no new generations: readiness drops, what is in flight goes on.
  void BeginDrain();
  // Generations in flight.
  int num_running() const { return generator_->num_running(); }
  // Ends what is left with an error, which is still sent, and closes the ports.
  void Stop();
  // After the engine failed, which ended everything in flight with an error: gives these `grace` to be sent and closes
  // the ports. The engine is left as it is, its device with it: the process is to end.
  void Abandon(absl::Duration grace);

 private:
  void TakeGenerationConfig();
  void LoadChatTemplate();

  const ServeOptions options_;
  HttpServer http_;
  std::unique_ptr<Tokenizer> tokenizer_;  // none: token ids only
  std::unique_ptr<Engine> engine_;
  GeneratorOptions generator_options_;
  Metrics metrics_;
  std::unique_ptr<Generator> generator_;
  std::unique_ptr<OpenAiApi> api_;
  std::unique_ptr<GrpcServer> grpc_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CLI_SERVING_H_
