// CompletionCall: one POST /v1/completions from its parsed request to its last byte.
#ifndef CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_
#define CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/http/http_server.h"
#include "server/http/openai_request.h"
#include "server/http/openai_response.h"
#include "server/text/generator.h"

namespace cachalot {

// Starts a generation for each choice, gathers or streams what they say, and cancels them all when the client leaves
// or one of them fails. Lives until the last generation has ended.
class CompletionCall : public std::enable_shared_from_this<CompletionCall> {
 public:
  // Answers through `responder`, now or later. `generator` must outlive every generation.
  static void Run(Generator* generator, std::string model_name, CompletionRequest request,
                  std::shared_ptr<HttpResponder> responder);

 private:
  CompletionCall(Generator* generator, std::string model_name, const CompletionRequest& request,
                 std::shared_ptr<HttpResponder> responder);

  absl::Status Prepare(CompletionRequest request);
  void Start();
  void CancelAll();
  void OnEvent(int choice_idx, GenerateEvent event);

  // REQUIRES: mutex_ is held.
  void StreamEvent(int choice_idx, GenerateEvent event);
  void CollectEvent(int choice_idx, GenerateEvent event);
  void BeginStream();
  void FinishAnswer();
  void FailAnswer(const absl::Status& status);
  Usage TotalUsage() const;
  CompletionPart NewPart(int choice_idx) const;

  Generator* const generator_;
  const std::shared_ptr<HttpResponder> responder_;
  const bool is_stream_, include_usage_;
  const int num_answers_;  // to each prompt
  CompletionView view_;
  CompletionHeader header_;
  std::vector<std::shared_ptr<const GeneratePlan>> plans_;  // one a prompt

  std::mutex mutex_;  // guards all below
  std::vector<std::shared_ptr<Generation>> generations_;
  std::vector<CompletionPart> choices_;  // gathered so far; none of a stream
  std::vector<bool> has_sent_;           // stream: a chunk of this choice
  int num_running_ = 0;
  int64_t completion_tokens_ = 0;
  bool has_begun_ = false, is_over_ = false, is_cancelled_ = false;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_
