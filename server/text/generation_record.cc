// Clocks around events.
#include "server/text/generation_record.h"

#include <spdlog/spdlog.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/text/json_text.h"

namespace cachalot {
namespace {

const char* Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop: return "stop";
    case FinishReason::kLength: return "length";
    case FinishReason::kCancelled: return "abort";
    default: return "error";
  }
}

}  // namespace

GenerationRecord::GenerationRecord(Metrics* metrics, RequestLog log, const GeneratePlan& plan,
                                   const Tokenizer* tokenizer)
    : metrics_(metrics),
      log_(log),
      num_prompt_tokens_(static_cast<int64_t>(plan.prompt.size())),
      max_tokens_(plan.sampling.max_tokens) {
  times_.start = absl::Now();
  if (log_ != RequestLog::kPrompts || tokenizer == nullptr) return;
  AppendJsonString(tokenizer->Decode(plan.prompt, /*skip_special=*/false), &prompt_);
}

void GenerationRecord::OnEvent(const GenerateEvent& event, const RequestTimes& times) {
  if (metrics_ == nullptr && log_ == RequestLog::kNone) return;
  const absl::Time now = absl::Now();
  if (first_token_ == absl::InfinitePast() && !event.tokens.empty()) first_token_ = now;
  if (metrics_ != nullptr) metrics_->OnTokens(static_cast<int>(event.tokens.size()), now, &times_);
  if (event.takes_back_reasoning) answer_.clear();
  if (log_ == RequestLog::kPrompts) absl::StrAppend(&answer_, event.reasoning, event.text);
  if (event.finish_reason == FinishReason::kNone) return;
  if (metrics_ != nullptr) {
    const GenerationSize size = {num_prompt_tokens_, max_tokens_, event.usage.completion_tokens};
    metrics_->OnEnd(event.finish_reason, size, times, now, times_);
  }
  if (log_ != RequestLog::kNone) LogEnd(event, times, now);
}

void GenerationRecord::LogEnd(const GenerateEvent& event, const RequestTimes& times, absl::Time now) const {
  std::string line = absl::StrCat(
      "a generation ended\tfinish_reason=", Name(event.finish_reason), "\tprompt_tokens=", num_prompt_tokens_,
      "\tcached_tokens=", event.usage.cached_tokens, "\tgenerated_tokens=", event.usage.completion_tokens,
      "\tseconds=", absl::ToDoubleSeconds(now - times_.start), "\tqueue_seconds=", absl::ToDoubleSeconds(times.queued));
  if (first_token_ != absl::InfinitePast()) {
    absl::StrAppend(&line, "\tfirst_token_seconds=", absl::ToDoubleSeconds(first_token_ - times_.start));
  }
  if (times.num_preemptions > 0) absl::StrAppend(&line, "\tpreemptions=", times.num_preemptions);
  if (!event.error.ok()) {
    absl::StrAppend(&line, "\terror=");
    AppendJsonString(std::string(event.error.message()), &line);
  }
  if (log_ == RequestLog::kPrompts) {
    absl::StrAppend(&line, "\tprompt=", prompt_.empty() ? "null" : prompt_, "\tanswer=");
    AppendJsonString(answer_, &line);
  }
  spdlog::info("{}", line);
}

}  // namespace cachalot
