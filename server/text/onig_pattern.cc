// Oniguruma to PCRE2: one pass over the pattern that rewrites what differs and refuses the unknown.
#include "server/text/onig_pattern.h"

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/text/unicode_additions.h"

namespace cachalot {
namespace {

// Unicode White_Space, which is what Oniguruma's \s is.
constexpr std::string_view kWhiteSpace =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

// The characters of general category `category` that PCRE2 does not know; nullopt for an unknown one.
std::optional<std::span<const CodePointRange>> AddedMembers(char category) {
  switch (category) {
    case 'L': return kAddedLetters;
    case 'M': return kAddedMarks;
    case 'N': return kAddedNumbers;
    case 'P': return kAddedPunctuation;
    case 'S': return kAddedSymbols;
    case 'Z': return std::span<const CodePointRange>();
    default: return std::nullopt;
  }
}

// An escape or a class member: either one character or a set of them.
struct Atom {
  uint32_t character = 0;
  std::string members = "";  // of a class, for a set
  bool negated = false;
  bool is_set() const { return !members.empty(); }
};

class Translator {
 public:
  Translator(std::string_view pattern, bool is_exact) : pattern_(pattern), is_exact_(is_exact) {}

  absl::StatusOr<std::string> Run() {
    while (at_ < pattern_.size()) {
      if (absl::Status status = TranslateOne(); !status.ok()) return status;
    }
    return std::move(out_);
  }

 private:
  absl::Status TranslateOne() {
    switch (const char c = pattern_[at_]) {
      case '[': return TranslateClass();
      case '(': return TranslateGroup();
      case ')': return TranslateGroupEnd();
      case '|': out_.push_back(c), ++at_; return absl::OkStatus();
      case '*':
      case '+':
      case '?':
      case '{': return TranslateQuantifier();
      case '.':
      case '^':
      case '$': return Unsupported(std::string_view(&c, 1));
      case '\\': {
        absl::StatusOr<Atom> atom = ReadEscape();
        if (!atom.ok()) return atom.status();
        if (atom->is_set()) {
          absl::StrAppend(&out_, atom->negated ? "[^" : "[", atom->members, "]");
        } else {
          AppendCharacter(atom->character);
        }
        return absl::OkStatus();
      }
      default: AppendCharacter(ReadCharacter()); return absl::OkStatus();
    }
  }

  absl::Status TranslateGroup() {
    const bool is_plain = !Next("(?");
    const bool is_lookahead = Next("(?=") || Next("(?!");
    if (!is_plain && !is_lookahead && !Next("(?:")) return Unsupported("this kind of group");
    // Nothing refers to a group, so none has to capture.
    out_.append(is_plain ? "(?:" : pattern_.substr(at_, 3));
    at_ += is_plain ? 1 : 3;
    open_groups_.push_back(is_lookahead);
    return absl::OkStatus();
  }

  absl::Status TranslateGroupEnd() {
    if (open_groups_.empty()) return Invalid("a ')' without its '('");
    const bool is_lookahead = open_groups_.back();
    open_groups_.pop_back();
    out_.push_back(')');
    ++at_;
    if (is_lookahead && NextIsQuantifier()) return Unsupported("a repeated lookahead");
    return absl::OkStatus();
  }

  // NOTE: "{n,m}+" is possessive in PCRE2 and a repeated repeat in Ruby syntax; "{n}?" is lazy in one
  // and optional in the other. Neither passes.
  absl::Status TranslateQuantifier() {
    const char kind = pattern_[at_];
    if (kind == '{') {
      if (absl::Status status = TranslateInterval(); !status.ok()) return status;
    } else {
      out_.push_back(kind);
      ++at_;
      if (Next("?") || Next("+")) out_.push_back(pattern_[at_++]);
    }
    if (NextIsQuantifier()) return Unsupported("a stacked quantifier");
    return absl::OkStatus();
  }

  absl::Status TranslateInterval() {
    const size_t begin = at_++;
    const std::optional<int> low = ReadNumber();
    const bool is_range = Next(",");
    if (is_range) ++at_;
    const std::optional<int> high = is_range ? ReadNumber() : low;
    if (!low.has_value() || !Next("}") || (high.has_value() && *high < *low)) {
      at_ = begin;
      return Unsupported("this use of '{'");
    }
    ++at_;
    out_.append(pattern_.substr(begin, at_ - begin));
    return absl::OkStatus();
  }

  absl::Status TranslateClass() {
    ++at_;
    const bool negated = Next("^");
    if (negated) ++at_;
    out_.append(negated ? "[^" : "[");
    if (Next("]")) return Unsupported("']' at the start of a class");
    const size_t begin = at_;
    while (!Next("]")) {
      if (at_ == pattern_.size()) return Invalid("a class without its ']'");
      if (Next("-") && !Next("-]") && (at_ > begin || Next("--"))) return Unsupported("this use of '-'");
      if (absl::Status status = TranslateMember(); !status.ok()) return status;
    }
    ++at_;
    out_.push_back(']');
    return absl::OkStatus();
  }

