// OpenAiServerTest: OpenAI's API on a free port, with a fake engine behind it.
#ifndef CACHALOT_TESTS_SERVER_OPENAI_TESTING_H_
#define CACHALOT_TESTS_SERVER_OPENAI_TESTING_H_

#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/http/http_server.h"
#include "server/http/openai.h"
#include "server/http/openai_error.h"
#include "server/text/generator.h"
#include "tests/server/fake_engine.h"
#include "tests/server/raw_http_client.h"

namespace cachalot {

class OpenAiServerTest : public testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(CACHALOT_TEST_DATA_DIR "/golden/data/v3_like");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = std::move(*tokenizer);
  }
  void TearDown() override {
    if (server_ == nullptr) return;
    generator_->Stop();
    engine_ = nullptr;
    server_->Stop(absl::ZeroDuration());
  }

  // Serves "org/model"; `chat_template` by name; `sampling`: of requests that say nothing.
  void Start(FakeEngineOptions options = {}, bool with_tokenizer = true, const char* chat_template = "v3",
             const SamplingParams& sampling = {}) {
    engine_ = std::make_unique<FakeEngine>(std::move(options));
    GeneratorOptions generator_options;
    generator_options.chat_template = ChatTemplate::ParseName(chat_template);
    generator_options.metrics = &metrics_;
    generator_options.sampling = sampling;
    generator_ =
        std::make_unique<Generator>(engine_.get(), with_tokenizer ? tokenizer_.get() : nullptr, generator_options);
    api_ = std::make_unique<OpenAiApi>(generator_.get(), &metrics_, "org/model", "/models/model", "1.2.3");
    server_ = std::make_unique<HttpServer>(HttpOptions{.port = 0}, HttpErrorResponse);
    api_->Register(server_.get());
    ASSERT_TRUE(server_->Bind().ok());
    ASSERT_TRUE(server_->Start(100).ok());
    client_ = std::make_unique<RawHttpClient>(server_->port());
  }

  static nlohmann::json Parse(const std::string& text) {
    nlohmann::json value = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    EXPECT_FALSE(value.is_discarded()) << text;
    return value;
  }
  // The answer to POST /v1/completions, which must be 200.
  nlohmann::json Complete(const nlohmann::json& body) {
    const ClientResponse response = client_->Post("/v1/completions", body.dump());
    EXPECT_EQ(response.status, 200) << response.body;
    EXPECT_EQ(response.headers.at("content-type"), "application/json");
    return Parse(response.body);
  }

  std::vector<int32_t> Ids(std::string_view text) { return *tokenizer_->Encode(text); }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<FakeEngine> engine_;
  Metrics metrics_;
  std::unique_ptr<Generator> generator_;
  std::unique_ptr<OpenAiApi> api_;
  std::unique_ptr<HttpServer> server_;
  std::unique_ptr<RawHttpClient> client_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_OPENAI_TESTING_H_
