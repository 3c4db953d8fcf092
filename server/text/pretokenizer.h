// Cuts text into the pieces that BPE encodes one by one: regular expressions, one after another.
#ifndef CACHALOT_SERVER_TEXT_PRETOKENIZER_H_
#define CACHALOT_SERVER_TEXT_PRETOKENIZER_H_

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace cachalot {

// A sequence of Hugging Face `Split` pre-tokenizers with behaviour "Isolated": the first expression cuts
// the text into its matches and what lies between them, the second cuts each of these pieces, and so on.
// An expression sees one piece as its whole subject: "(?!\S)" holds at the piece's end.
class PreTokenizer {
 public:
  // What matching needs to write to. One call of Split at a time may use it.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class PreTokenizer;
    struct Pcre2;
    std::unique_ptr<Pcre2> pcre2_;
  };

  // Compiles `patterns`, written for Oniguruma. UnimplementedError for what cannot be matched exactly as
  // Oniguruma does (see onig_pattern.h), for an expression that can match nothing at all, and for more or
  // longer ones than any known tokenizer has; InvalidArgumentError for what is not a regular expression.
  static absl::StatusOr<std::unique_ptr<const PreTokenizer>> Create(const std::vector<std::string>& patterns);

  ~PreTokenizer();

  // Calls `emit` with each piece of `text`, in order; together they are `text`, and none is empty.
  // `text` must be well-formed UTF-8. Any thread, with a scratch of its own. ResourceExhaustedError if an
  // expression backtracks beyond PCRE2's limits; then some pieces may have been emitted.
  absl::Status Split(std::string_view text, Scratch* scratch, absl::FunctionRef<void(std::string_view)> emit) const;

 private:
  class Expression;
  using Expressions = std::vector<std::unique_ptr<const Expression>>;

  PreTokenizer();
  static absl::Status SplitBy(std::span<const std::unique_ptr<const Expression>> expressions, std::string_view text,
                              const Scratch::Pcre2& pcre2, absl::FunctionRef<void(std::string_view)> emit);

  Expressions exact_;   // right for any text
  Expressions common_;  // right and faster for text without HasUnicodeAdditions()
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_PRETOKENIZER_H_
