// Logs: lines of text for people, or JSON objects for machines, on stderr.
//
// A message may carry fields: "the request ended\tprompt_tokens=12\tfinish=stop". As text the tabs become spaces; as
// JSON the fields become keys, numbers unquoted.
#ifndef CACHALOT_SERVER_LOGGING_H_
#define CACHALOT_SERVER_LOGGING_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace cachalot {

enum class LogFormat { kText, kJson };
// What is logged of a generation when it has ended.
enum class RequestLog { kNone, kSummary, kPrompts };

// Gives descriptors 0 to 2 to /dev/null where they are closed, so that no socket gets what is printed. Call it before
// anything is opened.
void OpenStandardFiles();

// Sets up the process's log: whoever logs waits for nobody, see LogQueue; `level` is one of spdlog's names (debug,
// info, warning, error). Call it once, before threads.
void SetUpLogging(LogFormat format, const std::string& level);

// Messages that the process's log has dropped because nobody read it fast enough.
uint64_t NumDroppedLogMessages();

// A line of JSON, without its end, for a message with fields. `time` as RFC 3339.
std::string JsonLogLine(std::string_view time, std::string_view level, std::string_view message);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_LOGGING_H_
