// EngineStats: counters and gauges of one rank, read by any thread.
#ifndef CACHALOT_ENGINE_STATS_H_
#define CACHALOT_ENGINE_STATS_H_

#include <cstdint>
#include <string>

namespace cachalot {

struct EngineStats {
  int running = 0, waiting = 0;           // sequences
  int blocks_total = 0, blocks_used = 0;  // KV blocks of 64 tokens
  uint64_t steps = 0, prompt_tokens = 0, generated_tokens = 0, preemptions = 0;
};

// What a front end must know of the loaded model.
struct ModelInfo {
  std::string model_type;
  std::string backend;    // "cpu (2 threads, AVX3)"
  int vocab_size = 0;     // rows of the head; prompt ids must be below
  int max_model_len = 0;  // prompt + generated tokens of one request
  int kv_cache_tokens = 0;
  int64_t kv_bytes_per_token = 0;  // over all layers
  int bos_token_id = -1;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_STATS_H_
