// The messages of a chat request: JSON to ChatPrompt.
#ifndef CACHALOT_SERVER_HTTP_CHAT_MESSAGES_H_
#define CACHALOT_SERVER_HTTP_CHAT_MESSAGES_H_

#include "server/http/json_fields.h"
#include "server/text/generate.h"

namespace cachalot {

// Reads `messages`, `add_generation_prompt`, `continue_final_message` and `chat_template_kwargs` ({"thinking": true}).
// What is wrong goes to the fields' status, naming the place ("messages[2].content"): a role that is none of system,
// developer, user, assistant and tool, contents that are not text, a message without content that is no assistant's.
void ReadChatPrompt(JsonFields* fields, ChatPrompt* prompt);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_CHAT_MESSAGES_H_
