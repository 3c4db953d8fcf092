// The prefix cache: time to the first token of a prompt that is in it, what a block's hash and lookup cost, and what
// the host does in a step of many sequences, by itself.
//
//   build/release/tests/bench/prefix_cache_bench --model deploy/demo
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/schedule/scheduler.h"

namespace cachalot {
namespace {

using Clock = std::chrono::steady_clock;

double Micros(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::micro>(end - begin).count();
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

std::vector<int32_t> RandomTokens(int count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(3 + random() % 250);
  return tokens;
}

// Microseconds until the first token.
double FirstToken(Engine& engine, std::vector<int32_t> prompt, int* num_cached) {
  std::mutex mutex;
  std::condition_variable changed;
  bool has_ended = false;
  Clock::time_point first;
  Request request;
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = 1;
  request.sampling.ignore_eos = true;
  const auto begin = Clock::now();
  const auto id = engine.Submit(std::move(request), [&](const Delta& delta) {
    std::lock_guard lock(mutex);
    if (!delta.tokens.empty()) first = Clock::now();
    *num_cached = delta.num_cached_tokens;
    has_ended = delta.finish_reason != FinishReason::kNone;
    if (has_ended) changed.notify_one();
  });
  if (!id.ok()) {
    std::fprintf(stderr, "%s\n", id.status().ToString().c_str());
    std::exit(1);
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return has_ended; });
  return Micros(begin, first);
}

// A prefix of `num_tokens` and an ending of 32 that is new each time.
void MeasureFirstToken(Engine& engine, int num_tokens) {
  std::vector<double> cold, warm;
  int num_cached = 0;
  for (uint32_t repeat = 0; repeat < 3; ++repeat) {
    std::vector<int32_t> prompt = RandomTokens(num_tokens, 100 + repeat);
    prompt.resize(num_tokens + 32, static_cast<int32_t>(10 + repeat));
    cold.push_back(FirstToken(engine, prompt, &num_cached));
    for (int again = 0; again < 5; ++again) {
      std::fill(prompt.begin() + num_tokens, prompt.end(), 50 + again);
      warm.push_back(FirstToken(engine, prompt, &num_cached));
    }
  }
  std::printf("prefix of %d tokens: first token after %.1f ms, cached (%d tokens) after %.2f ms: %.0f x\n", num_tokens,
              Median(cold) / 1e3, num_cached, Median(warm) / 1e3, Median(cold) / Median(warm));
}

// A chain of `num_blocks` in a pool of 100,000 published ones.
void MeasureLookup(int num_blocks) {
  constexpr int kPoolBlocks = 100000;
  BlockPool pool(kPoolBlocks, BlockPool::PrefixCache::kOn, 1);
  std::vector<std::vector<int32_t>> chains;
  for (int i = 0; i < kPoolBlocks / num_blocks; ++i) {
    chains.push_back(RandomTokens(num_blocks * kBlockTokens, static_cast<uint32_t>(i)));
    std::vector<PrefixKey> keys;
    std::vector<int32_t> blocks;
    pool.ExtendKeys("", chains.back(), &keys);
    pool.Allocate(num_blocks, &blocks);
    BlockPool::Serial before = BlockPool::kRoot;
    for (int b = 0; b < num_blocks; ++b) before = pool.Publish(keys, chains.back(), b, blocks[b], before);
    pool.Release(blocks);
  }
  double hash = 0, find = 0, share = 0;
  for (const std::vector<int32_t>& tokens : chains) {
    std::vector<PrefixKey> keys;
    const auto begin = Clock::now();
    pool.ExtendKeys("", tokens, &keys);
    const auto hashed = Clock::now();
    const std::vector<int32_t> found = pool.Find(keys, tokens, 0, num_blocks);
    const auto looked_up = Clock::now();
    if (static_cast<int>(found.size()) != num_blocks) std::abort();
    pool.Share(found);
    pool.Release(found);
    hash += Micros(begin, hashed);
    find += Micros(hashed, looked_up);
    share += Micros(looked_up, Clock::now());
  }
  const double n = 1e-3 * static_cast<double>(chains.size()) * num_blocks;
  std::printf("chains of %d blocks, %d published: hash %.0f ns, lookup %.0f ns, share and release %.0f ns a block\n",
              num_blocks, kPoolBlocks, hash / n, find / n, share / n);
}

// As between two steps of a device: others have used the caches meanwhile.
void ForgetCaches() {
  static std::vector<uint8_t> memory(size_t{64} << 20);
  for (size_t i = 0; i < memory.size(); i += 64) ++memory[i];
}

std::unique_ptr<Sequence> NewSequence(RequestId id, std::vector<int32_t> prompt, int max_tokens) {
  auto sequence = std::make_unique<Sequence>();
  sequence->id = id;
  sequence->tokens = std::move(prompt);
  sequence->num_prompt_tokens = static_cast<int>(sequence->tokens.size());
  sequence->sampling.max_tokens = max_tokens;
  sequence->submitted = absl::Now();
  return sequence;
}

StepResult MakeUp(const StepPlan& plan) {
  StepResult result;
  result.step = plan.step;
  result.num_accepted.assign(plan.sequences.size(), 0);
  for (const LogitsRow& row : plan.logits_rows) {
    result.tokens.push_back(3 + static_cast<int32_t>(plan.step * 31 + row.row) % 250);
    int32_t& num_accepted = result.num_accepted[row.sequence];
    num_accepted = std::min(num_accepted + 1, 2);  // one draft is right, where there are any
  }
  result.logprobs.resize(result.tokens.size());
  return result;
}

struct Steps {
  int num_sequences = 256;
  BlockPool::PrefixCache prefix_cache = BlockPool::PrefixCache::kOn;
  bool are_cold = false;
  int num_drafts = 0;
  int num_waiting_blocks = 0;  // of a prompt at the head of the queue, half of them another's that runs: no room
};

// Plan and Commit of steps in which sequences decode, two in flight, with a result that is made up.
void MeasureSteps(const Steps& steps) {
  constexpr int kTokens = 1024;
  const int num_sequences = steps.num_sequences;
  const bool has_waiting = steps.num_waiting_blocks > 0;
  const int longest = std::max(64, steps.num_waiting_blocks) + 1;
  BlockPool pool(has_waiting ? steps.num_waiting_blocks + 20 : num_sequences * 64, steps.prefix_cache);
  Scheduler scheduler({4096, num_sequences + 2, longest * kBlockTokens, {1}, steps.num_drafts}, &pool);
  for (int i = 0; i < num_sequences; ++i) {
    std::vector<int32_t> prompt = RandomTokens(256, 1);
    prompt.push_back(3 + i);
    if (has_waiting && i == 0) prompt = RandomTokens(steps.num_waiting_blocks / 2 * kBlockTokens, 2);
    scheduler.Add(NewSequence(i + 1, std::move(prompt), kTokens));
  }
  std::vector<int32_t> prompt = RandomTokens(steps.num_waiting_blocks / 2 * kBlockTokens, 2);
  prompt.resize(steps.num_waiting_blocks * kBlockTokens, 7);
  std::vector<StepResult> in_flight;
  std::vector<double> times;
  Scheduler::Deltas deltas;
  while (true) {
    if (steps.are_cold) ForgetCaches();
    const auto begin = Clock::now();
    const StepPlan plan = scheduler.Plan(absl::Now());
    const double planned = Micros(begin, Clock::now());
    if (!plan.empty()) in_flight.push_back(MakeUp(plan));
    if (in_flight.empty()) break;
    if (in_flight.size() < kMaxStepsInFlight && !plan.empty()) continue;
    deltas.clear();
    if (steps.are_cold) ForgetCaches();
    const auto middle = Clock::now();
    scheduler.Commit(in_flight.front(), absl::Now(), &deltas);
    const double committed = Micros(middle, Clock::now());
    in_flight.erase(in_flight.begin());
    if (static_cast<int>(plan.logits_rows.size()) < num_sequences * (1 + steps.num_drafts)) continue;
    if (times.empty() && has_waiting) scheduler.Add(NewSequence(num_sequences + 1, prompt, 1));
    times.push_back(planned + committed);
    if (has_waiting && scheduler.stats().waiting == 0 && times.size() > 1) std::abort();
  }
  std::sort(times.begin(), times.end());
  double sum = 0;
  for (double time : times) sum += time;
  std::printf("plan and commit, %d sequences, %d drafts, prefix cache %s%s", num_sequences, steps.num_drafts,
              steps.prefix_cache == BlockPool::PrefixCache::kOn ? "on" : "off",
              steps.are_cold ? ", the CPU's cold" : "");
  if (has_waiting) std::printf(", a prompt of %d blocks waiting", steps.num_waiting_blocks);
  std::printf(": mean %.1f us, median %.1f, 99 %% %.1f of %zu steps\n", sum / times.size(), Median(times),
              times[times.size() * 99 / 100], times.size());
}

// A queue of 512 prompts, each of 16 blocks of one of several documents and one block of its own, in random order,
// where the cache has room for six documents beside what 16 sequences need for themselves.
void MeasureQueue(int num_documents) {
  constexpr int kNumRequests = 512, kSlots = 16, kDocumentBlocks = 16;
  BlockPool pool(kDocumentBlocks * 6 + kSlots * 3);
  Scheduler scheduler({512, kSlots, 2048, {1}}, &pool);
  std::mt19937 random(1);
  for (int i = 0; i < kNumRequests; ++i) {
    std::vector<int32_t> prompt = RandomTokens(kDocumentBlocks * kBlockTokens, 1000 + random() % num_documents);
    prompt.resize(prompt.size() + kBlockTokens, 3 + i);
    scheduler.Add(NewSequence(i + 1, std::move(prompt), 32));
  }
  std::vector<StepResult> in_flight;
  double micros = 0;
  while (true) {
    auto begin = Clock::now();
    const StepPlan plan = scheduler.Plan(absl::Now());
    micros += Micros(begin, Clock::now());
    if (!plan.empty()) in_flight.push_back(MakeUp(plan));
    if (in_flight.empty()) break;
    if (in_flight.size() < kMaxStepsInFlight && !plan.empty()) continue;
    Scheduler::Deltas deltas;
    begin = Clock::now();
    scheduler.Commit(in_flight.front(), absl::Now(), &deltas);
    micros += Micros(begin, Clock::now());
    in_flight.erase(in_flight.begin());
  }
  const EngineStats stats = scheduler.stats();
  std::printf("a queue of prompts of %d documents: %.1f %% of their tokens cached, %.1f us a step of %llu\n",
              num_documents, 100.0 * stats.cached_prompt_tokens / stats.prompt_tokens, micros / stats.steps,
              static_cast<unsigned long long>(stats.steps));
}

int Main(int argc, char** argv) {
  EngineOptions options;
  options.device = "cpu";
  options.max_sequences = 4;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--model") == 0) options.model_dir = argv[i + 1];
    if (std::strcmp(argv[i], "--device") == 0) options.device = argv[i + 1];
  }
  if (options.model_dir.empty()) {
    std::fprintf(stderr, "usage: prefix_cache_bench --model DIR [--device cpu|cuda]\n");
    return 1;
  }
  for (int num_blocks : {16, 128, 2000}) MeasureLookup(num_blocks);
  for (int num_sequences : {64, 256}) {
    for (const auto cache : {BlockPool::PrefixCache::kOff, BlockPool::PrefixCache::kOn}) {
      MeasureSteps({num_sequences, cache});
    }
  }
  MeasureSteps({.num_sequences = 32});
  MeasureSteps({.num_sequences = 32, .num_waiting_blocks = 2000});
  for (int num_sequences : {64, 256}) MeasureSteps({.num_sequences = num_sequences, .are_cold = true});
  MeasureSteps({.are_cold = true, .num_drafts = 2});
  for (int num_documents : {4, 8, 16, 32, 64}) MeasureQueue(num_documents);
  const auto engine = Engine::Create(options);
  if (!engine.ok()) {
    std::fprintf(stderr, "%s\n", engine.status().ToString().c_str());
    return 1;
  }
  std::printf("%s, context of %d tokens\n", (*engine)->model().backend.c_str(), (*engine)->model().max_model_len);
  for (int num_tokens : {1024, 8192}) {
    if (num_tokens + 64 < (*engine)->model().max_model_len) MeasureFirstToken(**engine, num_tokens);
  }
  return 0;
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) { return cachalot::Main(argc, argv); }
