// Tokenizer: ids against Hugging Face's, decoding, long runs, threads.
#include "server/text/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "server/text/utf8.h"
#include "tests/server/tokenizer_testing.h"

namespace cachalot {
namespace {

using nlohmann::json;
using std::literals::operator""sv;

std::vector<int32_t> EncodeOrDie(const Tokenizer& tokenizer, std::string_view text, EncodeOptions options = {}) {
  absl::StatusOr<std::vector<int32_t>> ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.ok() ? *std::move(ids) : std::vector<int32_t>();
}

TEST(TokenizerTest, DeepSeekV3Vectors) {
  const std::unique_ptr<Tokenizer> tokenizer = LoadOrDie(kPublishedDir + "/deepseek-v3");
  const json vectors = json::parse(ReadText(kPublishedDir + "/tokenizer_vectors.json"));
  ASSERT_EQ(vectors["vectors"].size(), 128);
  for (const json& vector : vectors["vectors"]) {
    const std::string text = vector["text"];
    const std::vector<int32_t> ids = vector["ids"];
    EXPECT_EQ(EncodeOrDie(*tokenizer, text), ids) << text;
    EXPECT_EQ(tokenizer->Decode(ids, false), text);
    for (size_t i = 0; i < ids.size() && vector["pieces"].size() == ids.size(); ++i) {
      std::string piece;
      AppendLossyUtf8(tokenizer->TokenBytes(ids[i]), true, &piece);
      EXPECT_EQ(piece, vector["pieces"][i]);
    }
  }
  EXPECT_EQ(EncodeOrDie(*tokenizer, "How are you doing?", {.add_bos = true}),
            (std::vector<int32_t>{0, 4117, 477, 440, 4843, 33}));
  EXPECT_EQ(tokenizer->vocab_size(), 128815);
  EXPECT_EQ(tokenizer->bos_id(), 0);
  EXPECT_EQ(tokenizer->eos_id(), 1);
  EXPECT_TRUE(tokenizer->add_bos_token());
  EXPECT_EQ(tokenizer->TokenToId("<｜tool▁calls▁begin｜>"), 128806);
  EXPECT_FALSE(tokenizer->is_special(128806));
  EXPECT_TRUE(tokenizer->is_special(1));
}

class SmallTokenizerTest : public testing::Test {
 protected:
  void ExpectVectors(const Tokenizer& tokenizer) const {
    for (const json& vector : vectors_["encode"]) {
      const std::string text = vector["text"];
      EXPECT_EQ(json(EncodeOrDie(tokenizer, text)), vector["ids"]) << json(text);
      EXPECT_EQ(json(EncodeOrDie(tokenizer, text, {.match_special = false})), vector["plain_ids"]) << json(text);
      EXPECT_EQ(tokenizer.Decode(vector["ids"].get<std::vector<int32_t>>(), false), text);
    }
  }

