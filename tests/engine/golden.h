// Golden cases for tests: a small checkpoint with prompts and float64 references (tests/golden/README.md).
#ifndef CACHALOT_TESTS_ENGINE_GOLDEN_H_
#define CACHALOT_TESTS_ENGINE_GOLDEN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace cachalot {

struct GoldenPrompt {
  std::vector<int32_t> tokens;        // [T]
  std::vector<double> logprobs;       // [T-1] of tokens 1..T-1
  std::vector<int32_t> top1;          // [T] greedy choice after each position
  std::vector<float> top1_margin;     // [T] over the second best, in logits
  std::vector<float> router_margin;   // [T] the closest expert choice at the position
  std::vector<double> last_logprobs;  // [W] after the last position
  // Of the MTP layer, where the case has one: of tokens 2..T-1, and after the last position but one.
  std::vector<double> mtp_logprobs, mtp_last_logprobs;  // [T-2], [W]
};

struct Golden {
  std::string model_dir;
  std::vector<GoldenPrompt> prompts;
  std::vector<int32_t> greedy_prompt, greedy_tokens;  // empty where the case has none
  std::vector<float> greedy_margin;
};

// Aborts the test program when the case cannot be read. `prefix` "aq." reads the activation-quantised reference.
Golden LoadGolden(const std::string& name, const std::string& prefix = "");

// The demo checkpoint, and the first 50 of its eval/chats.json as tokens.
std::string DemoDir();
std::vector<std::vector<int32_t>> DemoPrompts();
std::vector<Request> DemoRequests(float temperature, int max_tokens);  // seeded, with log-probabilities

// What a request brought, once it has ended.
struct Answer {
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs, prompt_logprobs;
  FinishReason finish_reason = FinishReason::kNone;
  absl::Status error;
  RequestTimes times;
  int num_cached_tokens = 0;
};

void AppendDelta(Delta delta, Answer* answer);

// Submits all and waits for all.
std::vector<Answer> RunAll(Engine& engine, const std::vector<Request>& requests);

// Every token id and every log-probability's bits, in order.
std::vector<uint32_t> Bits(const Answer& answer);

// Made or the test program aborts.
std::unique_ptr<Engine> MakeEngine(const EngineOptions& options);

Request ScoreRequest(const std::vector<int32_t>& prompt, int top = 1);  // prompt log-probabilities and one greedy token

}  // namespace cachalot

#endif  // CACHALOT_TESTS_ENGINE_GOLDEN_H_
