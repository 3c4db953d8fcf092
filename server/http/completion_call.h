// CompletionCall: one POST /v1/completions or /v1/chat/completions from its parsed request to its last byte.
#ifndef CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_
#define CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/http/answer_writer.h"
#include "server/http/http_server.h"
#include "server/http/openai_request.h"
#include "server/text/generator.h"

namespace cachalot {

// Starts a generation for each choice, gathers or streams what they say, and cancels them all when the client leaves
// or one of them fails. Lives until the last generation has ended.
//
// A client that takes its stream more slowly than it is made slows nobody: once more than kMaxBacklogBytes wait for it,
// tokens are gathered and sent in fewer, longer events. What waits is then the answer's text, not an event a token.
class CompletionCall : public std::enable_shared_from_this<CompletionCall> {
 public:
  static constexpr size_t kMaxBacklogBytes = 64 << 10;

  // Answers through `responder`, now or later. `generator` must outlive every generation.
  static void Run(Generator* generator, const std::string& model_name, CompletionRequest request,
                  std::shared_ptr<HttpResponder> responder);

 private:
  CompletionCall(Generator* generator, const std::string& model_name, const CompletionRequest& request,
                 std::shared_ptr<HttpResponder> responder);

  absl::Status Prepare(CompletionRequest request);
  void Start();
  void CancelAll();
  void OnEvent(int choice_idx, GenerateEvent event);

  // REQUIRES: mutex_ is held.
  void StreamEvent(int choice_idx, GenerateEvent event);
  void GatherEvent(int choice_idx, GenerateEvent event);
  void BeginStream();
  void FinishAnswer();
  void FailAnswer(const absl::Status& status);

  Generator* const generator_;
  const std::shared_ptr<HttpResponder> responder_;
  const AnswerView view_;
  const int num_answers_;  // to each prompt
  const AnswerWriter writer_;
  std::vector<std::shared_ptr<const GeneratePlan>> plans_;  // one a prompt

  std::mutex mutex_;  // guards all below
  std::vector<std::shared_ptr<Generation>> generations_;
  std::vector<AnswerChoice> choices_;  // gathered so far; of a stream what waits for the client; prompt: to be shown
  size_t num_held_scores_ = 0;
  int num_running_ = 0;
  Usage usage_;
  std::string bytes_;  // of a stream's next write
  bool has_begun_ = false, is_over_ = false, is_cancelled_ = false;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_
