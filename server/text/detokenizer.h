// Token ids to text, as the tokens come.
#ifndef CACHALOT_SERVER_TEXT_DETOKENIZER_H_
#define CACHALOT_SERVER_TEXT_DETOKENIZER_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "server/text/tokenizer.h"

namespace cachalot {

// One stream of tokens. A token may end within a character; its bytes are held back until the character is
// complete or cannot be. What Push and Flush return, put together, is Tokenizer::Decode of all the ids.
// For one thread at a time.
class Detokenizer {
 public:
  // `tokenizer` must outlive this. `skip_special` leaves out tokens with is_special(), except those in `shown`.
  explicit Detokenizer(const Tokenizer& tokenizer, bool skip_special = true, std::vector<int32_t> shown = {})
      : tokenizer_(tokenizer), skip_special_(skip_special), shown_(std::move(shown)) {}

  // Adds a token and returns the text that is now certain, well-formed UTF-8, often empty. An id without a
  // token adds nothing.
  std::string Push(int32_t id);

  // Ends the stream: returns U+FFFD if a character was left incomplete, else nothing. The next Push starts
  // a new stream.
  std::string Flush();

 private:
  bool IsSkipped(int32_t id) const;

  const Tokenizer& tokenizer_;
  const bool skip_special_;
  const std::vector<int32_t> shown_;
  std::string held_;  // the beginning of a character, at most 3 bytes
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_DETOKENIZER_H_
