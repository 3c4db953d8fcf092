// Prefill and decode rates of the engine on a checkpoint, with the share of the read bandwidth that decoding reaches.
//
//   python3 tests/golden/make_checkpoint.py --out build/bench-checkpoint --preset bench
//   build/release/tests/bench/engine_bench --model build/bench-checkpoint
//   build/release/tests/bench/engine_bench --model DIR --device cuda [--random-weights]
//
// What drafts bring, an engine for each number of them; as if 85 % were right too, where random weights agree less:
//
//   build/release/tests/bench/engine_bench --model DIR --batches 1,8,32 --speculative-tokens 0,1,2,auto [--acceptance
//   0.85]
//       [--prompts tests/engine/data/demo_prompts.txt] [--temperature 1]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/engine.h"
#include "engine/model/config.h"
#include "engine/model/safetensors.h"

namespace cachalot {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

// GB/s of a plain loop that sums 8-byte words of memory that no cache holds, best of three.
double ReadBandwidth(int num_threads) {
  const size_t words = size_t{1} << 28;  // 2 GiB
  std::vector<uint64_t> memory(words, 1);
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto begin = Clock::now();
    std::vector<std::thread> threads;
    std::vector<uint64_t> sums(num_threads);
    for (int t = 0; t < num_threads; ++t) {
      threads.emplace_back([&, t] {
        uint64_t sum = 0;
        for (size_t i = words * t / num_threads; i < words * (t + 1) / num_threads; ++i) sum += memory[i];
        sums[t] = sum;
      });
    }
    for (std::thread& thread : threads) thread.join();
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    if (sum != words) std::abort();
    best = std::max(best, words * 8 / Seconds(begin, Clock::now()) / 1e9);
  }
  return best;
}

// Bytes of weights that one token reads: everything but the experts it is not routed to, other tokens' embeddings and
// the MTP layer.
double ActiveBytes(const ModelConfig& config, const Checkpoint& checkpoint) {
  double bytes = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    int layer = 0;
    if (std::sscanf(name.c_str(), "model.layers.%d.", &layer) == 1 && layer >= config.num_hidden_layers) continue;
    if (absl::StartsWith(name, "model.embed_tokens")) continue;
    const double share =
        absl::StrContains(name, ".experts.") ? double(config.num_experts_per_tok) / config.n_routed_experts : 1.0;
    bytes += share * tensor.num_bytes;
  }
  return bytes;
}

// What is asked for beside the model.
constexpr int kAuto = -1;
struct Load {
  std::vector<int> batches;                   // decode these alone
  std::vector<int> num_drafts = {0};          // an engine each; kAuto: as many as pay
  std::vector<std::vector<int32_t>> prompts;  // in turn; random tokens where there are none
  double acceptance = -1;                     // what else it would be worth; negative: do not say
  float temperature = 0;
  int num_tokens = 257;  // that a request generates
};

struct Timing {
  double first_token = 0;  // seconds until every request had one
  double rest = 0;         // seconds from then until the first has ended: all of them run
  int num_tokens = 0;      // generated meanwhile
  uint64_t num_steps = 0, num_drafts = 0, num_accepted = 0;
  double host_us = 0;  // a step, then: what the step thread does beside waiting
};

Request MakeRequest(const Load& load, int number, int prompt_tokens, int max_tokens, std::mt19937* random) {
  Request request;
  if (load.prompts.empty()) {
    for (int i = 0; i < prompt_tokens; ++i) request.prompt.push_back(3 + (*random)() % 250);
  } else {
    request.prompt = load.prompts[number % load.prompts.size()];
  }
  request.sampling.temperature = load.temperature;
  request.sampling.seed = number;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  return request;
}

