// Text to token ids and back, exactly as Hugging Face's `tokenizers` does for byte-level BPE.
#ifndef CACHALOT_SERVER_TEXT_TOKENIZER_H_
#define CACHALOT_SERVER_TEXT_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/mutex.h"
#include "server/text/added_tokens.h"
#include "server/text/bpe.h"
#include "server/text/pretokenizer.h"

namespace cachalot {

struct TokenizerFiles;

// Bytes begin to end (exclusive) of a text.
struct TextRange {
  size_t begin = 0, end = 0;
};

struct EncodeOptions {
  // Added tokens ("<｜User｜>") that occur in the text become their ids. Turn off for text that is not
  // trusted to hold any: then they are cut into ordinary tokens.
  bool match_special = true;
  // If set, only those that lie wholly within one of these ranges (in order, apart, in the text). What is
  // between two such tokens is cut as one text, trusted or not.
  const std::vector<TextRange>* trusted = nullptr;
  // Begin with bos_id(). For raw prompts, what the checkpoint asks for is add_bos_token(); chat templates
  // write BOS themselves.
  bool add_bos = false;
};

// The tokenizer of a checkpoint. Immutable: const methods may be called from any thread, at once.
class Tokenizer {
 public:
  // Longest text that Encode takes.
  static constexpr size_t kMaxTextBytes = Bpe::kMaxPieceBytes;

  // Reads tokenizer.json and tokenizer_config.json in `model_dir`. UnimplementedError, with the reason,
  // for a tokenizer that we could not reproduce exactly (a server can then offer token ids only);
  // NotFoundError for a missing file; InvalidArgumentError for a malformed one. Takes about half a
  // second for DeepSeek-V3's.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& model_dir);

  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The tokens of `text`. Time grows as n log n at worst, whatever the text. InvalidArgumentError if it is
  // not well-formed UTF-8 (the message has the byte offset) or longer than kMaxTextBytes;
  // FailedPreconditionError if BOS is wanted and there is none.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions options = {}) const;

  // The bytes of a token: not always whole characters. Empty for an id that has no token.
  std::string TokenBytes(int32_t id) const;
  size_t num_token_bytes(int32_t id) const { return BytesOf(id).size(); }

  // The bytes of all tokens, ill-formed UTF-8 replaced by U+FFFD. Ids without a token count as empty;
  // `skip_special` leaves out those with is_special().
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const;

  // The token whose TokenBytes are `bytes`; an added token goes before others.
  std::optional<int32_t> TokenToId(std::string_view bytes) const;

  // One more than the highest id. Rows of the model's vocabulary may be more, and ids below may lack a
  // token.
  int32_t vocab_size() const { return static_cast<int32_t>(tokens_.size()); }
  bool has_token(int32_t id) const { return InRange(id) && tokens_[id].size > 0; }
  // Bytes of the longest token: a text of more than n times as many has more than n tokens.
  size_t max_token_bytes() const { return max_token_bytes_; }
  // NOTE: not every added token is special. DeepSeek's <｜User｜> and tool-call markers are not.
  bool is_special(int32_t id) const { return InRange(id) && tokens_[id].special; }

  std::optional<int32_t> bos_id() const { return bos_id_; }
  std::optional<int32_t> eos_id() const { return eos_id_; }
  bool add_bos_token() const { return add_bos_token_; }

 private:
  struct Token {
    uint32_t begin = 0, size = 0;  // in token_bytes_; size 0: no such token
    bool special = false;
  };
  struct TokenIds {
    int32_t token = -1;  // what TokenToId answers
    int32_t piece = -1;  // the token that a piece with these bytes is encoded as, if it is a single one
  };
  struct Scratch;
  class ScratchLease;

  Tokenizer();
  absl::Status Build(const TokenizerFiles& files);
  void AddToken(int32_t id, std::string_view bytes, bool special);
  void IndexTokens(const TokenizerFiles& files, const std::vector<bool>& is_byte_level);
  bool InRange(int32_t id) const { return id >= 0 && id < vocab_size(); }
  std::string_view BytesOf(int32_t id) const;

  absl::Status EncodeWithAddedTokens(std::string_view text, TextRange part, std::span<const TextRange> trusted,
                                     size_t matcher_idx, Scratch* scratch, std::vector<int32_t>* ids) const;
  absl::Status EncodePlain(std::string_view text, Scratch* scratch, std::vector<int32_t>* ids) const;
  void EncodePiece(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const;

  std::unique_ptr<const PreTokenizer> pre_tokenizer_;
  std::optional<Bpe> bpe_;
  AddedTokenMatcher matchers_[2];  // the second looks at what the first leaves
  std::string token_bytes_;
  std::vector<Token> tokens_;                                     // [id]
  absl::flat_hash_map<std::string_view, TokenIds> ids_by_bytes_;  // keys are in token_bytes_
  std::optional<int32_t> bos_id_, eos_id_;
  size_t max_token_bytes_ = 0;
  bool add_bos_token_ = false;

  mutable Mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> idle_scratch_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_TOKENIZER_H_
