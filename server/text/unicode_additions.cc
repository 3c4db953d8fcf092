// Search for characters on which PCRE2 and Oniguruma disagree.
#include "server/text/unicode_additions.h"

#include <array>
#include <cstddef>
#include <span>

namespace cachalot {
namespace {

constexpr int kBlockBits = 8;
constexpr CodePointRange kOthers[] = {{kMongolianVowelSeparator, kMongolianVowelSeparator}};
constexpr std::span<const CodePointRange> kAdditions[] = {kAddedLetters,     kAddedMarks,   kAddedNumbers,
                                                          kAddedPunctuation, kAddedSymbols, kOthers};

// Which blocks of 256 code points have additions: few, and no common ones but emoji.
constexpr auto kBlocks = [] {
  std::array<bool, (0x110000 >> kBlockBits)> blocks{};
  for (const std::span<const CodePointRange> ranges : kAdditions) {
    for (const CodePointRange& range : ranges) {
      for (uint32_t i = range.first >> kBlockBits; i <= range.last >> kBlockBits; ++i) blocks[i] = true;
    }
  }
  return blocks;
}();

bool IsAddition(uint32_t character) {
  for (const std::span<const CodePointRange> ranges : kAdditions) {
    for (const CodePointRange& range : ranges) {
      if (character >= range.first && character <= range.last) return true;
    }
  }
  return false;
}

}  // namespace

bool HasUnicodeAdditions(std::string_view text) {
  const auto tail = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[i]) & 0x3F); };
  for (size_t i = 0; i < text.size(); ++i) {
    // Shorter sequences end at U+07FF, before the first addition.
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    if (lead < 0xE0) continue;
    uint32_t character = (lead < 0xF0 ? lead & 0x0Fu : lead & 0x07u) << 12 | tail(i + 1) << 6 | tail(i + 2);
    if (lead >= 0xF0) character = character << 6 | tail(i + 3);
    if (kBlocks[character >> kBlockBits] && IsAddition(character)) return true;
  }
  return false;
}

}  // namespace cachalot
