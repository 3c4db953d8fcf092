// Pre-tokenizer over PCRE2, with its just-in-time compiler where the machine allows it.
#include "server/text/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/text/onig_pattern.h"
#include "server/text/unicode_additions.h"

namespace cachalot {
namespace {

// Matching needs little stack (a run of one class is one frame, however long); nested groups need more.
constexpr size_t kJitStackStartBytes = 32 << 10;
constexpr size_t kJitStackMaxBytes = 4 << 20;

constexpr size_t kMinMatchLimit = 10'000'000;  // PCRE2's default

// Bounds on hostile files; known tokenizers have at most 7 expressions, of some hundred bytes.
constexpr size_t kMaxExpressions = 32;
constexpr size_t kMaxPatternBytes = 16 << 10;

std::string ErrorText(int code) {
  PCRE2_UCHAR text[256];
  if (pcre2_get_error_message(code, text, sizeof(text)) < 0) return absl::StrCat("PCRE2 error ", code);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct PreTokenizer::Scratch::Pcre2 {
  pcre2_match_data* match = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(kJitStackStartBytes, kJitStackMaxBytes, nullptr);

  ~Pcre2() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(match);
  }
};

PreTokenizer::Scratch::Scratch() : pcre2_(std::make_unique<Pcre2>()) {
  // A null stack (no JIT in this PCRE2) means the machine stack, which serves too.
  if (pcre2_->context != nullptr) pcre2_jit_stack_assign(pcre2_->context, nullptr, pcre2_->stack);
}
PreTokenizer::Scratch::~Scratch() = default;

// A compiled regular expression.
class PreTokenizer::Expression {
 public:
  Expression() = default;
  ~Expression() { pcre2_code_free(code_); }
  Expression(const Expression&) = delete;
  Expression& operator=(const Expression&) = delete;

  absl::Status Compile(const std::string& pattern) {
    int error;
    PCRE2_SIZE offset;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP, &error,
                          &offset, nullptr);
    if (code_ == nullptr) return absl::InvalidArgumentError(ErrorText(error));
    uint32_t may_match_empty = 0;
    pcre2_pattern_info(code_, PCRE2_INFO_MATCHEMPTY, &may_match_empty);
    if (may_match_empty != 0) {
      return absl::UnimplementedError("matching the empty string is not supported");
    }
    if (pcre2_jit_compile(code_, PCRE2_JIT_COMPLETE) == 0) match_ = pcre2_jit_match;
    return absl::OkStatus();
  }

  // Finds the first match at `from` or later. Returns what PCRE2 does.
  int Match(std::string_view text, size_t from, const Scratch::Pcre2& pcre2) const {
    return match_(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, PCRE2_NO_UTF_CHECK, pcre2.match,
                  pcre2.context);
  }

 private:
  pcre2_code* code_ = nullptr;
  decltype(&pcre2_match) match_ = pcre2_match;
};

PreTokenizer::PreTokenizer() = default;
PreTokenizer::~PreTokenizer() = default;

absl::StatusOr<std::unique_ptr<const PreTokenizer>> PreTokenizer::Create(const std::vector<std::string>& patterns) {
  if (patterns.size() > kMaxExpressions) {
    return absl::UnimplementedError(absl::StrCat("splitting by ", patterns.size(), " expressions is not supported"));
  }
  std::unique_ptr<PreTokenizer> result(new PreTokenizer);
  for (const std::string& pattern : patterns) {
    if (pattern.size() > kMaxPatternBytes) {
      return absl::UnimplementedError(
          absl::StrCat("a regular expression of ", pattern.size(), " bytes is not supported"));
    }
    absl::StatusOr<Pcre2Patterns> translated = TranslateOnigurumaPattern(pattern);
    if (!translated.ok()) return translated.status();
    for (const auto& [source, expressions] :
         {std::make_pair(&translated->exact, &result->exact_), std::make_pair(&translated->common, &result->common_)}) {
      auto expression = std::make_unique<Expression>();
      if (absl::Status status = expression->Compile(*source); !status.ok()) {
        return absl::Status(status.code(),
                            absl::StrCat("regular expression \"", absl::Utf8SafeCHexEscape(pattern.substr(0, 200)),
                                         "\": ", status.message()));
      }
      expressions->push_back(std::move(expression));
    }
  }
  return result;
}

absl::Status PreTokenizer::Split(std::string_view text, Scratch* scratch,
                                 absl::FunctionRef<void(std::string_view)> emit) const {
  const Scratch::Pcre2& pcre2 = *scratch->pcre2_;
  if (pcre2.match == nullptr || pcre2.context == nullptr) {
    return absl::ResourceExhaustedError("no memory for PCRE2");
  }
  // Backtracking over a run counts each character; beyond that an expression is at fault.
  pcre2_set_match_limit(pcre2.context,
                        static_cast<uint32_t>(std::min<size_t>(kMinMatchLimit + 4 * text.size(), UINT32_MAX)));
  return SplitBy(HasUnicodeAdditions(text) ? exact_ : common_, text, pcre2, emit);
}

absl::Status PreTokenizer::SplitBy(std::span<const std::unique_ptr<const Expression>> expressions,
                                   std::string_view text, const Scratch::Pcre2& pcre2,
                                   absl::FunctionRef<void(std::string_view)> emit) {
  if (text.empty()) return absl::OkStatus();
  if (expressions.empty()) {
    emit(text);
    return absl::OkStatus();
  }
  for (size_t done = 0; done < text.size();) {
    const int result = expressions[0]->Match(text, done, pcre2);
    size_t begin = text.size(), end = text.size();
    if (result >= 0) {
      const PCRE2_SIZE* const bounds = pcre2_get_ovector_pointer(pcre2.match);
      begin = bounds[0];
      end = bounds[1];
    } else if (result != PCRE2_ERROR_NOMATCH) {
      return absl::ResourceExhaustedError(absl::StrCat("splitting text: ", ErrorText(result)));
    }
    for (const std::string_view piece : {text.substr(done, begin - done), text.substr(begin, end - begin)}) {
      absl::Status status = SplitBy(expressions.subspan(1), piece, pcre2, emit);
      if (!status.ok()) return status;
    }
    done = end;
  }
  return absl::OkStatus();
}

}  // namespace cachalot
