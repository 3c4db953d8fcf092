// What a request may ask beside its prompt, through the whole engine: biases, a least length, a deadline; and what it
// is told of its time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <future>
#include <thread>

#include "absl/time/clock.h"
#include "engine/validation.h"
#include "kernels/ops_types.h"
#include "tests/engine/golden.h"

namespace cachalot {
namespace {

using testing::Contains;
using testing::Each;
using testing::HasSubstr;
using testing::Not;

constexpr int32_t kEos = 1;  // of the golden checkpoints

class EngineRequestTest : public testing::Test {
 protected:
  static EngineOptions Options() {
    EngineOptions options;
    options.model_dir = LoadGolden("v3_like").model_dir;
    options.device = "cpu";
    options.max_model_len = 2048;
    options.max_sequences = 4;
    options.max_batch_tokens = 64;
    return options;
  }
  Request Greedy(int max_tokens) const {
    Request request;
    request.prompt = golden_.prompts[1].tokens;
    request.sampling.temperature = 0;
    request.sampling.max_tokens = max_tokens;
    request.sampling.ignore_eos = true;
    request.sampling.logprobs = 20;
    return request;
  }
  // Statistics once nothing is left; reached within a step or two of the last end.
  static EngineStats Idle(Engine& engine) {
    EngineStats stats = engine.stats();
    for (int i = 0; i < 20000 && stats.running + stats.waiting > 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      stats = engine.stats();
    }
    return stats;
  }

