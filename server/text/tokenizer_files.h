// Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a checkpoint, and refuses what is not
// supported.
#ifndef CACHALOT_SERVER_TEXT_TOKENIZER_FILES_H_
#define CACHALOT_SERVER_TEXT_TOKENIZER_FILES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/text/bpe.h"

namespace cachalot {

// An entry of tokenizer.json's "added_tokens". Those with `normalized` are looked for in what the others
// leave of a text.
struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool special = false;
  bool normalized = false;
};

// A byte-level BPE tokenizer as its files describe it, checked.
struct TokenizerFiles {
  std::vector<std::pair<std::string, int32_t>> vocab;  // strings as in the file; each id once
  std::vector<BpeMerge> merges;                        // in order of rank
  bool ignore_merges = false;                          // a piece that is a token is that token
  std::vector<AddedToken> added_tokens;                // no content and no id twice
  std::vector<std::string> split_patterns;             // Oniguruma syntax, applied one after another
  bool add_bos_token = false;                          // a text starts with bos_token (not a chat)
  std::optional<std::string> bos_token, eos_token;     // contents
};

// Ids in the files are below this: room for any vocabulary, and a bound on what a table by id takes.
inline constexpr int32_t kMaxTokenIds = 1 << 22;

// Reads both files of `model_dir`. NotFoundError if one is missing, UnimplementedError if they describe
// a tokenizer of a kind that is not supported (the message says which part), InvalidArgumentError if they
// are malformed or contradict themselves. Messages name the file. May be called from any thread.
absl::StatusOr<TokenizerFiles> ReadTokenizerFiles(const std::string& model_dir);

// The Jinja source of a checkpoint's chat template and the file that it is in.
struct ChatTemplateSource {
  std::string jinja, path;
};

// chat_template.jinja in `model_dir`, else "chat_template" in tokenizer_config.json: a string, or the one named
// "default" in a list of {"name", "template"}. NotFoundError when there is neither, InvalidArgumentError for a file
// that is malformed. Messages name the file. May be called from any thread.
absl::StatusOr<ChatTemplateSource> ReadChatTemplateSource(const std::string& model_dir);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_TOKENIZER_FILES_H_