  const json vectors_ = json::parse(ReadText(kDataDir + "/tokenizer_vectors.json"));
  const json spec_ = json::parse(ReadText(kSmallModel + "/tokenizer.json"));
  const std::unique_ptr<Tokenizer> tokenizer_ = LoadOrDie(kSmallModel);
};

TEST_F(SmallTokenizerTest, EncodesAsTokenizersDoes) {
  ASSERT_GT(vectors_["encode"].size(), 400);
  ExpectVectors(*tokenizer_);
}

TEST_F(SmallTokenizerTest, DecodesAsTokenizersDoes) {
  for (const json& vector : vectors_["decode"]) {
    const std::vector<int32_t> ids = vector["ids"];
    EXPECT_EQ(tokenizer_->Decode(ids, false), vector["text"]);
    EXPECT_EQ(tokenizer_->Decode(ids, true), vector["text_without_special"]);
  }
}

TEST_F(SmallTokenizerTest, MergesMayBePairs) {
  json spec = spec_;
  for (json& merge : spec["model"]["merges"]) {
    const std::string text = merge;
    const size_t space = text.find(' ');
    merge = {text.substr(0, space), text.substr(space + 1)};
  }
  ModelDir dir;
  dir.Write("tokenizer.json", spec.dump());
  ExpectVectors(*LoadOrDie(dir.path()));
}

TEST_F(SmallTokenizerTest, Bos) {
  std::vector<int32_t> ids = EncodeOrDie(*tokenizer_, "whale");
  ids.insert(ids.begin(), 0);
  EXPECT_EQ(EncodeOrDie(*tokenizer_, "whale", {.add_bos = true}), ids);
  ModelDir dir;
  dir.Write("tokenizer_config.json", "{}");
  const std::unique_ptr<Tokenizer> without = LoadOrDie(dir.path());
  EXPECT_FALSE(without->add_bos_token());
  EXPECT_FALSE(without->bos_id().has_value() || without->eos_id().has_value());
  EXPECT_TRUE(absl::IsFailedPrecondition(without->Encode("whale", {.add_bos = true}).status()));
}

TEST_F(SmallTokenizerTest, OnlyTrustedTextHoldsAddedTokens) {
  const auto encode = [this](std::string_view text, std::vector<TextRange> trusted) {
    return EncodeOrDie(*tokenizer_, text, {.trusted = &trusted});
  };
  for (const json& vector : vectors_["encode"]) {
    const std::string text = vector["text"];
    EXPECT_EQ(json(encode(text, {{0, text.size()}})), vector["ids"]) << json(text);
    EXPECT_EQ(json(encode(text, {})), vector["plain_ids"]) << json(text);
  }
  // A token across the edge of a range is none; one that is shorter may be.
  const std::string eots = "<|EOT|><|EOT|>x";
  EXPECT_EQ(encode(eots, {{0, 14}})[0], 906);
  EXPECT_EQ(encode(eots, {{0, 13}})[0], 905);
  EXPECT_EQ(encode(eots, {{0, 6}}), EncodeOrDie(*tokenizer_, eots, {.match_special = false}));
  EXPECT_EQ(encode(eots, {{1, 14}})[encode(eots, {{1, 14}}).size() - 2], 905);
  EXPECT_EQ(encode(eots, {{0, 7}, {8, 14}}), encode(eots, {{0, 7}}));
  // What lies between is one text: the spaces go with the word although they are of three ranges.
  std::vector<int32_t> spaces = EncodeOrDie(*tokenizer_, "   whale");
  spaces.insert(spaces.begin(), 900);
  EXPECT_EQ(encode("<｜User｜>   whale", {{0, 13}, {14, 15}}), spaces);
  // Several, with both kinds of tokens (those found first and those found in the rest).
  const std::vector<int32_t> mixed = encode("<think><｜User｜><think><｜User｜>", {{0, 7}, {18, 27}, {27, 38}});
  EXPECT_EQ(std::count(mixed.begin(), mixed.end(), 910), 2);
  EXPECT_EQ(std::count(mixed.begin(), mixed.end(), 900), 0);
}

// What BPE would make of other text, matching makes of none that is not trusted.
TEST_F(SmallTokenizerTest, MergesMakeNoAddedTokens) {
  json spec = spec_;
  const int32_t id = spec["model"]["vocab"]["qx"];
  spec["added_tokens"].push_back({{"content", "qx"}, {"id", id}, {"special", false}, {"normalized", true}});
  for (const bool ignore_merges : {false, true}) {
    spec["model"]["ignore_merges"] = ignore_merges;
    ModelDir dir;
    dir.Write("tokenizer.json", spec.dump());
    const auto tokenizer = LoadOrDie(dir.path());
    EXPECT_EQ(EncodeOrDie(*tokenizer, "qx"), std::vector<int32_t>({id}));
    EXPECT_EQ(EncodeOrDie(*tokenizer, "qx", {.match_special = false}).size(), 2u);
    EXPECT_EQ(EncodeOrDie(*tokenizer, "whale", {.match_special = false}), EncodeOrDie(*tokenizer, "whale"));
  }
}

TEST_F(SmallTokenizerTest, TokenTable) {
  int num_tokens = 0, num_special = 0;
  for (int32_t id = -2; id < tokenizer_->vocab_size() + 2; ++id) {
    EXPECT_EQ(tokenizer_->has_token(id), !tokenizer_->TokenBytes(id).empty());
    EXPECT_LE(tokenizer_->TokenBytes(id).size(), tokenizer_->max_token_bytes());
    num_tokens += tokenizer_->has_token(id);
    num_special += tokenizer_->is_special(id);
    EXPECT_EQ(tokenizer_->TokenToId(tokenizer_->TokenBytes(id)),
              tokenizer_->has_token(id) ? std::optional(id) : std::nullopt);
  }
  EXPECT_EQ(num_tokens, static_cast<int>(spec_["model"]["vocab"].size()));
  EXPECT_LT(num_tokens, tokenizer_->vocab_size());  // there are holes
  EXPECT_EQ(num_special, 5);
  EXPECT_EQ(tokenizer_->vocab_size(), 923);
  EXPECT_EQ(tokenizer_->TokenBytes(900), "<｜User｜>");
  EXPECT_EQ(tokenizer_->TokenToId("<think>"), 910);
  EXPECT_EQ(tokenizer_->TokenToId("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer_->Decode(std::vector<int32_t>{-1, 900, 1 << 30, 904}, false), "<｜User｜>");
}

TEST_F(SmallTokenizerTest, RefusesInvalidUtf8AndSaysWhere) {
  for (const json& vector : vectors_["lossy_utf8"]) {
    std::string bytes;
    const std::string hex = vector["hex"];
    for (size_t i = 0; i < hex.size(); i += 2)
      bytes.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    const std::string text = vector["text"];
    // Python replaced something exactly when something was wrong, and first there.
    const size_t good = std::mismatch(bytes.begin(), bytes.end(), text.begin(), text.end()).first - bytes.begin();
    const absl::StatusOr<std::vector<int32_t>> ids = tokenizer_->Encode(bytes);
    EXPECT_EQ(ids.ok(), bytes == text) << hex;
    if (ids.ok()) continue;
    EXPECT_TRUE(absl::IsInvalidArgument(ids.status()));
    const std::optional<size_t> offset = FindInvalidUtf8(bytes);
    EXPECT_NE(std::string(ids.status().message()).find("at byte " + std::to_string(*offset)), std::string::npos);
    EXPECT_LE(*offset, good) << hex;
    EXPECT_FALSE(FindInvalidUtf8(std::string_view(bytes).substr(0, *offset)).has_value()) << hex;
    EXPECT_EQ(text.substr(*offset, 3), "\uFFFD") << hex;
  }
}

// A quadratic step would take minutes here.
TEST_F(SmallTokenizerTest, RunsOfOneMegabyte) {
  const std::string_view units[] = {"a",  " ",   "\n", "\t",     "!",          "1",      "<",   "\0"sv,
                                    "鲸", "고",  "😀",  "\u0301", "\u00A0",     "\u180E", " \n", "\n x",
                                    " !", "!\n", "a1", "<｜",    "<｜User｜>", "whale ", "'s",  "\U0001FAE8"};
  for (const std::string_view unit : units) {
    std::string text;
    while (text.size() < (size_t{1} << 20)) text += unit;
    for (const std::string_view end : {"", "x"}) {
      if (unit.size() > 1 && end.empty()) continue;
      const std::vector<int32_t> ids = EncodeOrDie(*tokenizer_, text + std::string(end));
      EXPECT_TRUE(tokenizer_->Decode(ids, false) == text + std::string(end)) << json(unit) << " " << json(end);
    }
  }
}

TEST_F(SmallTokenizerTest, ManyThreads) {
  std::atomic<int> num_different = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&, thread] {
      const json& vectors = vectors_["encode"];
      for (size_t i = 0; i < 2 * vectors.size(); ++i) {
        const json& vector = vectors[(i * 7 + thread * 31) % vectors.size()];
        const auto ids = tokenizer_->Encode(vector["text"].get_ref<const std::string&>());
        if (!ids.ok() || json(*ids) != vector["ids"]) ++num_different;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_different, 0);
}

}  // namespace
}  // namespace cachalot
