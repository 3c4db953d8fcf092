// CompletionCall: one POST /v1/completions or /v1/chat/completions from its parsed request to its last byte.
#ifndef CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_
#define CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/http/answer_writer.h"
#include "server/http/http_server.h"
#include "server/http/openai_request.h"
#include "server/mutex.h"
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

  void StreamEvent(int choice_idx, GenerateEvent event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void GatherEvent(int choice_idx, GenerateEvent event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void BeginStream() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountCached() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FinishAnswer() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FailAnswer(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Generator* const generator_;
  const std::shared_ptr<HttpResponder> responder_;
  const AnswerView view_;
  const int num_answers_;  // to each prompt
  const AnswerWriter writer_;
  std::vector<std::shared_ptr<const GeneratePlan>> plans_;  // one a prompt

  Mutex mutex_;
  std::vector<std::shared_ptr<Generation>> generations_ ABSL_GUARDED_BY(mutex_);
  // Gathered so far; of a stream what waits for the client; prompt: to be shown.
  std::vector<AnswerChoice> choices_ ABSL_GUARDED_BY(mutex_);
  std::vector<Usage> choice_usages_ ABSL_GUARDED_BY(mutex_);  // of each alone, as continuous usage tells them
  size_t num_held_scores_ ABSL_GUARDED_BY(mutex_) = 0;
  int num_running_ ABSL_GUARDED_BY(mutex_) = 0;
  Usage usage_ ABSL_GUARDED_BY(mutex_);        // of all
  std::string bytes_ ABSL_GUARDED_BY(mutex_);  // of a stream's next write
  bool has_begun_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_over_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_cancelled_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_COMPLETION_CALL_H_
