// Tokenizer files that are not supported, malformed, cut or damaged: a Status, never a crash.
#include "server/text/tokenizer_files.h"

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/server/tokenizer_testing.h"

namespace cachalot {
namespace {

using nlohmann::json;

struct BadFile {
  const char* message;  // part of what must be said
  absl::StatusCode code;
  std::function<void(json&)> edit;
};
constexpr absl::StatusCode kUnsupported = absl::StatusCode::kUnimplemented;
constexpr absl::StatusCode kMalformed = absl::StatusCode::kInvalidArgument;

json SmallFile(const std::string& name) { return json::parse(ReadText(kSmallModel + "/" + name)); }

json& Step(json& tokenizer, int i) { return tokenizer["pre_tokenizer"]["pretokenizers"][i]; }

json Template(const json& single) { return {{"type", "TemplateProcessing"}, {"single", single}}; }
const json kBosItem = {{"SpecialToken", {{"id", "<｜begin▁of▁sentence｜>"}, {"type_id", 0}}}};
const json kTextItem = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};

// `file` is what the message must blame.
void ExpectRefused(const std::string& edited, const BadFile& bad, const std::string& file) {
  ModelDir dir;
  json content = SmallFile(edited);
  bad.edit(content);
  dir.Write(edited, content.dump());
  const absl::Status status = Tokenizer::Load(dir.path()).status();
  const std::string message(status.message());
  EXPECT_EQ(status.code(), bad.code) << bad.message << ": " << status;
  EXPECT_NE(message.find(bad.message), std::string::npos) << bad.message << ": " << status;
  EXPECT_EQ(message.rfind(dir.path() + "/" + file + ": ", 0), 0) << status;
}

TEST(TokenizerFilesTest, Model) {
  const BadFile files[] = {
      {"model type \"Unigram\"", kUnsupported, [](json& j) { j["model"]["type"] = "Unigram"; }},
      {"model.type", kMalformed, [](json& j) { j["model"].erase("type"); }},
      {"\"model\"", kMalformed, [](json& j) { j.erase("model"); }},
      {"dropout", kUnsupported, [](json& j) { j["model"]["dropout"] = 0.1; }},
      {"end_of_word_suffix", kUnsupported, [](json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }},
      {"ignore_merges", kMalformed, [](json& j) { j["model"]["ignore_merges"] = 1; }},
      {"model.vocab", kMalformed, [](json& j) { j["model"]["vocab"] = json::array(); }},
      {"the id of \"a\"", kMalformed, [](json& j) { j["model"]["vocab"]["a"] = -1; }},
      {"the id of \"a\"", kMalformed, [](json& j) { j["model"]["vocab"]["a"] = 1e3; }},
      {"the id of \"a\"", kMalformed, [](json& j) { j["model"]["vocab"]["a"] = "5"; }},
      {"the id of \"a\"", kMalformed, [](json& j) { j["model"]["vocab"]["a"] = 4294967296; }},
      {"the id of \"a\"", kMalformed, [](json& j) { j["model"]["vocab"]["a"] = kMaxTokenIds; }},
      {"to two tokens", kMalformed, [](json& j) { j["model"]["vocab"]["a"] = j["model"]["vocab"]["b"]; }},
      {"empty token", kMalformed, [](json& j) { j["model"]["vocab"][""] = 800; }},
      {"0x00 is missing", kUnsupported, [](json& j) { j["model"]["vocab"].erase("Ā"); }},
      {"merges[0]: \"Zy\" is not", kMalformed, [](json& j) { j["model"]["merges"][0] = "Z y"; }},
      {"merges[1]", kMalformed, [](json& j) { j["model"]["merges"][1] = "a b c"; }},
      {"merges[1]", kMalformed, [](json& j) { j["model"]["merges"][1] = "ab"; }},
      {"merges[1]", kMalformed,
       [](json& j) {
         j["model"]["merges"][1] = {"a", "b", "c"};
       }},
      {"merges[1]", kMalformed,
       [](json& j) {
         j["model"]["merges"][1] = {"a", 3};
       }},
      {"merges[1]", kMalformed, [](json& j) { j["model"]["merges"][1] = nullptr; }},
      {"the same pair", kMalformed, [](json& j) { j["model"]["merges"][5] = j["model"]["merges"][9]; }},
      {"model.merges", kMalformed, [](json& j) { j["model"]["merges"] = "a b"; }},
  };
  for (const BadFile& bad : files) ExpectRefused("tokenizer.json", bad, "tokenizer.json");
}

TEST(TokenizerFilesTest, StepsAndAddedTokens) {
  const BadFile files[] = {
      {"normalizer \"NFC\"", kUnsupported,
       [](json& j) {
         j["normalizer"] = {{"type", "NFC"}};
       }},
      {"normalizer \"NFC\"", kUnsupported,
       [](json& j) {
         j["normalizer"]["normalizers"] = {{{"type", "NFC"}}};
       }},
      {"without pre_tokenizer", kUnsupported, [](json& j) { j["pre_tokenizer"] = nullptr; }},
      {"pre_tokenizer \"Digits\"", kUnsupported, [](json& j) { Step(j, 0)["type"] = "Digits"; }},
      {"behavior \"Removed\"", kUnsupported, [](json& j) { Step(j, 0)["behavior"] = "Removed"; }},
      {"invert", kUnsupported, [](json& j) { Step(j, 0)["invert"] = true; }},
      {"pattern", kUnsupported,
       [](json& j) {
         Step(j, 0)["pattern"] = {{"String", "x"}};
       }},
      {"pattern", kMalformed, [](json& j) { Step(j, 0).erase("pattern"); }},
      {"\\p{Lu} is not", kUnsupported, [](json& j) { Step(j, 0)["pattern"]["Regex"] = "\\p{Lu}"; }},
      {"regular expression", kMalformed, [](json& j) { Step(j, 0)["pattern"]["Regex"] = "(a"; }},
      {"add_prefix_space", kUnsupported, [](json& j) { Step(j, 3)["add_prefix_space"] = true; }},
      {"after ByteLevel", kUnsupported, [](json& j) { std::swap(Step(j, 2), Step(j, 3)); }},
      {"without ByteLevel", kUnsupported, [](json& j) { j["pre_tokenizer"]["pretokenizers"].erase(3); }},
      {"pretokenizers", kMalformed, [](json& j) { j["pre_tokenizer"]["pretokenizers"] = 1; }},
      {"decoder \"WordPiece\"", kUnsupported, [](json& j) { j["decoder"]["type"] = "WordPiece"; }},
      {"post_processor", kUnsupported, [](json& j) { j["post_processor"]["type"] = "BertProcessing"; }},
      {"added_tokens", kMalformed, [](json& j) { j["added_tokens"] = 1; }},
      {"added_tokens[3] has no", kMalformed, [](json& j) { j["added_tokens"][3] = "x"; }},
      {"added_tokens[3] has no", kMalformed, [](json& j) { j["added_tokens"][3]["content"] = ""; }},
      {"added_tokens[3]: the id", kMalformed, [](json& j) { j["added_tokens"][3]["id"] = -5; }},
      {"added_tokens[3]: the id", kMalformed, [](json& j) { j["added_tokens"][3]["id"] = kMaxTokenIds; }},
      {"taken", kMalformed, [](json& j) { j["added_tokens"][3]["id"] = 899; }},
      {"taken", kMalformed, [](json& j) { j["added_tokens"][3]["content"] = "new"; }},
      {"taken", kMalformed, [](json& j) { j["added_tokens"].push_back(j["added_tokens"][3]); }},
      {"\"lstrip\"", kUnsupported, [](json& j) { j["added_tokens"][3]["lstrip"] = true; }},
      {"\"special\"", kMalformed, [](json& j) { j["added_tokens"][3]["special"] = "no"; }},
  };
  for (const BadFile& bad : files) ExpectRefused("tokenizer.json", bad, "tokenizer.json");
}

TEST(TokenizerFilesTest, PostProcessor) {
  const auto with = [](const json& single) { return [=](json& j) { j["post_processor"] = Template(single); }; };
  const std::string kTokenizer = "tokenizer.json", kConfig = "tokenizer_config.json";
  ExpectRefused(kTokenizer, {"template other than", kUnsupported, with({kTextItem, kBosItem})}, kTokenizer);
  ExpectRefused(kTokenizer, {"template other than", kUnsupported, with({kBosItem, kTextItem, kBosItem})}, kTokenizer);
  ExpectRefused(kTokenizer, {"template other than", kUnsupported, with(json::array())}, kTokenizer);
  ExpectRefused(kTokenizer, {"template other than", kUnsupported, with({1, 2})}, kTokenizer);
  ExpectRefused(kTokenizer, {"post_processor", kUnsupported, with("x")}, kTokenizer);
  const json other = {{"SpecialToken", {{"id", "<think>"}}}};
  ExpectRefused(kTokenizer, {"contradicts", kUnsupported, with({other, kTextItem})}, kConfig);

  ModelDir dir;
  json tokenizer = SmallFile(kTokenizer);
  tokenizer["post_processor"] = Template({kBosItem, kTextItem});
  dir.Write(kTokenizer, tokenizer.dump());
  EXPECT_TRUE(LoadOrDie(dir.path())->add_bos_token());
  json config = SmallFile(kConfig);
  config["add_bos_token"] = false;
  dir.Write(kConfig, config.dump());
  EXPECT_TRUE(absl::IsUnimplemented(Tokenizer::Load(dir.path()).status()));
  tokenizer["post_processor"] = nullptr;
  dir.Write(kTokenizer, tokenizer.dump());
  EXPECT_FALSE(LoadOrDie(dir.path())->add_bos_token());
}

TEST(TokenizerFilesTest, Config) {
  const BadFile files[] = {
      {"\"add_bos_token\" is not a boolean", kMalformed, [](json& j) { j["add_bos_token"] = "yes"; }},
      {"\"add_eos_token\"", kUnsupported, [](json& j) { j["add_eos_token"] = true; }},
      {"\"bos_token\" is missing", kMalformed, [](json& j) { j["bos_token"] = nullptr; }},
      {"\"bos_token\" is not a token", kMalformed, [](json& j) { j["bos_token"] = 0; }},
      {"\"eos_token\" is not a token", kMalformed,
       [](json& j) {
         j["eos_token"] = {{"content", 1}};
       }},
      {"added_tokens_decoder", kMalformed, [](json& j) { j["added_tokens_decoder"] = 1; }},
      {"lacks", kUnsupported,
       [](json& j) {
         j["added_tokens_decoder"]["7"] = {{"content", "<new>"}};
       }},
      {"lacks", kUnsupported,
       [](json& j) {
         j["added_tokens_decoder"]["7"] = {{"content", "<think>"}};
       }},
  };
  for (const BadFile& bad : files) ExpectRefused("tokenizer_config.json", bad, "tokenizer_config.json");
  ExpectRefused("tokenizer_config.json",
                {"no token \"<gone>\"", kMalformed, [](json& j) { j["eos_token"] = "<gone>"; }}, "tokenizer.json");
  ModelDir dir;
  json config = SmallFile("tokenizer_config.json");
  config["added_tokens_decoder"]["910"] = {{"content", "<think>"}};
  config.erase("add_bos_token");  // LlamaTokenizer adds BOS unless told otherwise
  dir.Write("tokenizer_config.json", config.dump());
  EXPECT_TRUE(LoadOrDie(dir.path())->add_bos_token());
}

TEST(TokenizerFilesTest, Gpt2Form) {
  ModelDir dir;
  json tokenizer = SmallFile("tokenizer.json");
  tokenizer["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  tokenizer["model"]["merges"] = {"q x"};
  dir.Write("tokenizer.json", tokenizer.dump());
  const std::unique_ptr<Tokenizer> gpt2 = LoadOrDie(dir.path());
  EXPECT_EQ(gpt2->Encode("qx'sqx")->size(), 4);
  // A whole piece that is a token stays whole if merges are ignored.
  EXPECT_EQ(gpt2->Encode("qxj")->size(), 2);
  tokenizer["model"]["ignore_merges"] = true;
  dir.Write("tokenizer.json", tokenizer.dump());
  EXPECT_EQ(*LoadOrDie(dir.path())->Encode("qxj"), std::vector<int32_t>{922});
}

TEST(TokenizerFilesTest, NotFiles) {
  for (const std::string name : {"tokenizer.json", "tokenizer_config.json"}) {
    ModelDir dir;
    dir.Remove(name);
    absl::Status status = Tokenizer::Load(dir.path()).status();
    EXPECT_TRUE(absl::IsNotFound(status)) << status;
    EXPECT_NE(std::string(status.message()).find(name), std::string::npos) << status;
    std::filesystem::create_directory(dir.path() + "/" + name);
    status = Tokenizer::Load(dir.path()).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    std::filesystem::remove(dir.path() + "/" + name);

    const std::string deep(1 << 20, '[');
    const std::string contents[] = {"",
                                    "null",
                                    "[]",
                                    "7",
                                    "{",
                                    "\xFF\xFE",
                                    "{\"model\":1e999}",
                                    "{\"a\":\"\xC3\"}",
                                    deep,
                                    "{\"model\":" + deep + std::string(1 << 20, ']') + "}"};
    for (const std::string& content : contents) {
      dir.Write(name, content);
      EXPECT_TRUE(absl::IsInvalidArgument(Tokenizer::Load(dir.path()).status()))
          << name << " " << content.substr(0, 30);
    }
  }
  EXPECT_TRUE(absl::IsNotFound(Tokenizer::Load("/no/such/dir").status()));
}

TEST(TokenizerFilesTest, CutOrDamagedFilesDoNotCrash) {
  const std::string whole = ReadText(kSmallModel + "/tokenizer.json");
  ModelDir dir;
  for (size_t size = 0; size < whole.size() - 2; size += 211) {
    dir.Write("tokenizer.json", whole.substr(0, size));
    EXPECT_TRUE(absl::IsInvalidArgument(Tokenizer::Load(dir.path()).status())) << size;
  }
  std::mt19937 random(3);
  int num_loaded = 0, num_refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string damaged = whole;
    for (int n = 1 + random() % 3; n > 0; --n) {
      // Mostly swaps within JSON's own characters, so that many files still parse.
      const size_t at = random() % damaged.size();
      damaged[at] = random() % 4 == 0 ? static_cast<char>(random()) : "0123456789,:[]{}\"truefalsn "[random() % 28];
    }
    dir.Write("tokenizer.json", damaged);
    const auto tokenizer = Tokenizer::Load(dir.path());
    (tokenizer.ok() ? num_loaded : num_refused)++;
    EXPECT_TRUE(!tokenizer.ok() || (*tokenizer)->Encode("A whale <｜User｜> 鲸 123\n").ok());
  }
  EXPECT_GT(num_loaded, 0);
  EXPECT_GT(num_refused, 10);
}

TEST(TokenizerFilesTest, ShuffledJsonDoesNotCrash) {
  // Puts a value from somewhere into somewhere else: right JSON, wrong types.
  const json whole = SmallFile("tokenizer.json");
  const json flat = whole.flatten();
  std::vector<std::string> paths;
  for (const auto& [path, value] : flat.items()) {
    // One added token, one rule and no vocabulary stand for all.
    const bool is_repeated = path.starts_with("/added_tokens/") && !path.starts_with("/added_tokens/0");
    const bool is_rule = path.starts_with("/model/merges/") && path != "/model/merges/7";
    if (!is_repeated && !is_rule && !path.starts_with("/model/vocab")) paths.push_back(path);
  }
  const json values[] = {nullptr,       true,           -1,      1.5, 18446744073709551615u, "", "x",
                         json::array(), json::object(), {1, {2}}};
  for (const std::string& path : paths) {
    for (const json& value : values) {
      json edited = whole;
      json::json_pointer pointer(path);
      edited[pointer] = value;
      if (!pointer.parent_pointer().empty() && value.is_array()) edited[pointer.parent_pointer()] = value;
      ModelDir dir;
      dir.Write("tokenizer.json", edited.dump());
      const absl::Status status = Tokenizer::Load(dir.path()).status();
      EXPECT_TRUE(status.ok() || absl::IsUnimplemented(status) || absl::IsInvalidArgument(status)) << path << status;
    }
  }
}

}  // namespace
}  // namespace cachalot