  const Golden golden_ = LoadGolden("v3_like");
  std::unique_ptr<Engine> engine_ = MakeEngine(Options());
};

TEST_F(EngineRequestTest, LogitBiasMovesTheChoiceNotTheLogprobs) {
  const Answer plain = RunAll(*engine_, {Greedy(8)})[0];
  const auto& [second, second_logprob] = plain.logprobs[0].top[1];
  Request less = Greedy(8), more = Greedy(8);
  less.sampling.logit_bias = {{plain.tokens[0], -100.0f}};
  more.sampling.logit_bias = {{77, 100.0f}, {plain.tokens[0], 5.0f}};
  const std::vector<Answer> answers = RunAll(*engine_, {less, more, Greedy(8)});
  EXPECT_EQ(answers[0].tokens[0], second);
  EXPECT_EQ(answers[0].logprobs[0].logprob, second_logprob);
  EXPECT_THAT(answers[0].tokens, Not(Contains(plain.tokens[0])));
  EXPECT_THAT(answers[1].tokens, Each(77));
  EXPECT_EQ(answers[1].logprobs[0].top, plain.logprobs[0].top);
  EXPECT_LT(answers[1].logprobs[0].logprob, plain.logprobs[0].logprob);
  EXPECT_EQ(answers[2].tokens, plain.tokens) << "a neighbour's bias";
  // The slot that had biases has none for its next sequence.
  for (int i = 0; i < 5; ++i) EXPECT_EQ(RunAll(*engine_, {Greedy(8)})[0].tokens, plain.tokens);
}

TEST_F(EngineRequestTest, EveryTokenMayBeBiased) {
  Request request = Greedy(4);
  for (int32_t token = 0; token < 320; ++token) request.sampling.logit_bias.emplace_back(token, 0.25f);
  request.sampling.logit_bias[200].second = 100;
  EXPECT_THAT(RunAll(*engine_, {request, request, request, request})[3].tokens, Each(200));
}

// Biases, and the ends that min_tokens holds back, share one table.
TEST(ValidateRequestTest, CountsBiasesAndBansTogether) {
  ModelInfo model;
  model.vocab_size = 5000;
  model.max_model_len = 100;
  Request request;
  request.prompt = {5};
  for (int32_t token = 0; token < kMaxTokenBiases - 2; ++token) request.sampling.logit_bias.emplace_back(token, 1.0f);
  request.sampling.stop_token_ids = {7, 3000, 7};
  request.sampling.min_tokens = 1;
  model.eos_token_ids = {7};
  EXPECT_TRUE(ValidateRequest(request, model).ok()) << "two ids end the answer";
  model.eos_token_ids = {8};
  const absl::Status status = ValidateRequest(request, model);
  EXPECT_EQ(status.GetPayload(kFieldUrl), absl::Cord("logit_bias"));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("1025 tokens"));
  request.sampling.ignore_eos = true;
  EXPECT_TRUE(ValidateRequest(request, model).ok());
  request.sampling.ignore_eos = false;
  request.sampling.min_tokens = 0;
  EXPECT_TRUE(ValidateRequest(request, model).ok());
}

TEST_F(EngineRequestTest, MinTokensHoldsBackEveryEnd) {
  Request request = Greedy(30);
  request.sampling.ignore_eos = false;
  request.sampling.min_tokens = 7;
  request.sampling.stop_token_ids = {60};
  request.sampling.logit_bias = {{kEos, 100.0f}, {60, 99.0f}};
  Answer answer = RunAll(*engine_, {request})[0];
  EXPECT_EQ(answer.finish_reason, FinishReason::kStop);
  ASSERT_EQ(answer.tokens.size(), 8u) << "seven, and the end";
  EXPECT_EQ(answer.tokens[7], kEos);
  answer.tokens.pop_back();
  EXPECT_THAT(answer.tokens, Not(Contains(kEos)));
  EXPECT_THAT(answer.tokens, Not(Contains(60)));

  request.sampling.ignore_eos = true;  // then it is a token like any other
  answer = RunAll(*engine_, {request})[0];
  EXPECT_EQ(answer.finish_reason, FinishReason::kLength);
  EXPECT_THAT(answer.tokens, Each(kEos));

  request.sampling.min_tokens = 0;
  request.sampling.ignore_eos = false;
  EXPECT_EQ(RunAll(*engine_, {request})[0].tokens.size(), 1u);
}

TEST_F(EngineRequestTest, EndsAtItsDeadline) {
  Request request = Greedy(100000), late = Greedy(3);
  const absl::Time start = absl::Now();
  request.deadline = start + absl::Milliseconds(60);
  late.deadline = start - absl::Hours(1);
  const std::vector<Answer> answers = RunAll(*engine_, {request, late, Greedy(5)});
  for (int i : {0, 1}) {
    EXPECT_EQ(answers[i].finish_reason, FinishReason::kError);
    EXPECT_EQ(answers[i].error.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(answers[i].error.message()), HasSubstr("deadline"));
  }
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(60));
  EXPECT_TRUE(answers[1].tokens.empty());
  EXPECT_EQ(answers[2].finish_reason, FinishReason::kLength) << "has no deadline";
  EXPECT_EQ(Idle(*engine_).blocks_used, 0);
}

// One step takes seconds here; who waits is told at its deadline all the same.
TEST_F(EngineRequestTest, EndsAtItsDeadlineWhileAStepIsRunning) {
  const Golden golden = LoadGolden("long");
  EngineOptions options = Options();
  options.model_dir = golden.model_dir;
  options.max_model_len = options.max_batch_tokens = 8192;
  options.max_sequences = 1;
  auto engine = MakeEngine(options);
  Request large = Greedy(1), small = Greedy(1);
  large.prompt.assign(golden.prompts[0].tokens.begin(), golden.prompts[0].tokens.begin() + 8000);
  small.prompt = {5, 6, 7};
  small.deadline = absl::Now() + absl::Milliseconds(20);
  std::promise<EngineStats> small_ended;
  std::promise<absl::Duration> large_ended;
  const absl::Time start = absl::Now();
  ASSERT_TRUE(engine
                  ->Submit(large,
                           [&](Delta delta) {
                             if (delta.finish_reason != FinishReason::kNone) large_ended.set_value(absl::Now() - start);
                           })
                  .ok());
  ASSERT_TRUE(engine
                  ->Submit(small,
                           [&](Delta delta) {
                             EXPECT_EQ(delta.error.code(), absl::StatusCode::kDeadlineExceeded);
                             small_ended.set_value(engine->stats());
                           })
                  .ok());
  const EngineStats stats = small_ended.get_future().get();
  const absl::Duration small_time = absl::Now() - start, large_time = large_ended.get_future().get();
  std::printf("[ measured ] told after %lld ms, the step took %lld ms\n",
              static_cast<long long>(absl::ToInt64Milliseconds(small_time)),
              static_cast<long long>(absl::ToInt64Milliseconds(large_time)));
  EXPECT_EQ(stats.generated_tokens, 0u) << "the step is still running";
  EXPECT_LT(small_time, large_time);
}

