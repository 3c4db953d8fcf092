// Translates the regular expressions of tokenizer.json, which are Oniguruma's, to PCRE2's.
#ifndef CACHALOT_SERVER_TEXT_ONIG_PATTERN_H_
#define CACHALOT_SERVER_TEXT_ONIG_PATTERN_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace cachalot {

struct Pcre2Patterns {
  std::string exact;   // for any text
  std::string common;  // for text without HasUnicodeAdditions(), where it matches the same, twice as fast
};

// Returns PCRE2 patterns (for PCRE2_UTF | PCRE2_UCP) that match exactly what Oniguruma 6.9.10 (Ruby
// syntax, Unicode 16), the engine of Hugging Face's `tokenizers`, matches with `pattern`, well-formed
// UTF-8.
//
// The engines differ in three ways that matter here: PCRE2's \s has U+180E and Oniguruma's has not;
// Debian's PCRE2 10.42 knows Unicode 14, so \p{...} lacks the characters of 15 and 16; and several
// escapes mean different things. Hence only what is understood passes: literals, classes without
// nesting, \s \S, \p{X} and \P{X} with X one of L M N P S Z, groups, (?= (?!, alternation, greedy, lazy
// and possessive quantifiers. UnimplementedError names anything else; InvalidArgumentError a pattern
// that is wrong in itself. Not all syntax errors are seen here: PCRE2 reports the rest.
absl::StatusOr<Pcre2Patterns> TranslateOnigurumaPattern(std::string_view pattern);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_ONIG_PATTERN_H_
