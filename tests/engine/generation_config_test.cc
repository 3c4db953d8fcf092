// generation_config.json: what is taken from it, what is refused, and what of it an engine goes by.
#include "engine/model/generation_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "engine/inspect.h"
#include "tests/engine/checkpoint_writer.h"
#include "tests/engine/golden.h"

namespace cachalot {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

absl::StatusOr<GenerationConfig> Read(const std::string& text) {
  TempDir dir;
  WriteFile(dir / "generation_config.json", text);
  return GenerationConfig::Load(dir.path(), /*vocab_size=*/100);
}

TEST(GenerationConfigTest, ReadsWhatPublishedFilesHave) {
  const auto r1 = Read(R"({"_from_model_config": true, "bos_token_id": 0, "eos_token_id": 1, "do_sample": true,
                           "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"})");
  ASSERT_TRUE(r1.ok()) << r1.status();
  EXPECT_THAT(r1->eos_token_ids, ElementsAre(1));
  EXPECT_EQ(DescribeSampling(r1->sampling), "temperature 0.6, top_p 0.95");
  const auto all = Read(R"({"eos_token_id": [1, 2], "do_sample": false, "temperature": 0, "top_k": 20, "min_p": 0.1,
                            "repetition_penalty": 1.05, "top_p": null, "max_new_tokens": 5})");
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_THAT(all->eos_token_ids, ElementsAre(1, 2));
  EXPECT_EQ(DescribeSampling(all->sampling), "temperature 0, top_k 20, min_p 0.1, repetition_penalty 1.05");
  for (const char* nothing : {"{}", R"({"eos_token_id": null, "temperature": 1.0, "top_p": 1, "top_k": -1})"}) {
    const auto config = Read(nothing);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_THAT(config->eos_token_ids, IsEmpty());
    EXPECT_EQ(DescribeSampling(config->sampling), "");
  }
  TempDir empty;
  EXPECT_TRUE(GenerationConfig::Load(empty.path(), 100).ok());
}

TEST(GenerationConfigTest, RefusesWhatIsMalformedInOneLine) {
  for (const auto& [text, message] : std::vector<std::pair<const char*, const char*>>{
           {"", "parse error"},
           {"[1]", "found array, expected an object"},
           {R"({"eos_token_id": 100})", "eos_token_id: found 100, expected an integer from 0 to 99"},
           {R"({"eos_token_id": -1})", "eos_token_id: found -1"},
           {R"({"eos_token_id": [1, "2"]})", "eos_token_id: found \"2\""},
           {R"({"eos_token_id": 1, "eos_token_id": 2})", "twice"},
           {R"({"temperature": -0.1})", "temperature: found -0.1, expected a number from 0 to 2"},
           {R"({"temperature": "hot"})", "temperature: found \"hot\""},
           {R"({"top_p": 0})", "top_p: found 0, expected a number above 0"},
           {R"({"top_p": 1e-60})", "top_p: found 1e-60, expected a number above 0"},
           {R"({"top_p": 1.5})", "top_p: found 1.5"},
           {R"({"top_k": 2.5})", "top_k: found 2.5"},
           {R"({"top_k": -2})", "top_k: found -2"},
           {R"({"min_p": 2})", "min_p: found 2"},
           {R"({"repetition_penalty": 0})", "repetition_penalty: found 0, expected a number above 0"},
           {R"({"repetition_penalty": 1e60})", "repetition_penalty: found"}}) {
    const absl::Status status = Read(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
    EXPECT_THAT(std::string(status.message()), HasSubstr("/generation_config.json: "));
    EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
  }
}

// A checkpoint beside which there is a generation_config.json and whose config.json names other end tokens.
class EndTokensTest : public testing::Test {
 protected:
  EndTokensTest() {
    const std::string golden = LoadGolden("v3_like").model_dir;
    for (const auto& file : std::filesystem::directory_iterator(golden)) {
      if (file.path().filename() == "config.json") continue;
      std::filesystem::create_symlink(file.path(), dir_ / file.path().filename().string());
    }
    std::ifstream(golden + "/config.json") >> config_;
  }

  std::unique_ptr<Engine> Make(const nlohmann::json& of_config, const char* generation_config,
                               std::optional<int32_t> of_tokenizer) {
    config_["eos_token_id"] = of_config;
    WriteFile(dir_ / "config.json", config_.dump());
    WriteFile(dir_ / "generation_config.json", generation_config);
    EngineOptions options;
    options.model_dir = dir_.path();
    options.device = "cpu";
    options.max_model_len = 128;
    options.max_sequences = 1;
    auto engine = Engine::Create(options, {.valid_tokens = 0, .eos_token_id = of_tokenizer});
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  TempDir dir_;
  nlohmann::json config_;
};

TEST_F(EndTokensTest, AreThoseOfAllFiles) {
  const auto engine = Make({5, 7}, R"({"eos_token_id": [9, 5], "temperature": 0.5})", 11);
  EXPECT_THAT(engine->model().eos_token_ids, ElementsAre(5, 7, 9, 11));
  EXPECT_EQ(engine->model().sampling.temperature, 0.5f);
  for (const int32_t token : {5, 7, 9, 11, 13}) {
    Request request;
    request.prompt = {1, 2, 3};
    request.sampling.max_tokens = 3;
    request.sampling.temperature = 0;
    request.sampling.logit_bias = {{token, 100.0f}};
    const Answer answer = RunAll(*engine, {request})[0];
    EXPECT_EQ(answer.finish_reason, token == 13 ? FinishReason::kLength : FinishReason::kStop) << token;
    EXPECT_EQ(answer.tokens.size(), token == 13 ? 3u : 1u) << token;
  }
}

TEST_F(EndTokensTest, MayBeMissing) {
  EXPECT_THAT(Make(nullptr, "{}", std::nullopt)->model().eos_token_ids, IsEmpty());
  EXPECT_THAT(Make(nullptr, "{}", 1 << 20)->model().eos_token_ids, IsEmpty()) << "a token that the head does not have";
  EXPECT_THAT(Make(nullptr, "{}", 4)->model().eos_token_ids, ElementsAre(4));
}

TEST_F(EndTokensTest, AreInTheReport) {
  Make({5, 7}, R"({"eos_token_id": [9, 5], "temperature": 0.5})", std::nullopt);
  EXPECT_THAT(Inspect(dir_.path(), false)->text,
              HasSubstr("answers     end at token 5, 7, 9; temperature 0.5 by default"));
  WriteFile(dir_ / "generation_config.json", "5");
  EXPECT_THAT(std::string(Inspect(dir_.path(), false).status().message()), HasSubstr("expected an object"));
  std::filesystem::remove(dir_ / "generation_config.json");
  config_.erase("eos_token_id");
  WriteFile(dir_ / "config.json", config_.dump());
  EXPECT_THAT(Inspect(dir_.path(), false)->text, HasSubstr("answers     end at no token; temperature 1 by default"));
}

}  // namespace
}  // namespace cachalot
