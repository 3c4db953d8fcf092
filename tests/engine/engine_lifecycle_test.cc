// The engine's doors: what it refuses, how requests are cancelled, how it stops.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <future>
#include <limits>
#include <random>
#include <thread>

#include "tests/engine/golden.h"

namespace cachalot {
namespace {

using testing::HasSubstr;

EngineOptions SmallOptions() {
  EngineOptions options;
  options.model_dir = std::string(CACHALOT_TEST_DATA_DIR) + "/golden/data/v3_like";
  options.device = "cpu";
  options.max_model_len = 256;
  options.max_sequences = 4;
  options.max_batch_tokens = 32;
  return options;
}

Request Endless(int prompt_tokens = 5) {
  Request request;
  request.prompt.assign(prompt_tokens, 42);
  request.sampling.max_tokens = 1 << 20;
  request.sampling.ignore_eos = true;
  return request;
}

// Spins until the engine has nothing left; the condition is reached within a step or two.
EngineStats Settled(Engine& engine) {
  for (int i = 0; i < 20000; ++i) {
    const EngineStats stats = engine.stats();
    if (stats.running == 0 && stats.waiting == 0) return stats;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return engine.stats();
}

TEST(Engine, RefusesBadOptions) {
  const auto error = [](auto change) {
    EngineOptions options = SmallOptions();
    change(options);
    return std::string(Engine::Create(options).status().message());
  };
  EXPECT_THAT(error([](EngineOptions& o) { o.max_sequences = 0; }), HasSubstr("max-sequences: found 0"));
  EXPECT_THAT(error([](EngineOptions& o) { o.max_batch_tokens = -1; }), HasSubstr("max-batch-tokens: found -1"));
  EXPECT_THAT(error([](EngineOptions& o) { o.kv_cache_dtype = "int4"; }), HasSubstr("kv-cache-dtype: found \"int4\""));
  EXPECT_THAT(error([](EngineOptions& o) { o.activation = "f64"; }), HasSubstr("activation: found \"f64\""));
  EXPECT_THAT(error([](EngineOptions& o) { o.max_model_len = 1 << 20; }), HasSubstr("at most the model's 2560"));
  EXPECT_THAT(error([](EngineOptions& o) { o.kv_cache_bytes = 1 << 17; }), HasSubstr("raise --kv-cache-memory"));
  EXPECT_THAT(error([](EngineOptions& o) { o.model_dir = "/nowhere"; }), HasSubstr("/nowhere"));
  EXPECT_THAT(error([](EngineOptions& o) { o.device = "tpu"; }), HasSubstr("tpu"));
  EXPECT_THAT(error([](EngineOptions& o) {
                o.model_dir = std::string(CACHALOT_TEST_DATA_DIR) + "/golden/data/moonlight";
                o.activation = "fp8";
              }),
              HasSubstr("needs a checkpoint with FP8 weights"));
}

TEST(Engine, RefusesBadRequestsAndKeepsServing) {
  auto engine = MakeEngine(SmallOptions());
  const auto error = [&](auto change) {
    Request request = Endless();
    change(request);
    return std::string(
        engine->Submit(request, [](Delta) { FAIL() << "a refused request has no news"; }).status().message());
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(error([](Request& r) { r.prompt.clear(); }), HasSubstr("prompt"));
  EXPECT_THAT(error([](Request& r) { r.prompt[2] = -1; }), HasSubstr("token id -1"));
  EXPECT_THAT(error([](Request& r) { r.prompt[2] = 512; }), HasSubstr("token id 512"));
  EXPECT_THAT(error([](Request& r) { r.prompt.assign(256, 42); }), HasSubstr("256 tokens"));
  EXPECT_THAT(error([=](Request& r) { r.sampling.temperature = nan; }), HasSubstr("temperature"));
  EXPECT_THAT(error([](Request& r) { r.sampling.temperature = -1; }), HasSubstr("temperature"));
  EXPECT_THAT(error([=](Request& r) { r.sampling.top_p = nan; }), HasSubstr("top_p"));
  EXPECT_THAT(error([](Request& r) { r.sampling.top_p = 0; }), HasSubstr("top_p"));
  EXPECT_THAT(error([](Request& r) { r.sampling.min_p = 2; }), HasSubstr("min_p"));
  EXPECT_THAT(error([](Request& r) { r.sampling.top_k = -5; }), HasSubstr("top_k"));
  EXPECT_THAT(error([](Request& r) { r.sampling.presence_penalty = 3; }), HasSubstr("presence_penalty"));
  EXPECT_THAT(error([](Request& r) { r.sampling.frequency_penalty = -3; }), HasSubstr("frequency_penalty"));
  EXPECT_THAT(error([](Request& r) { r.sampling.repetition_penalty = 0; }), HasSubstr("repetition_penalty"));
  EXPECT_THAT(error([](Request& r) { r.sampling.max_tokens = -1; }), HasSubstr("max_tokens"));
  EXPECT_THAT(error([](Request& r) { r.sampling.logprobs = 21; }), HasSubstr("logprobs"));
  EXPECT_THAT(error([](Request& r) { r.sampling.min_tokens = -1; }), HasSubstr("min_tokens: found -1"));
  EXPECT_THAT(error([](Request& r) { r.sampling.min_tokens = (1 << 20) + 1; }), HasSubstr("min_tokens"));
  EXPECT_THAT(error([](Request& r) { r.sampling.stop_token_ids = {3, 320}; }), HasSubstr("token id 320"));
  const auto bias_error = [&](std::vector<std::pair<int32_t, float>> bias) {
    return error([&](Request& r) { r.sampling.logit_bias = bias; });
  };
  EXPECT_THAT(bias_error({{1, 0.0f}, {320, 0.0f}}), HasSubstr("logit_bias: token id 320"));
  EXPECT_THAT(bias_error({{-1, 0.0f}}), HasSubstr("logit_bias: token id -1"));
  EXPECT_THAT(bias_error({{1, 0.0f}, {2, 1.0f}, {1, 0.0f}}), HasSubstr("token id 1 occurs twice"));
  EXPECT_THAT(bias_error({{1, 100.5f}}), HasSubstr("found 100.5 for token id 1"));
  EXPECT_THAT(bias_error({{1, nan}}), HasSubstr("logit_bias: found nan"));
  EXPECT_THAT(bias_error({{1, -std::numeric_limits<float>::infinity()}}), HasSubstr("logit_bias: found -inf"));
  Request good = Endless();
  good.sampling.max_tokens = 3;
  EXPECT_EQ(RunAll(*engine, {good})[0].tokens.size(), 3u);
}

TEST(Engine, EndsAtTheContextLimit) {
  auto engine = MakeEngine(SmallOptions());
  const Answer answer = RunAll(*engine, {Endless(100)})[0];
  EXPECT_EQ(answer.tokens.size(), 156u);
  EXPECT_EQ(answer.finish_reason, FinishReason::kLength);
}

TEST(Engine, StopsAtAStopToken) {
  auto engine = MakeEngine(SmallOptions());
  Request request = Endless();
  request.sampling.temperature = 0;
  request.sampling.max_tokens = 20;
  const Answer all = RunAll(*engine, {request})[0];
  request.sampling.stop_token_ids = {all.tokens[7]};
  size_t first = 0;
  while (all.tokens[first] != all.tokens[7]) ++first;
  const Answer stopped = RunAll(*engine, {request})[0];
  EXPECT_EQ(stopped.finish_reason, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens.size(), first + 1);
}

TEST(Engine, CancelFreesTheBlocks) {
  auto engine = MakeEngine(SmallOptions());
  std::promise<FinishReason> ended;
  std::atomic<int> num_tokens = 0;
  auto id = engine->Submit(Endless(), [&](Delta delta) {
    num_tokens += static_cast<int>(delta.tokens.size());
    if (delta.finish_reason != FinishReason::kNone) ended.set_value(delta.finish_reason);
  });
  ASSERT_TRUE(id.ok());
  while (num_tokens < 10) std::this_thread::yield();
  EXPECT_GT(engine->stats().blocks_used, 0);
  engine->Cancel(*id);
  EXPECT_EQ(ended.get_future().get(), FinishReason::kCancelled);
  engine->Cancel(*id);
  engine->Cancel(987654321);
  EXPECT_EQ(Settled(*engine).blocks_used, 0);
}

TEST(Engine, RefusesWhenTheQueueIsFull) {
  EngineOptions options = SmallOptions();
  options.max_sequences = 1;
  options.max_waiting = 2;
  auto engine = MakeEngine(options);
  std::vector<RequestId> ids;
  absl::Status refused;
  for (int i = 0; i < 50 && refused.ok(); ++i) {
    auto id = engine->Submit(Endless(), [](Delta) {});
    if (id.ok()) {
      ids.push_back(*id);
    } else {
      refused = id.status();
    }
  }
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GE(ids.size(), 2u);
  for (RequestId id : ids) engine->Cancel(id);
  EXPECT_EQ(Settled(*engine).blocks_used, 0);
}

TEST(Engine, StoppingTellsEveryRequest) {
  auto engine = MakeEngine(SmallOptions());
  std::atomic<int> num_ended = 0;
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(engine
                    ->Submit(Endless(),
                             [&](Delta delta) {
                               if (delta.finish_reason == FinishReason::kNone) return;
                               // Those that reached the context's end before the stop have simply ended.
                               if (delta.finish_reason == FinishReason::kError) {
                                 EXPECT_EQ(delta.error.code(), absl::StatusCode::kUnavailable);
                               }
                               ++num_ended;
                             })
                    .ok());
  }
  engine.reset();
  EXPECT_EQ(num_ended, 10);
}

// Many threads submit and cancel at once; run under TSan too.
TEST(Engine, ManyThreads) {
  auto engine = MakeEngine(SmallOptions());
  constexpr int kThreads = 4, kRequests = 25;
  std::atomic<int> num_ended = 0, num_cancelled = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < kRequests; ++i) {
        Request request = Endless(1 + random() % 60);
        request.sampling.max_tokens = 1 + random() % 20;
        auto id = engine->Submit(request, [&](Delta delta) {
          if (delta.finish_reason == FinishReason::kNone) return;
          num_cancelled += delta.finish_reason == FinishReason::kCancelled;
          ++num_ended;
        });
        ASSERT_TRUE(id.ok());
        if (random() % 3 == 0) engine->Cancel(*id);
        engine->stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Settled(*engine).blocks_used, 0);
  engine.reset();
  EXPECT_EQ(num_ended, kThreads * kRequests);
  EXPECT_GT(num_cancelled, 0);
}

}  // namespace
}  // namespace cachalot
