// Detokenizer and UTF-8: streams of tokens against Python's and our own decoding of the whole.
#include "server/text/detokenizer.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "server/text/utf8.h"
#include "tests/server/tokenizer_testing.h"

namespace cachalot {
namespace {

using nlohmann::json;

json Vectors() { return json::parse(ReadText(kDataDir + "/tokenizer_vectors.json")); }

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

class DetokenizerTest : public testing::Test {
 protected:
  int32_t IdOf(std::string_view bytes) const { return tokenizer_->TokenToId(bytes).value(); }

  // Pushes `ids` one by one; each answer must be well-formed and hold back no more than it has to.
  std::string Stream(const std::vector<int32_t>& ids, bool skip_special) const {
    Detokenizer detokenizer(*tokenizer_, skip_special);
    std::string text;
    std::vector<int32_t> pushed;
    for (const int32_t id : ids) {
      const std::string part = detokenizer.Push(id);
      EXPECT_FALSE(FindInvalidUtf8(part).has_value());
      text += part;
      pushed.push_back(id);
      const std::string whole = tokenizer_->Decode(pushed, skip_special);
      EXPECT_TRUE(whole == text || whole == text + "\uFFFD");
    }
    text += detokenizer.Flush();
    EXPECT_EQ(detokenizer.Flush(), "");
    return text;
  }

  const std::unique_ptr<Tokenizer> tokenizer_ = LoadOrDie(kSmallModel);
};

TEST_F(DetokenizerTest, HoldsBackIncompleteCharacters) {
  Detokenizer detokenizer(*tokenizer_);
  EXPECT_EQ(detokenizer.Push(IdOf("a")), "a");
  EXPECT_EQ(detokenizer.Push(IdOf("\xF0")), "");
  EXPECT_EQ(detokenizer.Push(IdOf("\x9F")), "");
  EXPECT_EQ(detokenizer.Push(IdOf("\x90")), "");
  EXPECT_EQ(detokenizer.Push(IdOf("\x8B")), "🐋");
  EXPECT_EQ(detokenizer.Push(IdOf("\xF0")), "");
  EXPECT_EQ(detokenizer.Push(IdOf("b")), "\uFFFDb");
  EXPECT_EQ(detokenizer.Push(IdOf("\x80")), "\uFFFD");
  EXPECT_EQ(detokenizer.Push(IdOf("\xE9")), "");
  EXPECT_EQ(detokenizer.Push(IdOf("\xB2")), "");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Flush(), "");
  EXPECT_EQ(detokenizer.Push(IdOf("c")), "c");
}

TEST_F(DetokenizerTest, SpecialTokens) {
  Detokenizer keeping(*tokenizer_, /*skip_special=*/false);
  Detokenizer skipping(*tokenizer_, /*skip_special=*/true);
  EXPECT_EQ(keeping.Push(0), "<｜begin▁of▁sentence｜>");
  EXPECT_EQ(skipping.Push(0), "");
  EXPECT_EQ(skipping.Push(900), "<｜User｜>");  // added, not special
  for (const int32_t id : {-1, 899, 1 << 30}) EXPECT_EQ(skipping.Push(id), "");
  // A token that is left out does not cut a character in two; one that is not does.
  EXPECT_EQ(skipping.Push(IdOf("\xC3")), "");
  EXPECT_EQ(skipping.Push(0), "");
  EXPECT_EQ(skipping.Push(IdOf("\xA9")), "é");
  EXPECT_EQ(keeping.Push(IdOf("\xC3")), "");
  EXPECT_EQ(keeping.Push(1), "\uFFFD<｜end▁of▁sentence｜>");
}

TEST_F(DetokenizerTest, StreamsWhatTokenizersDecodes) {
  const json vectors = Vectors();
  for (const json& vector : vectors["decode"]) {
    EXPECT_EQ(Stream(vector["ids"], false), vector["text"]);
    EXPECT_EQ(Stream(vector["ids"], true), vector["text_without_special"]);
  }
  for (const json& vector : vectors["encode"]) EXPECT_EQ(Stream(vector["ids"], false), vector["text"]);
}

TEST_F(DetokenizerTest, RandomTokensAndRandomBytes) {
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    std::vector<int32_t> ids;
    for (int n = random() % 30; n > 0; --n) {
      const std::string byte(1, static_cast<char>(random() % 3 == 0 ? random() : 0x80 | random()));
      ids.push_back(round % 2 == 0 ? IdOf(byte) : static_cast<int32_t>(random() % 940));
    }
    EXPECT_EQ(Stream(ids, false), tokenizer_->Decode(ids, false));
    EXPECT_EQ(Stream(ids, true), tokenizer_->Decode(ids, true));
  }
}

TEST(Utf8Test, LossyDecodingIsPythons) {
  std::mt19937 random(2);
  const json vectors = Vectors()["lossy_utf8"];
  ASSERT_GE(vectors.size(), 300);
  for (const json& vector : vectors) {
    const std::string bytes = FromHex(vector["hex"]);
    std::string whole;
    EXPECT_EQ(AppendLossyUtf8(bytes, /*at_end=*/true, &whole), bytes.size());
    EXPECT_EQ(whole, vector["text"]) << vector["hex"];
    EXPECT_EQ(FindInvalidUtf8(bytes).has_value(), whole != bytes) << vector["hex"];

    // The same in random pieces.
    std::string text, held;
    for (size_t at = 0; at < bytes.size();) {
      const size_t size = 1 + random() % 4;
      held += bytes.substr(at, size);
      at += size;
      held.erase(0, AppendLossyUtf8(held, /*at_end=*/false, &text));
      EXPECT_LE(held.size(), 3);
    }
    AppendLossyUtf8(held, /*at_end=*/true, &text);
    EXPECT_EQ(text, whole) << vector["hex"];
  }
}

TEST(Utf8Test, FirstInvalidByte) {
  EXPECT_EQ(FindInvalidUtf8(""), std::nullopt);
  EXPECT_EQ(FindInvalidUtf8("a long run of ASCII, then 鲸🐋é"), std::nullopt);
  EXPECT_EQ(FindInvalidUtf8("12345678\xFF"), 8);
  EXPECT_EQ(FindInvalidUtf8("é\x80"), 2);
  EXPECT_EQ(FindInvalidUtf8("\xC0\x80"), 0);          // overlong
  EXPECT_EQ(FindInvalidUtf8("x\xED\xA0\x80"), 1);     // surrogate
  EXPECT_EQ(FindInvalidUtf8("\xF4\x90\x80\x80"), 0);  // above U+10FFFF
  EXPECT_EQ(FindInvalidUtf8("ab\xE9\xB2"), 2);        // cut off
}

}  // namespace
}  // namespace cachalot