Timing Run(Engine& engine, const Load& load, int num_requests, int prompt_tokens, int max_tokens) {
  std::mutex mutex;
  std::condition_variable changed;
  int num_started = 0, num_ended = 0;
  std::mt19937 random(1);
  Timing timing;
  const auto begin = Clock::now();
  Clock::time_point started = begin, ended = begin;
  EngineStats before, after;
  for (int r = 0; r < num_requests; ++r) {
    bool has_started = false;
    auto id =
        engine.Submit(MakeRequest(load, r, prompt_tokens, max_tokens, &random), [&, has_started](Delta delta) mutable {
          std::lock_guard lock(mutex);
          const bool is_last = delta.finish_reason != FinishReason::kNone;
          if (num_started == num_requests && num_ended == 0) {
            timing.num_tokens += static_cast<int>(delta.tokens.size());
          }
          if (!has_started && ++num_started == num_requests) {
            started = Clock::now();
            before = engine.stats();
          }
          has_started = true;
          if (is_last && num_ended == 0) {
            ended = Clock::now();
            after = engine.stats();
          }
          if (is_last && ++num_ended == num_requests) changed.notify_one();
        });
    if (!id.ok()) {
      std::fprintf(stderr, "%s\n", id.status().ToString().c_str());
      std::exit(1);
    }
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return num_ended == num_requests; });
  timing.first_token = Seconds(begin, started);
  timing.rest = Seconds(started, ended);
  // NOTE: every rank counts those that it has work for.
  timing.num_steps = (after.steps - before.steps) / engine.rank_stats().size();
  timing.num_drafts = after.draft_tokens - before.draft_tokens;
  timing.num_accepted = after.accepted_draft_tokens - before.accepted_draft_tokens;
  timing.host_us = 1e6 * (after.host_seconds - before.host_seconds) / std::max<double>(after.steps - before.steps, 1);
  return timing;
}

// Tokens that a step brings a sequence, if each of its drafts is right with this probability as long as those before it
// are.
double TokensOfStep(double acceptance, int num_drafts) {
  double tokens = 0;
  for (int i = 0; i <= num_drafts; ++i) tokens += std::pow(acceptance, i);
  return tokens;
}

