// Generator, AnswerStream and StopStrings: text, stop strings, echo, log-probabilities, cancellation.
#include "server/text/generator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "server/request_error.h"
#include "server/text/stop_strings.h"
#include "tests/server/generator_testing.h"

namespace cachalot {
namespace {

// --- StopStrings ---

std::string PushAll(StopStrings* stops, const std::vector<std::string>& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += stops->Push(piece);
  return text + stops->Flush();
}

TEST(StopStringsTest, WithoutAnyEverythingPasses) {
  StopStrings stops({});
  EXPECT_EQ(stops.Push("abc"), "abc");
  EXPECT_EQ(stops.Flush(), "");
}

TEST(StopStringsTest, HoldsBackWhatCouldBeginOne) {
  StopStrings stops({"END"});
  EXPECT_EQ(stops.Push("the E"), "the ");
  EXPECT_EQ(stops.Push("N"), "");
  EXPECT_EQ(stops.Push("E"), "EN");  // "EN" cannot become END any more, "E" can
  EXPECT_EQ(stops.Push("ND and more"), "");
  ASSERT_NE(stops.hit(), nullptr);
  EXPECT_EQ(*stops.hit(), "END");
  EXPECT_EQ(stops.Push("more"), "");
  EXPECT_EQ(stops.Flush(), "");
}

TEST(StopStringsTest, FlushReleasesWhatWasHeld) {
  StopStrings stops({"END"});
  EXPECT_EQ(stops.Push("the EN"), "the ");
  EXPECT_EQ(stops.Flush(), "EN");
  EXPECT_EQ(stops.hit(), nullptr);
}

TEST(StopStringsTest, TheOneThatIsCompleteFirstWins) {
  StopStrings stops({"long stop", "stop"});
  EXPECT_EQ(PushAll(&stops, {"a long st", "op it is"}), "a ");
  EXPECT_EQ(*stops.hit(), "long stop");
  StopStrings shorter({"xabz", "ab"});
  EXPECT_EQ(PushAll(&shorter, {"xabz"}), "x");
  EXPECT_EQ(*shorter.hit(), "ab");
}

TEST(StopStringsTest, OneThatIsCompleteTooEarlyIsText) {
  StopStrings stops({"ab", "xabz"});
  EXPECT_EQ(stops.Push("ab", /*may_stop=*/false), "ab");
  EXPECT_EQ(stops.Push("xab", /*may_stop=*/false), "");  // could begin "xabz"
  EXPECT_EQ(stops.Push("q"), "xabq");
  EXPECT_EQ(stops.Push("a", /*may_stop=*/false), "");
  EXPECT_EQ(stops.hit(), nullptr);
  EXPECT_EQ(stops.Push("b"), "");  // begun early, complete in time
  ASSERT_NE(stops.hit(), nullptr);
  EXPECT_EQ(*stops.hit(), "ab");
}

// Character by character is the definition: however the text is cut, the outcome is the same.
TEST(StopStringsTest, CutsDoNotMatter) {
  std::mt19937 random(1);
  int num_hits = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::string> stop_list;
    for (int i = 0; i < 1 + static_cast<int>(random() % 3); ++i) {
      std::string stop;
      for (int j = 0; j < 1 + static_cast<int>(random() % 4); ++j) stop.push_back("ab"[random() % 2]);
      stop_list.push_back(stop);
    }
    std::string text;
    for (int i = 0; i < 12; ++i) text.push_back("abc"[random() % 3]);
    std::vector<std::string> pieces, characters;
    for (size_t at = 0; at < text.size();) {
      pieces.push_back(text.substr(at, 1 + random() % 5));
      at += pieces.back().size();
    }
    for (const char c : text) characters.emplace_back(1, c);
    StopStrings cut(stop_list), whole(stop_list);
    EXPECT_EQ(PushAll(&cut, pieces), PushAll(&whole, characters)) << text;
    ASSERT_EQ(cut.hit() == nullptr, whole.hit() == nullptr);
    if (cut.hit() == nullptr) continue;
    ++num_hits;
    EXPECT_EQ(*cut.hit(), *whole.hit());
  }
  EXPECT_GT(num_hits, 500);
}

// --- Generator ---

TEST_F(GeneratorTest, TextTokensAndUsage) {
  const std::vector<int32_t> script = Ids("Hello world, the end");
  const Answer answer = Run({.script = script}, Call("Hello", static_cast<int>(script.size())));
  EXPECT_EQ(answer.text, "Hello world, the end");
  EXPECT_EQ(answer.tokens, script);
  EXPECT_EQ(answer.last.finish_reason, FinishReason::kLength);
  EXPECT_EQ(plan_->prompt, std::vector<int32_t>({0, Ids("Hello")[0]}));  // BOS, as tokenizer_config.json asks
  EXPECT_EQ(answer.last.usage.prompt_tokens, 2);
  EXPECT_EQ(answer.last.usage.completion_tokens, static_cast<int64_t>(script.size()));
  EXPECT_EQ(num_cancels_, 0);
}

TEST_F(GeneratorTest, WithoutSpecialTokensOrWithIdsThereIsNoBos) {
  GenerateCall call = Call("Hello");
  call.add_special_tokens = false;
  Run({}, call);
  EXPECT_EQ(plan_->prompt, Ids("Hello"));
  call.prompt = std::vector<int32_t>{5, 6, 7};
  Run({}, call);
  EXPECT_EQ(plan_->prompt, std::vector<int32_t>({5, 6, 7}));
}

TEST_F(GeneratorTest, AddedTokensInTextAreMatchedUnlessTurnedOff) {
  GenerateCall call = Call("<｜User｜>");
  call.add_special_tokens = false;
  Run({}, call);
  EXPECT_EQ(plan_->prompt.size(), 1u);
  call.match_special = false;
  Run({}, call);
  EXPECT_GT(plan_->prompt.size(), 1u);
}

TEST_F(GeneratorTest, CharactersAreNeverSplit) {
  // The bytes of "é" and of U+4E2D one token each; then a lone first byte at the end.
  const Answer answer =
      Run({.script = {Byte(0xC3), Byte(0xA9), Byte(0xE4), Byte(0xB8), Byte(0xAD), Byte(0xE4)}}, Call("x", 6));
  EXPECT_EQ(answer.text, "é中\uFFFD");
  for (const std::string& piece : answer.pieces) {
    EXPECT_TRUE(piece.empty() || piece == "é" || piece == "中" || piece == "\uFFFD") << piece;
  }
}

TEST_F(GeneratorTest, TheEndOfSequenceIsATokenButNoText) {
  std::vector<int32_t> script = Ids("Hello");
  script.push_back(FakeEngine::kEos);
  const Answer answer = Run({.script = script}, Call("x"));
  EXPECT_EQ(answer.text, "Hello");
  EXPECT_EQ(answer.tokens, script);
  EXPECT_EQ(answer.last.finish_reason, FinishReason::kStop);
  EXPECT_EQ(answer.last.usage.completion_tokens, 2);
  GenerateCall call = Call("x", 4);
  call.sampling.ignore_eos = true;
  EXPECT_EQ(Run({.script = script}, call).text, "HelloHello");
}

TEST_F(GeneratorTest, AStopTokenOfTheRequestIsNoTextEither) {
  GenerateCall call = Call("x");
  call.sampling.stop_token_ids = {Ids(" world")[0]};
  const Answer answer = Run({.script = Ids("Hello world")}, call);
  EXPECT_EQ(answer.text, "Hello");
  EXPECT_EQ(answer.last.finish_reason, FinishReason::kStop);
}

TEST_F(GeneratorTest, AStopStringAcrossTokensCancelsTheRequest) {
  for (const int tokens_per_delta : {1, 2, 5}) {
    GenerateCall call = Call("x", 200);
    call.stop = {"lo wor"};
    const std::vector<int32_t> script = {Ids("He")[0], Ids("ll")[0], Byte('o'), Byte(' '), Byte('w'),
                                         Byte('o'),    Byte('r'),    Byte('l'), Byte('d')};
    const Answer answer =
        Run({.script = script, .tokens_per_delta = tokens_per_delta, .step = absl::Milliseconds(2)}, call);
    EXPECT_EQ(answer.text, "Hel");
    EXPECT_EQ(answer.last.finish_reason, FinishReason::kStop);
    EXPECT_EQ(answer.last.stop_string, "lo wor");
    // The token that completes the stop string is the last one that counts.
    EXPECT_EQ(answer.last.usage.completion_tokens, 7);
    EXPECT_EQ(answer.tokens.size(), 7u);
    EXPECT_EQ(num_cancels_, 1);
  }
}

TEST_F(GeneratorTest, WhatEndsAnAnswerIsPartOfItWhenAsked) {
  GenerateCall call = Call("x", 200);
  call.stop = {"lo wor"};
  call.include_stop = true;
  EXPECT_EQ(Run({.script = Ids("Hello world"), .step = absl::Milliseconds(2)}, call).text, "Hello wor");
  call = Call("x");
  call.sampling.stop_token_ids = {Ids(" world")[0]};
  call.include_stop = true;
  EXPECT_EQ(Run({.script = Ids("Hello world")}, call).text, "Hello world");
}

TEST_F(GeneratorTest, SpecialTokensAreTextWhenAsked) {
  const int32_t bos = *tokenizer_->bos_id();
  std::vector<int32_t> script = Ids("Hello");
  script.push_back(bos);
  GenerateCall call = Call("x", static_cast<int>(script.size()));
  EXPECT_EQ(Run({.script = script}, call).text, "Hello");
  call.skip_special_tokens = false;
  EXPECT_EQ(Run({.script = script}, call).text, "Hello" + tokenizer_->TokenBytes(bos));
}

TEST_F(GeneratorTest, AStopStringThatDoesNotComeTakesNothing) {
  GenerateCall call = Call("x", 3);
  call.stop = {" world!"};
  EXPECT_EQ(Run({.script = Ids("Hello world")}, call).text, "Hello worldHello");
}

TEST_F(GeneratorTest, Logprobs) {
  GenerateCall call = Call("x", 2);
  call.sampling.logprobs = 2;
  const std::vector<int32_t> script = {Byte(0xC3), Byte(0xA9)};
  const Answer answer = Run({.script = script}, call);
  ASSERT_EQ(answer.scores.size(), 2u);
  EXPECT_EQ(answer.scores[0].bytes, "\xC3");
  EXPECT_EQ(answer.scores[1].bytes, "\xA9");
  EXPECT_EQ(answer.scores[0].logprob, FakeEngine::LogprobOf(script[0]));
  ASSERT_EQ(answer.scores[1].top.size(), 2u);
  const auto [token, logprob] = FakeEngine::Alternative(script[1], 1);
  EXPECT_EQ(answer.scores[1].top[1].first, tokenizer_->TokenBytes(token));
  EXPECT_EQ(answer.scores[1].top[1].second, logprob);
  EXPECT_EQ(answer.scores[1].text_offset, 0);  // both begin the same character
}

TEST_F(GeneratorTest, EchoGivesThePromptBackAsItWas) {
  GenerateCall call = Call("Hello <｜User｜>中", 2);
  call.echo = true;
  const Answer answer = Run({.script = Ids(" world")}, call);
  EXPECT_EQ(answer.text, "Hello <｜User｜>中 world world");
  EXPECT_TRUE(answer.scores.empty());
}

TEST_F(GeneratorTest, EchoWithLogprobsScoresThePrompt) {
  GenerateCall call = Call("Hello 中!", 1);
  call.echo = true;
  call.sampling.logprobs = 1;
  const Answer answer = Run({.script = Ids(" world")}, call);
  EXPECT_EQ(answer.text, "Hello 中! world");
  ASSERT_EQ(answer.scores.size(), plan_->prompt.size() + 1);
  EXPECT_EQ(answer.scores[0].token, 0);
  EXPECT_FALSE(answer.scores[0].logprob.has_value());
  EXPECT_EQ(answer.scores[0].text_offset, 0);
  for (size_t i = 1; i < plan_->prompt.size(); ++i) {
    EXPECT_EQ(answer.scores[i].token, plan_->prompt[i]);
    EXPECT_EQ(answer.scores[i].logprob, FakeEngine::LogprobOf(plan_->prompt[i]));
  }
  EXPECT_EQ(answer.scores[1].text_offset, 0);      // "Hello"; BOS has no text
  EXPECT_EQ(answer.scores.back().text_offset, 8);  // characters, not bytes
}

TEST_F(GeneratorTest, EchoAloneScoresWithoutGenerating) {
  GenerateCall call = Call("Hello world", 0);
  call.echo = true;
  call.sampling.logprobs = 0;
  const Answer answer = Run({}, call);
  EXPECT_EQ(answer.text, "Hello world");
  EXPECT_EQ(answer.scores.size(), 3u);
  EXPECT_TRUE(answer.tokens.empty());
  EXPECT_EQ(answer.last.finish_reason, FinishReason::kLength);
}

TEST_F(GeneratorTest, WithoutATokenizerThereAreOnlyIds) {
  GenerateCall call;
  call.prompt = std::vector<int32_t>{5, 6};
  call.sampling.max_tokens = 2;
  call.sampling.logprobs = 1;
  call.echo = true;
  const Answer answer = Run({}, call, nullptr);
  EXPECT_EQ(answer.text, "");
  EXPECT_EQ(answer.tokens, std::vector<int32_t>({10, 11}));
  ASSERT_EQ(answer.scores.size(), 4u);
  EXPECT_EQ(answer.scores[2].bytes, "token_id:10");
  FakeEngine engine;
  Generator generator(&engine, nullptr);
  const auto plan = generator.Prepare(Call("text"));
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorField(plan.status()), "prompt");
}

