// cachalot chat: a conversation in the terminal.
#ifndef CACHALOT_SERVER_CLI_CHAT_H_
#define CACHALOT_SERVER_CLI_CHAT_H_

#include "server/options.h"

namespace cachalot {

// Talks to options.url, or loads the model and serves it to itself. Reads a line a turn from stdin; answers go to
// stdout as they come, everything else to stderr. Returns the exit code: 1 if a turn or the start failed.
int Chat(const ChatOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CLI_CHAT_H_
