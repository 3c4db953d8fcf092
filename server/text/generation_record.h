// GenerationRecord: what an operator learns of one generation: metrics, and a line in the log.
#ifndef CACHALOT_SERVER_TEXT_GENERATION_RECORD_H_
#define CACHALOT_SERVER_TEXT_GENERATION_RECORD_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "server/logging.h"
#include "server/metrics.h"
#include "server/text/generate.h"
#include "server/text/tokenizer.h"

namespace cachalot {

// Begins when it is made, and leaves no trace unless it is told of a last event; for one thread at a time.
class GenerationRecord {
 public:
  // `metrics` may be null; it and `tokenizer` (which may be null too) must outlive this.
  GenerationRecord(Metrics* metrics, RequestLog log, const GeneratePlan& plan, const Tokenizer* tokenizer);

  // Told of each event; `times` are the engine's, known in the last.
  void OnEvent(const GenerateEvent& event, const RequestTimes& times);

 private:
  void LogEnd(const GenerateEvent& event, const RequestTimes& times, absl::Time now) const;

  Metrics* const metrics_;
  const RequestLog log_;
  const int64_t num_prompt_tokens_, max_tokens_;
  GenerationTimes times_;
  absl::Time first_token_ = absl::InfinitePast();
  std::string prompt_, answer_;  // for the log, when it asks
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_GENERATION_RECORD_H_
