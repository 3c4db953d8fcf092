// JSON strings: runs of what needs no escape are copied whole.
#include "server/text/json_text.h"

#include <array>

namespace cachalot {
namespace {

constexpr char kHex[] = "0123456789abcdef";

constexpr std::array<bool, 256> NeedsEscape() {
  std::array<bool, 256> needs = {};
  for (int byte = 0; byte < 0x20; ++byte) needs[byte] = true;
  needs['"'] = needs['\\'] = true;
  return needs;
}
constexpr std::array<bool, 256> kNeedsEscape = NeedsEscape();

void AppendEscape(unsigned char byte, std::string* out) {
  out->push_back('\\');
  switch (byte) {
    case '"':
    case '\\': return out->push_back(static_cast<char>(byte));
    case '\n': return out->push_back('n');
    case '\r': return out->push_back('r');
    case '\t': return out->push_back('t');
    case '\b': return out->push_back('b');
    case '\f': return out->push_back('f');
    default: out->append({'u', '0', '0', kHex[byte >> 4], kHex[byte & 15]});
  }
}

}  // namespace

void AppendJsonString(std::string_view text, std::string* out) {
  out->push_back('"');
  size_t begin = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (!kNeedsEscape[byte]) continue;
    out->append(text, begin, i - begin);
    AppendEscape(byte, out);
    begin = i + 1;
  }
  out->append(text, begin);
  out->push_back('"');
}

}  // namespace cachalot