void Decode(Engine& engine, const Load& load, int num_drafts) {
  for (int batch : load.batches) {
    Run(engine, load, batch, 64, 9);
    const Timing t = Run(engine, load, batch, 64, load.num_tokens);
    const double steps = t.num_steps / t.rest;
    std::printf("decode B=%-3d k=%s: %9.1f tok/s, %8.1f steps/s, host %.1f us a step", batch,
                num_drafts == kAuto ? "auto" : absl::StrCat(num_drafts).c_str(), t.num_tokens / t.rest, steps,
                t.host_us);
    if (t.num_drafts > 0) {
      std::printf(", %.1f %% of %llu drafts right", 100.0 * t.num_accepted / t.num_drafts,
                  static_cast<unsigned long long>(t.num_drafts));
      if (load.acceptance >= 0 && num_drafts != kAuto) {
        std::printf("; FORCED: at these steps/s with %.0f %% right %.1f tok/s", 100 * load.acceptance,
                    steps * batch * TokensOfStep(load.acceptance, num_drafts));
      }
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

// Many requests at once.
void PrefillOnGpu(Engine& engine, const Load& load) {
  Run(engine, load, 64, 64, 8);
  const std::pair<int, int> prefills[] = {{1, 512}, {8, 512}, {64, 512}, {256, 512}, {1, 4096}, {16, 4096}};
  for (const auto& [batch, prompt] : prefills) {
    const Timing t = Run(engine, load, batch, prompt, 1);
    std::printf("prefill B=%-3d x %-4d tokens: %9.0f tok/s\n", batch, prompt, batch * prompt / t.first_token);
  }
}

// Beside the bandwidth that the weights could be read at.
void RunOnCpu(Engine& engine, const Load& load, const EngineOptions& options) {
  const int num_threads = options.num_threads > 0 ? options.num_threads : std::thread::hardware_concurrency();
  const double bandwidth = ReadBandwidth(num_threads);
  const auto config = ModelConfig::Load(options.model_dir);
  const auto checkpoint = Checkpoint::Open(options.model_dir);
  const double active = ActiveBytes(*config, **checkpoint);
  double total = 0;
  for (const auto& [name, tensor] : (*checkpoint)->tensors()) total += tensor.num_bytes;
  std::printf("checkpoint %.2f GB, of which a token reads %.3f GB; plain read loop %.1f GB/s on %d threads\n",
              total / 1e9, active / 1e9, bandwidth, num_threads);

  Run(engine, load, 1, 64, 8);  // pages of the mapping that were never read
  for (int prompt : {128, 512, 2048}) {
    const Timing t = Run(engine, load, 1, prompt, 1);
    std::printf("prefill %4d tokens: %8.1f tok/s\n", prompt, prompt / t.first_token);
  }
  for (int batch : {1, 4, 16}) {
    const Timing t = Run(engine, load, batch, 64, 65);
    const double rate = t.num_tokens / t.rest;
    std::printf("decode B=%-2d       : %8.1f tok/s", batch, rate);
    if (batch == 1)
      std::printf(", %.1f GB/s, %.0f %% of the read loop", rate * active / 1e9, 100 * rate * active / 1e9 / bandwidth);
    std::printf("\n");
  }
}

std::vector<int> Numbers(const char* list) {
  std::vector<int> numbers;
  for (absl::string_view number : absl::StrSplit(list, ',')) {
    numbers.push_back(kAuto);
    if (number != "auto" && !absl::SimpleAtoi(number, &numbers.back())) {
      std::fprintf(stderr, "engine_bench: %s is no list of numbers\n", list);
      std::exit(1);
    }
  }
  return numbers;
}

// A prompt a line, its token ids.
std::vector<std::vector<int32_t>> ReadPrompts(const char* path) {
  std::ifstream file(path);
  std::vector<std::vector<int32_t>> prompts;
  for (std::string line; std::getline(file, line);) {
    std::istringstream tokens(line);
    prompts.emplace_back(std::istream_iterator<int32_t>(tokens), std::istream_iterator<int32_t>());
  }
  if (!prompts.empty()) return prompts;
  std::fprintf(stderr, "engine_bench: no prompts in %s\n", path);
  std::exit(1);
}

int Main(int argc, char** argv) {
  EngineOptions options;
  Load load;
  options.device = "cpu";
  options.max_model_len = 4096;
  options.max_sequences = 16;
  for (int i = 1; i < argc; ++i) {
    const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
    const auto is = [&](const char* name) { return std::strcmp(argv[i], name) == 0; };
    if (is("--random-weights")) {
      options.random_weights = true;
    } else if (is("--model")) {
      options.model_dir = value();
    } else if (is("--device")) {
      options.device = value();
    } else if (is("--threads")) {
      options.num_threads = std::atoi(value());
    } else if (is("--ranks")) {
      options.num_ranks = std::atoi(value());
    } else if (is("--max-batch-tokens")) {
      options.max_batch_tokens = std::atoi(value());
    } else if (is("--speculative-tokens")) {
      load.num_drafts = Numbers(value());
    } else if (is("--batches")) {
      load.batches = Numbers(value());
    } else if (is("--prompts")) {
      load.prompts = ReadPrompts(value());
    } else if (is("--temperature")) {
      load.temperature = std::strtof(value(), nullptr);
    } else if (is("--tokens")) {
      load.num_tokens = std::atoi(value());
    } else if (is("--acceptance")) {
      load.acceptance = std::atof(value());
    }
  }
  if (options.model_dir.empty()) {
    std::fprintf(
        stderr,
        "usage: engine_bench --model DIR [--device cpu|cuda] [--random-weights] [--threads N] "
        "[--ranks N] [--max-batch-tokens N] [--speculative-tokens K|auto,...] [--batches B,...] [--prompts FILE] "
        "[--tokens N] [--temperature T] [--acceptance SHARE]\n");
    return 1;
  }
  const bool on_gpu = options.device == "cuda", is_decode_alone = !load.batches.empty();
  if (on_gpu) options.max_sequences = 256, options.max_model_len = 8192;
  if (on_gpu && !is_decode_alone) load.batches = {1, 8, 64, 128, 256};
  for (int batch : load.batches) options.max_sequences = std::max(options.max_sequences, batch);
  for (int num_drafts : load.num_drafts) {
    options.adapts_drafts = num_drafts == kAuto;
    options.speculative_tokens = options.adapts_drafts ? kMostAdaptiveTokens : num_drafts;
    const auto begin = Clock::now();
    auto engine = Engine::Create(options);
    if (!engine.ok()) {
      std::fprintf(stderr, "%s\n", engine.status().ToString().c_str());
      return 1;
    }
    std::printf("%s: ready after %.2f s\n", (*engine)->model().backend.c_str(), Seconds(begin, Clock::now()));
    if (on_gpu && !is_decode_alone) PrefillOnGpu(**engine, load);
    if (!on_gpu && !is_decode_alone) RunOnCpu(**engine, load, options);
    Decode(**engine, load, num_drafts);
  }
  return 0;
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) { return cachalot::Main(argc, argv); }
