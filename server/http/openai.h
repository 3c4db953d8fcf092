// OpenAiApi: the routes of OpenAI's HTTP API, and those that clients, benchmarks and orchestrators expect beside them.
#ifndef CACHALOT_SERVER_HTTP_OPENAI_H_
#define CACHALOT_SERVER_HTTP_OPENAI_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "server/http/http_server.h"
#include "server/http/openai_request.h"
#include "server/metrics.h"
#include "server/text/generator.h"

namespace cachalot {

// POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize, /reset_prefix_cache; GET /v1/models,
// /v1/models/{id}, /metrics, /version, /livez (the process answers), /health (the engine works), /readyz (and takes
// requests).
class OpenAiApi {
 public:
  // `model_name` is the name clients use, `model_root` where the model came from. `generator`, `metrics` and this
  // object must outlive the server's last request.
  OpenAiApi(Generator* generator, const Metrics* metrics, std::string model_name, std::string model_root,
            std::string version);

  void Register(HttpServer* server);

 private:
  using Responder = std::shared_ptr<HttpResponder>;

  void Completions(HttpRequest request, Responder responder) const;
  void ChatCompletions(HttpRequest request, Responder responder) const;
  void Answer(const HttpRequest& request, absl::StatusOr<CompletionRequest> completion, Responder responder) const;
  void Tokenize(HttpRequest request, Responder responder) const;
  void Detokenize(HttpRequest request, Responder responder) const;
  void ResetPrefixCache(HttpRequest request, Responder responder) const;
  void Models(HttpRequest request, Responder responder) const;
  void Model(HttpRequest request, Responder responder) const;
  void Ready(HttpRequest request, Responder responder) const;
  void Health(HttpRequest request, Responder responder) const;
  void MetricsPage(HttpRequest request, Responder responder) const;
  std::string ModelJson() const;

  Generator* const generator_;
  const Metrics* const metrics_;
  const std::string model_name_, model_root_, version_;
  const int64_t created_;  // seconds since 1970
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_OPENAI_H_
