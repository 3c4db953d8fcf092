// JSON strings: runs of what needs no escape are copied whole.
#include "server/text/json_text.h"

#include <array>
#include <utility>

#include "absl/strings/str_replace.h"

namespace cachalot {
namespace {

constexpr char kHex[] = "0123456789abcdef";

// Characters that end a line, and what stands for them.
constexpr std::array<std::pair<const char*, const char*>, 3> kLineEnds = {{
    {"\xC2\x85", "\\u0085"},
    {"\xE2\x80\xA8", "\\u2028"},
    {"\xE2\x80\xA9", "\\u2029"},
}};

// Bytes that are not copied as they are, or may not be: a line end's first.
constexpr std::array<bool, 256> StopsRun() {
  std::array<bool, 256> stops = {};
  for (int byte = 0; byte < 0x20; ++byte) stops[byte] = true;
  stops['"'] = stops['\\'] = true;
  for (const auto& [character, escape] : kLineEnds) stops[static_cast<unsigned char>(character[0])] = true;
  return stops;
}
constexpr std::array<bool, 256> kStopsRun = StopsRun();

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
    if (!kStopsRun[byte]) continue;
    if (byte < 0x80) {
      out->append(text, begin, i - begin);
      AppendEscape(byte, out);
      begin = i + 1;
      continue;
    }
    for (const auto& [character, escape] : kLineEnds) {
      if (!text.substr(i).starts_with(character)) continue;
      out->append(text, begin, i - begin).append(escape);
      begin = i + std::string_view(character).size();
    }
  }
  out->append(text, begin);
  out->push_back('"');
}

std::string EscapeLineEnds(std::string json) {
  absl::StrReplaceAll(kLineEnds, &json);
  return json;
}

}  // namespace cachalot
