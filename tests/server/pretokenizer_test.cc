// Pre-tokenizer: Oniguruma's character classes, its two sets of expressions, what it refuses.
#include "server/text/pretokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "server/text/unicode_additions.h"
#include "tests/server/tokenizer_testing.h"

namespace cachalot {
namespace {

using nlohmann::json;

std::string Utf8(uint32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

std::vector<std::string> Split(const PreTokenizer& pre_tokenizer, std::string_view text) {
  PreTokenizer::Scratch scratch;
  std::vector<std::string> pieces;
  const absl::Status status =
      pre_tokenizer.Split(text, &scratch, [&](std::string_view piece) { pieces.emplace_back(piece); });
  EXPECT_TRUE(status.ok()) << status;
  return pieces;
}

// "41-5A,61-7A" in hexadecimal to a flag for each code point.
std::vector<bool> ReadRanges(const std::string& ranges) {
  std::vector<bool> is_member(0x110000);
  std::stringstream list(ranges);
  for (std::string range; std::getline(list, range, ',');) {
    const uint32_t last = std::stoul(range.substr(range.find('-') + 1), nullptr, 16);
    for (uint32_t c = std::stoul(range, nullptr, 16); c <= last; ++c) is_member[c] = true;
  }
  return is_member;
}

TEST(PreTokenizerTest, ClassesAreThoseOfOniguruma) {
  // Every character, and every one that needs no additions.
  std::vector<std::pair<uint32_t, std::string>> all, common;
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c < 0xD800 || c > 0xDFFF) all.emplace_back(c, Utf8(c));
  }
  std::copy_if(all.begin(), all.end(), std::back_inserter(common),
               [](const auto& character) { return !HasUnicodeAdditions(character.second); });
  ASSERT_EQ(all.size() - common.size(), 10'295);
  const json classes = json::parse(ReadText(kDataDir + "/oniguruma_classes.json"));
  ASSERT_EQ(classes.size(), 7);
  for (const auto& [name, ranges] : classes.items()) {
    const auto pre_tokenizer = PreTokenizer::Create({"[" + name + "]+"});
    ASSERT_TRUE(pre_tokenizer.ok()) << pre_tokenizer.status();
    const std::vector<bool> is_member = ReadRanges(ranges);
    for (const auto* characters : {&all, &common}) {
      // Pieces are runs of members and runs of others.
      std::string text;
      std::vector<std::string> runs;
      bool was_member = true;  // U+0000 is in no class
      for (const auto& [c, character] : *characters) {
        text += character;
        if (is_member[c] != was_member) runs.emplace_back();
        runs.back() += character;
        was_member = is_member[c];
      }
      EXPECT_TRUE(Split(**pre_tokenizer, text) == runs) << name;
    }
  }
}

TEST(PreTokenizerTest, BothSetsOfExpressionsAgree) {
  const json spec = json::parse(ReadText(kSmallModel + "/tokenizer.json"));
  std::vector<std::string> patterns;
  for (const json& step : spec["pre_tokenizer"]["pretokenizers"]) {
    if (step["type"] == "Split") patterns.push_back(step["pattern"]["Regex"]);
  }
  ASSERT_EQ(patterns.size(), 3);
  const auto pre_tokenizer = PreTokenizer::Create(patterns);
  ASSERT_TRUE(pre_tokenizer.ok()) << pre_tokenizer.status();
  // An emoji of Unicode 15 after a letter is one more piece, and makes the whole text take the exact path.
  const std::string emoji = "\U0001FAE8";
  std::mt19937 random(1);
  const std::u32string alphabet = U"aZ09 \t\n\r!'.<é\u0301\u0085\u00A0\u200D\u3000。中ク한😀٣\u2028\uFEFF";
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    for (int n = random() % 30; n > 0; --n) text += Utf8(alphabet[random() % alphabet.size()]);
    text += "x";
    ASSERT_FALSE(HasUnicodeAdditions(text));
    ASSERT_TRUE(HasUnicodeAdditions(text + emoji));
    std::vector<std::string> pieces = Split(**pre_tokenizer, text);
    pieces.push_back(emoji);
    EXPECT_EQ(Split(**pre_tokenizer, text + emoji), pieces) << json(text);
  }
}

TEST(PreTokenizerTest, RefusesWhatItCannotMatchExactly) {
  for (const char* pattern :
       {".",        "^a",      "a$",    "\\w+",   "\\d",    "\\b",         "\\h",         "\\R",     "\\X",
        "\\K",      "\\1",     "\\x41", "\\`",    "(?i:a)", "(?<=a)b",     "(?<n>a)",     "(?>a)",   "\\p{Lu}",
        "\\p{Han}", "\\p{^L}", "\\pL",  "\\p{C}", "[a[b]]", "[a-z&&[^b]]", "[[:alpha:]]", "[\\s-a]", "[a-\\s]",
        "[a-c-e]",  "[\\S]",   "[]a]",  "a{,3}",  "a{3,1}", "a{2}+",       "a{2}?",       "a**",     "a+*",
        "a{",       "(?=a)*",  "a*",    "(a|)",   "x?"}) {
    EXPECT_TRUE(absl::IsUnimplemented(PreTokenizer::Create({pattern}).status())) << pattern;
  }
  EXPECT_TRUE(absl::IsUnimplemented(PreTokenizer::Create({std::string(1 << 20, 'a')}).status()));
  EXPECT_TRUE(absl::IsUnimplemented(PreTokenizer::Create(std::vector<std::string>(1000, "a")).status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(PreTokenizer::Create({std::string(5000, '(') + "a" + std::string(5000, ')')}).status()));
  for (const char* pattern : {"(", ")", "a)", "[a", "[a-", "[", "\\", "*a", "[b-a]", "(a", "a{99999}"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(PreTokenizer::Create({pattern}).status())) << pattern;
  }
  for (const char* pattern : {"a", "[a-]", "[-a]", "[^a\\]\\\\]", "(?:a|b)++c", "(?!a)b", "\\P{L}", "\\S+", "(a)(b)"}) {
    EXPECT_TRUE(PreTokenizer::Create({pattern}).ok()) << pattern;
  }
}

}  // namespace
}  // namespace cachalot