TEST_F(EngineRequestTest, TellsWhereTheTimeWent) {
  EngineOptions options = Options();
  options.max_sequences = 1;
  auto engine = MakeEngine(options);
  const absl::Time start = absl::Now();
  const std::vector<Answer> answers = RunAll(*engine, {Greedy(100), Greedy(1)});
  const absl::Duration all = absl::Now() - start;
  const RequestTimes &first = answers[0].times, &second = answers[1].times;
  EXPECT_GT(first.prefill, absl::ZeroDuration());
  EXPECT_GT(first.decode, first.prefill / 100) << "99 steps";
  EXPECT_GE(second.queued, first.decode) << "waited for the slot";
  EXPECT_EQ(second.decode, absl::ZeroDuration());
  EXPECT_LE(second.queued + second.prefill, all);
  EXPECT_EQ(first.num_preemptions, 0);
}

TEST_F(EngineRequestTest, CancelledAndStoppedRequestsHaveTimesToo) {
  RequestTimes cancelled, stopped;
  std::promise<void> started, ended;
  int num_deltas = 0;
  auto id = engine_->Submit(Greedy(100000), [&](Delta delta) {
    if (++num_deltas == 1) started.set_value();
    if (delta.finish_reason == FinishReason::kNone) return;
    EXPECT_EQ(delta.finish_reason, FinishReason::kCancelled);
    cancelled = delta.times;
    ended.set_value();
  });
  started.get_future().wait();
  engine_->Cancel(*id);
  ended.get_future().wait();
  EXPECT_GT(cancelled.prefill, absl::ZeroDuration());
  Request request = Greedy(100000);
  request.prompt.resize(10);
  ASSERT_TRUE(engine_
                  ->Submit(request,
                           [&](Delta delta) {
                             if (delta.finish_reason != FinishReason::kNone) stopped = delta.times;
                           })
                  .ok());
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  engine_.reset();
  EXPECT_GT(stopped.queued + stopped.prefill + stopped.decode, absl::ZeroDuration());
}

TEST_F(EngineRequestTest, StatisticsAddUpAndAreFreshWhenIdle) {
  EXPECT_EQ(engine_->stats().steps, 0u) << "warming up is not counted";
  EXPECT_EQ(engine_->stats().prompt_tokens, 0u);
  std::vector<Request> requests;
  for (int i = 0; i < 9; ++i) requests.push_back(Greedy(1 + 3 * i));
  const std::vector<Answer> answers = RunAll(*engine_, requests);
  const EngineStats stats = Idle(*engine_);
  size_t num_prompt = 0, num_generated = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    num_prompt += requests[i].prompt.size();
    num_generated += answers[i].tokens.size();
  }
  EXPECT_EQ(stats.running + stats.waiting + stats.blocks_used + stats.waiting_for_slots + stats.waiting_for_blocks, 0);
  EXPECT_GT(stats.blocks_total, 0);
  EXPECT_EQ(stats.prompt_tokens, num_prompt);
  EXPECT_EQ(stats.generated_tokens, num_generated);
  EXPECT_EQ(stats.recomputed_tokens, 0u);
  EXPECT_EQ(stats.step_rows.sum, num_prompt + num_generated - requests.size()) << "no last token is fed";
  EXPECT_EQ(stats.step_rows.count, stats.steps);
  EXPECT_EQ(stats.step_rows.at_most.back(), stats.steps);
  EXPECT_EQ(stats.step_rows.at_most[5], stats.steps) << "64 rows at most";
  EXPECT_LT(stats.step_rows.at_most[0], stats.steps);
}

}  // namespace
}  // namespace cachalot
