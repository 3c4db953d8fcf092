// Streaming detokenizer.
#include "server/text/detokenizer.h"

#include <algorithm>

#include "server/text/utf8.h"

namespace cachalot {

std::string Detokenizer::Push(int32_t id) {
  std::string text;
  if (IsSkipped(id)) return text;
  held_ += tokenizer_.TokenBytes(id);
  held_.erase(0, AppendLossyUtf8(held_, /*at_end=*/false, &text));
  return text;
}

bool Detokenizer::IsSkipped(int32_t id) const {
  return skip_special_ && tokenizer_.is_special(id) && std::find(shown_.begin(), shown_.end(), id) == shown_.end();
}

std::string Detokenizer::Flush() {
  std::string text;
  AppendLossyUtf8(held_, /*at_end=*/true, &text);
  held_.clear();
  return text;
}

}  // namespace cachalot
