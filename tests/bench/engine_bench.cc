// Prefill and decode rates of the engine on a checkpoint, with the share of the read bandwidth that decoding reaches.
//
//   python3 tests/golden/make_checkpoint.py --out build/bench-checkpoint --preset bench
//   build/release/tests/bench/engine_bench --model build/bench-checkpoint
//   build/release/tests/bench/engine_bench --model DIR --device cuda [--random-weights]
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
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

struct Timing {
  double first_token = 0;  // seconds until every request had one
  double rest = 0;         // seconds from then to the end
  int num_tokens = 0;      // generated after the first ones
  double host_us = 0;      // a step, then: what the step thread does beside waiting
};

Timing Run(Engine& engine, int num_requests, int prompt_tokens, int max_tokens) {
  std::mutex mutex;
  std::condition_variable changed;
  int num_started = 0, num_ended = 0;
  std::mt19937 random(1);
  Timing timing;
  const auto begin = Clock::now();
  Clock::time_point started = begin;
  EngineStats before;
  for (int r = 0; r < num_requests; ++r) {
    Request request;
    for (int i = 0; i < prompt_tokens; ++i) request.prompt.push_back(3 + random() % 250);
    request.sampling.temperature = 0;
    request.sampling.max_tokens = max_tokens;
    request.sampling.ignore_eos = true;
    bool has_started = false;
    auto id = engine.Submit(std::move(request), [&, has_started](Delta delta) mutable {
      std::lock_guard lock(mutex);
      if (num_started == num_requests) timing.num_tokens += static_cast<int>(delta.tokens.size());
      if (!has_started && ++num_started == num_requests) {
        started = Clock::now();
        before = engine.stats();
      }
      has_started = true;
      if (delta.finish_reason != FinishReason::kNone && ++num_ended == num_requests) changed.notify_one();
    });
    if (!id.ok()) {
      std::fprintf(stderr, "%s\n", id.status().ToString().c_str());
      std::exit(1);
    }
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return num_ended == num_requests; });
  timing.first_token = Seconds(begin, started);
  timing.rest = Seconds(started, Clock::now());
  const EngineStats after = engine.stats();
  timing.host_us = 1e6 * (after.host_seconds - before.host_seconds) / std::max<double>(after.steps - before.steps, 1);
  return timing;
}

// Many requests at once, and what the host does in a step beside waiting for the GPU.
void RunOnGpu(Engine& engine) {
  Run(engine, 64, 64, 8);
  const std::pair<int, int> prefills[] = {{1, 512}, {8, 512}, {64, 512}, {256, 512}, {1, 4096}, {16, 4096}};
  for (const auto& [batch, prompt] : prefills) {
    const Timing t = Run(engine, batch, prompt, 1);
    std::printf("prefill B=%-3d x %-4d tokens: %9.0f tok/s\n", batch, prompt, batch * prompt / t.first_token);
  }
  for (int batch : {1, 8, 64, 128, 256}) {
    const Timing t = Run(engine, batch, 64, 257);
    std::printf("decode B=%-3d             : %9.0f tok/s, host %.1f us a step\n", batch, t.num_tokens / t.rest,
                t.host_us);
  }
}

int Main(int argc, char** argv) {
  EngineOptions options;
  options.device = "cpu";
  options.max_model_len = 4096;
  options.max_sequences = 16;
  for (int i = 1; i < argc; ++i) {
    const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
    if (std::strcmp(argv[i], "--random-weights") == 0)
      options.random_weights = true;
    else if (std::strcmp(argv[i], "--model") == 0)
      options.model_dir = value();
    else if (std::strcmp(argv[i], "--device") == 0)
      options.device = value();
    else if (std::strcmp(argv[i], "--threads") == 0)
      options.num_threads = std::atoi(value());
    else if (std::strcmp(argv[i], "--max-batch-tokens") == 0)
      options.max_batch_tokens = std::atoi(value());
    else if (std::strcmp(argv[i], "--speculative-tokens") == 0)
      options.speculative_tokens = std::atoi(value());
  }
  if (options.model_dir.empty()) {
    std::fprintf(stderr,
                 "usage: engine_bench --model DIR [--device cpu|cuda] [--random-weights] [--threads N] "
                 "[--max-batch-tokens N] [--speculative-tokens K]\n");
    return 1;
  }
  const bool on_gpu = options.device == "cuda";
  if (on_gpu) options.max_sequences = 256, options.max_model_len = 8192;
  const auto begin = Clock::now();
  auto engine = Engine::Create(options);
  if (!engine.ok()) {
    std::fprintf(stderr, "%s\n", engine.status().ToString().c_str());
    return 1;
  }
  std::printf("%s: ready after %.2f s\n", (*engine)->model().backend.c_str(), Seconds(begin, Clock::now()));

  if (on_gpu) {
    RunOnGpu(**engine);
    return 0;
  }
  const int num_threads = options.num_threads > 0 ? options.num_threads : std::thread::hardware_concurrency();
  const double bandwidth = ReadBandwidth(num_threads);
  const auto config = ModelConfig::Load(options.model_dir);
  const auto checkpoint = Checkpoint::Open(options.model_dir);
  const double active = ActiveBytes(*config, **checkpoint);
  double total = 0;
  for (const auto& [name, tensor] : (*checkpoint)->tensors()) total += tensor.num_bytes;
  std::printf("checkpoint %.2f GB, of which a token reads %.3f GB; plain read loop %.1f GB/s on %d threads\n",
              total / 1e9, active / 1e9, bandwidth, num_threads);

  Run(**engine, 1, 64, 8);  // pages of the mapping that were never read
  for (int prompt : {128, 512, 2048}) {
    const Timing t = Run(**engine, 1, prompt, 1);
    std::printf("prefill %4d tokens: %8.1f tok/s\n", prompt, prompt / t.first_token);
  }
  for (int batch : {1, 4, 16}) {
    const Timing t = Run(**engine, batch, 64, 65);
    const double rate = t.num_tokens / t.rest;
    std::printf("decode B=%-2d       : %8.1f tok/s", batch, rate);
    if (batch == 1)
      std::printf(", %.1f GB/s, %.0f %% of the read loop", rate * active / 1e9, 100 * rate * active / 1e9 / bandwidth);
    std::printf("\n");
  }
  return 0;
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) { return cachalot::Main(argc, argv); }
