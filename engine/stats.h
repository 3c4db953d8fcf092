// EngineStats: counters and gauges of one rank, or of all of an engine, read by any thread.
#ifndef CACHALOT_ENGINE_STATS_H_
#define CACHALOT_ENGINE_STATS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/options.h"
#include "engine/request.h"

namespace cachalot {

// How many rows steps had, as a Prometheus histogram wants it.
struct StepRowsHistogram {
  static constexpr std::array<int, 13> kBounds = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
  std::array<uint64_t, kBounds.size()> at_most = {};  // steps of at most kBounds[i] rows
  uint64_t sum = 0, count = 0;

  void Add(int num_rows) {
    for (size_t i = 0; i < kBounds.size(); ++i) at_most[i] += num_rows <= kBounds[i] ? 1 : 0;
    sum += static_cast<uint64_t>(num_rows);
    ++count;
  }
  void Add(const StepRowsHistogram& other) {
    for (size_t i = 0; i < kBounds.size(); ++i) at_most[i] += other.at_most[i];
    sum += other.sum;
    count += other.count;
  }
};

// As of the last step; when the engine idles, as of now.
struct EngineStats {
  // Gauges.
  int running = 0, waiting = 0;           // sequences
  int blocks_total = 0, blocks_used = 0;  // KV blocks of 64 tokens
  int blocks_idle = 0;                    // not in use, but kept for the prefix cache
  // Of `waiting`: all wait for what the one whose turn it is lacks. A slot: max_sequences run, or as many as a step has
  // rows; blocks for the prompt.
  int waiting_for_slots = 0, waiting_for_blocks = 0;

  // Counters.
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;         // prefilled or found in the prefix cache, each once
  uint64_t cached_prompt_tokens = 0;  // of these, found
  // Prompt tokens that were looked for there.
  uint64_t prefix_cache_queries = 0;
  uint64_t prefix_cache_evictions = 0;  // blocks
  uint64_t recomputed_tokens = 0;       // fed again after a preemption, prompt and generated alike
  uint64_t generated_tokens = 0;
  uint64_t preemptions = 0;
  // Tokens that an MTP layer proposed and that were verified; those of them that the model took; and by their place
  // among a sequence's drafts of a step, the first is [0].
  uint64_t draft_tokens = 0, accepted_draft_tokens = 0;
  std::array<uint64_t, kMaxSpeculativeTokens> accepted_by_place = {};
  uint64_t drafts = 0;  // verified: one for each step of a sequence that had draft tokens, however many
  // What the step thread worked while steps were under way, waiting for the device not counted.
  double host_seconds = 0;
  StepRowsHistogram step_rows;

  void Add(const EngineStats& other);  // of another rank: all are sums
};

// What a front end must know of the loaded model.
struct ModelInfo {
  std::string model_type;
  std::string backend;     // "cpu (2 threads, AVX3)"
  int vocab_size = 0;      // rows of the head; prompt ids must be below
  int max_model_len = 0;   // prompt + generated tokens of one request
  int max_waiting = 4096;  // requests that wait at once
  int first_rank = 0;      // of this process's, among those of all
  int kv_cache_tokens = 0;
  int64_t kv_bytes_per_token = 0;  // over all layers
  int bos_token_id = -1;
  std::vector<int> eos_token_ids;  // end answers: the checkpoint's and its tokenizer's, rising
  SamplingParams sampling;         // of requests that say nothing, as the checkpoint's generation_config.json has it
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_STATS_H_