  absl::Status TranslateMember() {
    if (Next("[")) return Unsupported("a class within a class");
    if (Next("&&")) return Unsupported("an intersection of classes");
    absl::StatusOr<Atom> first = ReadMember();
    if (!first.ok()) return first.status();
    const bool is_range = Next("-") && !Next("-]");
    if (first->is_set()) {
      if (first->negated) return Unsupported("a negated set within a class");
      if (is_range) return Unsupported("a range that starts with a set");
      out_.append(first->members);
      return absl::OkStatus();
    }
    AppendCharacter(first->character);
    if (!is_range) return absl::OkStatus();
    ++at_;
    if (at_ == pattern_.size()) return Invalid("a class without its ']'");
    if (Next("[")) return Unsupported("a class within a class");
    absl::StatusOr<Atom> last = ReadMember();
    if (!last.ok()) return last.status();
    if (last->is_set()) return Unsupported("a range that ends with a set");
    if (last->character < first->character) return Invalid("a range that runs backwards");
    out_.push_back('-');
    AppendCharacter(last->character);
    return absl::OkStatus();
  }

  absl::StatusOr<Atom> ReadMember() {
    if (Next("\\")) return ReadEscape();
    return Atom{.character = ReadCharacter()};
  }

  absl::StatusOr<Atom> ReadEscape() {
    if (at_ + 1 == pattern_.size()) return Invalid("a '\\' at the end");
    const char c = pattern_[at_ + 1];
    const bool is_property = c == 'p' || c == 'P';
    if (is_property) return ReadProperty();
    Atom atom;
    switch (c) {
      case 's':
      case 'S': atom.members = is_exact_ ? kWhiteSpace : R"(\s)"; break;
      case 'r': atom.character = '\r'; break;
      case 'n': atom.character = '\n'; break;
      case 't': atom.character = '\t'; break;
      case 'f': atom.character = '\f'; break;
      default:
        // NOTE: Oniguruma gives \` \' \< \> meanings of their own.
        if (!absl::ascii_ispunct(c) || std::string_view("`'<>").find(c) != std::string_view::npos) {
          return Unsupported(pattern_.substr(at_, 2));
        }
        atom.character = static_cast<uint8_t>(c);
    }
    atom.negated = c == 'S';
    at_ += 2;
    return atom;
  }

  absl::StatusOr<Atom> ReadProperty() {
    const bool is_short = at_ + 4 < pattern_.size() && pattern_[at_ + 2] == '{' && pattern_[at_ + 4] == '}';
    const auto added = is_short ? AddedMembers(pattern_[at_ + 3]) : std::nullopt;
    if (!added.has_value()) {
      const size_t end = pattern_.find('}', at_);
      return Unsupported(pattern_.substr(at_, end == std::string_view::npos ? end : end + 1 - at_));
    }
    Atom atom{.negated = pattern_[at_ + 1] == 'P'};
    atom.members = absl::StrCat("\\p{", std::string(1, pattern_[at_ + 3]), "}");
    if (is_exact_) {
      for (const CodePointRange& range : *added) {
        absl::StrAppendFormat(&atom.members, "\\x{%X}-\\x{%X}", range.first, range.last);
      }
    }
    at_ += 5;
    return atom;
  }

  std::optional<int> ReadNumber() {
    const size_t begin = at_;
    int number = 0;
    for (; at_ < pattern_.size() && absl::ascii_isdigit(pattern_[at_]) && at_ - begin < 5; ++at_) {
      number = number * 10 + (pattern_[at_] - '0');
    }
    return at_ > begin ? std::optional<int>(number) : std::nullopt;
  }

  uint32_t ReadCharacter() {
    const auto byte = [&](size_t i) { return static_cast<uint8_t>(pattern_[at_ + i]); };
    const size_t length = byte(0) < 0x80 ? 1 : byte(0) < 0xE0 ? 2 : byte(0) < 0xF0 ? 3 : 4;
    uint32_t character = length == 1 ? byte(0) : byte(0) & (0x7F >> length);
    for (size_t i = 1; i < length; ++i) character = character << 6 | (byte(i) & 0x3F);
    at_ += length;
    return character;
  }

  void AppendCharacter(uint32_t character) { absl::StrAppendFormat(&out_, "\\x{%X}", character); }

  bool NextIsQuantifier() const { return Next("?") || Next("*") || Next("+") || Next("{"); }
  bool Next(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }

  absl::Status Unsupported(std::string_view what) const {
    return absl::UnimplementedError(Describe(std::string(what) + " is not supported"));
  }
  absl::Status Invalid(const std::string& what) const { return absl::InvalidArgumentError(Describe(what)); }

  std::string Describe(const std::string& what) const {
    return absl::StrCat("regular expression \"", absl::Utf8SafeCHexEscape(std::string(pattern_.substr(0, 200))),
                        "\", byte ", at_, ": ", what);
  }

  const std::string_view pattern_;
  const bool is_exact_;
  size_t at_ = 0;
  std::vector<bool> open_groups_;  // innermost last; true for a lookahead
  std::string out_;
};

}  // namespace

absl::StatusOr<Pcre2Patterns> TranslateOnigurumaPattern(std::string_view pattern) {
  absl::StatusOr<std::string> exact = Translator(pattern, /*is_exact=*/true).Run();
  if (!exact.ok()) return exact.status();
  absl::StatusOr<std::string> common = Translator(pattern, /*is_exact=*/false).Run();
  if (!common.ok()) return common.status();
  return Pcre2Patterns{*std::move(exact), *std::move(common)};
}

}  // namespace cachalot