TEST_F(GeneratorTest, ChoicesReachTheEngine) {
  FakeEngine engine({.add_choice = true});
  Generator generator(&engine, tokenizer_.get());
  const auto plan = generator.Prepare(Call("x", 1));
  ASSERT_TRUE(plan.ok());
  Collector collectors[2];
  for (uint32_t i = 0; i < 2; ++i) ASSERT_TRUE(generator.Start(*plan, i, collectors[i].sink()).ok());
  EXPECT_EQ(collectors[0].Wait().tokens, std::vector<int32_t>({10}));
  EXPECT_EQ(collectors[1].Wait().tokens, std::vector<int32_t>({11}));
}

TEST_F(GeneratorTest, CancelEndsAGeneration) {
  FakeEngine engine({.step = absl::Milliseconds(1)});
  Generator generator(&engine, tokenizer_.get());
  Collector collector;
  auto generation = generator.Start(*generator.Prepare(Call("x", 200)), 0, collector.sink());
  ASSERT_TRUE(generation.ok());
  (*generation)->Cancel();
  EXPECT_EQ(collector.Wait().last.finish_reason, FinishReason::kCancelled);
}

TEST_F(GeneratorTest, AfterStopTheEngineMayGo) {
  auto engine = std::make_unique<FakeEngine>(FakeEngineOptions{.step = absl::Milliseconds(1)});
  Generator generator(engine.get(), tokenizer_.get());
  Collector collector;
  const auto plan = generator.Prepare(Call("x", 200));
  auto generation = generator.Start(*plan, 0, collector.sink());
  ASSERT_TRUE(generation.ok());
  generator.Stop();
  engine.reset();
  const Answer answer = collector.Wait();
  EXPECT_EQ(answer.last.finish_reason, FinishReason::kError);
  EXPECT_EQ(answer.last.error.code(), absl::StatusCode::kUnavailable);
  (*generation)->Cancel();  // harmless
  EXPECT_EQ(generator.Start(*plan, 0, collector.sink()).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(generator.health().code(), absl::StatusCode::kUnavailable);
}

TEST_F(GeneratorTest, MinTokensPutsStopStringsOff) {
  GenerateCall call = Call("x", 12);
  call.stop = {"o wor"};
  const std::vector<int32_t> script = Ids("Hello world ");
  ASSERT_EQ(script.size(), 3u);
  for (const auto& [min_tokens, text] :
       {std::make_pair(0, "Hell"), std::make_pair(1, "Hell"), std::make_pair(2, "Hello world Hell"),
        std::make_pair(4, "Hello world Hell"), std::make_pair(5, "Hello world Hello world Hell")}) {
    call.sampling.min_tokens = min_tokens;
    for (const int tokens_per_delta : {1, 7}) {
      const Answer answer = Run({.script = script, .tokens_per_delta = tokens_per_delta}, call);
      EXPECT_EQ(answer.text, text) << min_tokens;
      EXPECT_EQ(answer.last.stop_string, "o wor");
      EXPECT_EQ(request_.sampling.min_tokens, min_tokens);
    }
  }
}

TEST_F(GeneratorTest, PriorityClientAndDeadlineReachTheEngine) {
  GenerateCall call = Call("x", 1);
  Run({}, call);
  EXPECT_EQ(request_.priority, 0);
  EXPECT_EQ(request_.deadline, absl::InfiniteFuture());
  call.priority = -3;
  call.client = "somebody";
  call.deadline = absl::FromUnixSeconds(4'000'000'000);
  call.sampling.logit_bias = {{5, -100.f}, {6, 100.f}};
  Run({}, call);
  EXPECT_EQ(request_.priority, -3);
  EXPECT_EQ(request_.client, "somebody");
  EXPECT_EQ(request_.deadline, call.deadline);
  EXPECT_EQ(request_.sampling.logit_bias, call.sampling.logit_bias);
}

TEST_F(GeneratorTest, AnAnswerMayFillTheContext) {
  GenerateCall call = Call("Hello", 0);
  call.fill_context = true;
  const Answer answer = Run({.max_model_len = 32}, call);
  EXPECT_EQ(answer.tokens.size(), 30u);  // BOS, "Hello"
  EXPECT_EQ(request_.sampling.max_tokens, 30);
  call.prompt = std::vector<int32_t>(32, 5);
  FakeEngine engine({.max_model_len = 32});
  Generator generator(&engine, tokenizer_.get());
  EXPECT_EQ(ErrorCode(generator.Prepare(call).status()), "context_length_exceeded");
}

// A way to make a call wrong, and the field that is to be blamed.
struct Refusal {
  const char* field;
  std::function<void(GenerateCall*)> spoil;
};

void ExpectRefused(const Tokenizer* tokenizer, const std::vector<Refusal>& refusals) {
  FakeEngine engine({.max_model_len = 32});
  Generator generator(&engine, tokenizer);
  for (const Refusal& refusal : refusals) {
    GenerateCall call = Call("Hello");
    refusal.spoil(&call);
    const auto plan = generator.Prepare(call);
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument) << refusal.field;
    EXPECT_EQ(ErrorField(plan.status()), refusal.field) << plan.status();
  }
}

TEST_F(GeneratorTest, RefusesSamplingOutOfRange) {
  const std::vector<Refusal> refusals = {
      {"temperature", [](GenerateCall* call) { call->sampling.temperature = -0.1f; }},
      {"temperature", [](GenerateCall* call) { call->sampling.temperature = 2.1f; }},
      {"temperature", [](GenerateCall* call) { call->sampling.temperature = std::nanf(""); }},
      {"top_p", [](GenerateCall* call) { call->sampling.top_p = 0; }},
      {"top_p", [](GenerateCall* call) { call->sampling.top_p = 1.5f; }},
      {"top_k", [](GenerateCall* call) { call->sampling.top_k = -1; }},
      {"min_p", [](GenerateCall* call) { call->sampling.min_p = 1.5f; }},
      {"presence_penalty", [](GenerateCall* call) { call->sampling.presence_penalty = 2.5f; }},
      {"frequency_penalty", [](GenerateCall* call) { call->sampling.frequency_penalty = -2.5f; }},
      {"repetition_penalty", [](GenerateCall* call) { call->sampling.repetition_penalty = 0; }},
      {"max_tokens", [](GenerateCall* call) { call->sampling.max_tokens = 0; }},
      {"max_tokens", [](GenerateCall* call) { call->sampling.max_tokens = -1; }},
      {"min_tokens", [](GenerateCall* call) { call->sampling.min_tokens = -1; }},
      {"min_tokens", [](GenerateCall* call) { call->sampling.min_tokens = 17; }},
      {"min_tokens", [](GenerateCall* call) { call->fill_context = true, call->sampling.min_tokens = 31; }},
      {"logit_bias",
       [](GenerateCall* call) {
         call->sampling.logit_bias = {{320, 1.f}};
       }},
      {"logit_bias",
       [](GenerateCall* call) {
         call->sampling.logit_bias = {{-1, 1.f}};
       }},
      {"logit_bias",
       [](GenerateCall* call) {
         call->sampling.logit_bias = {{1, 100.5f}};
       }},
      {"logit_bias",
       [](GenerateCall* call) {
         call->sampling.logit_bias = {{1, std::nanf("")}};
       }},
      {"logit_bias",
       [](GenerateCall* call) {
         call->sampling.logit_bias = {{1, 1.f}, {1, 2.f}};
       }},
      {"logit_bias", [](GenerateCall* call) { call->sampling.logit_bias.resize(1025); }},
      {"logprobs", [](GenerateCall* call) { call->sampling.logprobs = 21; }},
      {"stop_token_ids", [](GenerateCall* call) { call->sampling.stop_token_ids = {320}; }},
  };
  ExpectRefused(tokenizer_.get(), refusals);
}

TEST_F(GeneratorTest, RefusesWrongPromptsAndStops) {
  const std::vector<Refusal> refusals = {
      {"stop", [](GenerateCall* call) { call->stop = {""}; }},
      {"stop", [](GenerateCall* call) { call->stop = std::vector<std::string>(17, "x"); }},
      {"stop", [](GenerateCall* call) { call->stop = {std::string(1025, 'x')}; }},
      {"prompt", [](GenerateCall* call) { call->prompt = std::vector<int32_t>{}; }},
      {"prompt", [](GenerateCall* call) { call->prompt = std::vector<int32_t>{-1}; }},
      {"prompt", [](GenerateCall* call) { call->prompt = std::vector<int32_t>{320}; }},
      {"prompt", [](GenerateCall* call) { call->prompt = std::vector<int32_t>(32, 5); }},
      {"prompt", [](GenerateCall* call) { call->prompt = std::string("\xFF"); }},
  };
  ExpectRefused(tokenizer_.get(), refusals);
  FakeEngine engine({.max_model_len = 32});
  Generator generator(&engine, tokenizer_.get());
  GenerateCall fits = Call("");
  fits.prompt = std::vector<int32_t>(31, 5);
  EXPECT_TRUE(generator.Prepare(fits).ok());
  fits.prompt = std::vector<int32_t>(32, 5);
  EXPECT_EQ(ErrorCode(generator.Prepare(fits).status()), "context_length_exceeded");
}

}  // namespace
}  // namespace cachalot
