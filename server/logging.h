// Logs: lines of text for people, or JSON objects for machines, on stderr.
//
// A message may carry fields: "the request ended\tprompt_tokens=12\tfinish=stop". As text the tabs become spaces; as
// JSON the fields become keys, numbers unquoted.
#ifndef CACHALOT_SERVER_LOGGING_H_
#define CACHALOT_SERVER_LOGGING_H_

#include <string>
#include <string_view>

namespace cachalot {

enum class LogFormat { kText, kJson };
// What is logged of a generation when it has ended.
enum class RequestLog { kNone, kSummary, kPrompts };

// Sets up the process's log; `level` is one of spdlog's names (debug, info, warning, error). Call it once, before
// threads.
void SetUpLogging(LogFormat format, const std::string& level);

// A line of JSON, without its end, for a message with fields. `time` as RFC 3339.
std::string JsonLogLine(std::string_view time, std::string_view level, std::string_view message);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_LOGGING_H_
