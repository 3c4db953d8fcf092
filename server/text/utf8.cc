// UTF-8 scanning after Unicode table 3-7 (well-formed byte sequences).
#include "server/text/utf8.h"

#include <cstdint>
#include <cstring>

namespace cachalot {
namespace {

enum class Sequence { kComplete, kTruncated, kInvalid };

// Classifies the sequence at the start of `bytes` (not empty). `length` is that of the whole sequence
// when complete, else that of its longest well-formed beginning (at least 1).
Sequence ScanSequence(std::string_view bytes, size_t* length) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = byte(0);
  *length = 1;
  if (lead < 0x80) return Sequence::kComplete;
  if (lead < 0xC2 || lead > 0xF4) return Sequence::kInvalid;
  const size_t wanted = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // Only the second byte has a range that depends on the first.
  uint8_t low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (; *length < wanted; ++*length) {
    if (*length == bytes.size()) return Sequence::kTruncated;
    if (byte(*length) < low || byte(*length) > high) return Sequence::kInvalid;
    low = 0x80;
    high = 0xBF;
  }
  return Sequence::kComplete;
}

// Length of the run of ASCII at `begin`.
size_t AsciiRun(std::string_view bytes, size_t begin) {
  size_t i = begin;
  for (uint64_t word; i + sizeof(word) <= bytes.size(); i += sizeof(word)) {
    std::memcpy(&word, bytes.data() + i, sizeof(word));
    if ((word & 0x8080808080808080u) != 0) break;
  }
  while (i < bytes.size() && static_cast<uint8_t>(bytes[i]) < 0x80) ++i;
  return i - begin;
}

}  // namespace

std::optional<size_t> FindInvalidUtf8(std::string_view text) {
  for (size_t i = AsciiRun(text, 0); i < text.size(); i += AsciiRun(text, i)) {
    size_t length;
    if (ScanSequence(text.substr(i), &length) != Sequence::kComplete) return i;
    i += length;
  }
  return std::nullopt;
}

size_t AppendLossyUtf8(std::string_view bytes, bool at_end, std::string* out) {
  size_t i = 0;
  while (i < bytes.size()) {
    if (const size_t ascii = AsciiRun(bytes, i); ascii > 0) {
      out->append(bytes, i, ascii);
      i += ascii;
      continue;
    }
    size_t length;
    const Sequence sequence = ScanSequence(bytes.substr(i), &length);
    if (sequence == Sequence::kTruncated && !at_end) return i;
    if (sequence == Sequence::kComplete) {
      out->append(bytes, i, length);
    } else {
      out->append("\uFFFD");
    }
    i += length;
  }
  return i;
}

}  // namespace cachalot
