// What the tests of the generator share: a fixture that runs a call against the fake engine and collects the answer.
#ifndef CACHALOT_TESTS_SERVER_GENERATOR_TESTING_H_
#define CACHALOT_TESTS_SERVER_GENERATOR_TESTING_H_

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/text/generator.h"
#include "tests/server/fake_engine.h"

namespace cachalot {

// Everything one generation said.
struct Answer {
  std::string text, reasoning;
  std::vector<std::string> pieces;
  std::vector<int32_t> tokens;
  std::vector<TokenScore> scores;
  GenerateEvent last;
};

class Collector {
 public:
  EventSink sink() {
    return [this](GenerateEvent event) {
      std::lock_guard lock(mutex_);
      EXPECT_FALSE(is_done_) << "an event after the last";
      if (event.takes_back_reasoning) answer_.reasoning.clear();
      answer_.text += event.text;
      answer_.reasoning += event.reasoning;
      answer_.pieces.push_back(event.text);
      answer_.tokens.insert(answer_.tokens.end(), event.tokens.begin(), event.tokens.end());
      answer_.scores.insert(answer_.scores.end(), event.scores.begin(), event.scores.end());
      is_done_ = event.finish_reason != FinishReason::kNone;
      answer_.last = std::move(event);
      done_.notify_all();
    };
  }
  Answer Wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(done_.wait_for(lock, std::chrono::seconds(10), [this] { return is_done_; }));
    return answer_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  bool is_done_ = false;
  Answer answer_;
};

class GeneratorTest : public testing::Test {
 protected:
  void SetUp() override {
    auto tokenizer = Tokenizer::Load(CACHALOT_TEST_DATA_DIR "/golden/data/v3_like");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = std::move(*tokenizer);
  }

  std::vector<int32_t> Ids(std::string_view text) { return *tokenizer_->Encode(text); }
  int32_t Byte(uint8_t byte) { return *tokenizer_->TokenToId(std::string(1, static_cast<char>(byte))); }

  Answer Run(FakeEngineOptions options, GenerateCall call, const Tokenizer* tokenizer,
             GeneratorOptions generator_options = {}) {
    FakeEngine engine(std::move(options));
    Generator generator(&engine, tokenizer, generator_options);
    auto plan = generator.Prepare(std::move(call));
    EXPECT_TRUE(plan.ok()) << plan.status();
    if (!plan.ok()) return {};
    plan_ = *plan;
    Collector collector;
    auto generation = generator.Start(*plan, 0, collector.sink());
    EXPECT_TRUE(generation.ok()) << generation.status();
    Answer answer = collector.Wait();
    EXPECT_TRUE(engine.AwaitIdle());
    num_cancels_ = engine.num_cancels();
    request_ = engine.requests().back();
    return answer;
  }
  Answer Run(FakeEngineOptions options, GenerateCall call) {
    return Run(std::move(options), std::move(call), tokenizer_.get());
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::shared_ptr<const GeneratePlan> plan_;
  int num_cancels_ = 0;
  Request request_;  // the last one that reached the engine
};

inline GenerateCall Call(std::string prompt, int max_tokens = 16) {
  GenerateCall call;
  call.prompt = std::move(prompt);
  call.sampling.max_tokens = max_tokens;
  return call;
}

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_GENERATOR_TESTING_H_
