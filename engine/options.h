// EngineOptions: everything the engine is told at start. Validated by Engine::Create, immutable afterwards.
#ifndef CACHALOT_ENGINE_OPTIONS_H_
#define CACHALOT_ENGINE_OPTIONS_H_

#include <cstdint>
#include <string>

namespace cachalot {

// What the options may be at most: far beyond what is of use, below what overflows.
inline constexpr int kMaxModelLen = 1 << 24, kMaxSequences = 1 << 16, kMaxBatchTokens = 1 << 20;
inline constexpr int kMaxWaiting = 1 << 24, kMaxThreads = 1 << 12, kMaxSpeculativeTokens = 8;
inline constexpr int kMaxRanks = 64;  // of one process
inline constexpr int kMaxRedundantExperts = 1 << 16;
inline constexpr int kMaxNodes = 1024, kMaxJoinTimeout = 86400;
// The most of them where how many adapts, unless somebody says otherwise.
inline constexpr int kMostAdaptiveTokens = 2;

struct EngineOptions {
  std::string model_dir;
  std::string device = "auto";  // auto | cpu | cuda
  int num_threads = 0;          // CPU workers of all ranks; 0: one per core
  // Devices that each hold the model and a share of its routed experts. What follows of sequences, rows, the cache is
  // of each.
  int num_ranks = 1;
  // Copies of experts, over all ranks, beside one of each: they share its tokens, and every rank has as many slots.
  int num_redundant_experts = 0;
  // Processes that have as many ranks each and share the experts: how many, which this is, and the HOST:PORT where the
  // first one listens for the others. CPU only.
  int num_nodes = 1, node_rank = 0;
  std::string leader;
  std::string cluster_secret_file;  // what all must have the same of; empty: anybody may join
  int join_timeout_seconds = 300;   // that they wait for each other at start
  int max_model_len = 0;            // tokens of one sequence; 0: the model's, as far as the cache allows
  int max_sequences = 64;           // running at once
  int max_batch_tokens = 0;         // rows of one step: bounds a prefill chunk; 0: 512 on the CPU, 4096 on the GPU
  int max_waiting = 4096;           // queued requests; one more is refused
  // Tokens that the checkpoint's MTP layer proposes after each step, to be verified in the next; 0: none. They change
  // no token, only how many a step brings.
  int speculative_tokens = 0;
  // At most so many: in each step as many as bring the most tokens a second, by measurement.
  bool adapts_drafts = false;
  // Full blocks of a sequence are kept, as long as there is room, for others that begin with the same tokens.
  bool prefix_cache = true;
  // Of the KV cache: bytes; or a share of the device's memory that the model leaves free, 0 to 1. Neither: what
  // max_sequences * max_model_len needs, at most a quarter of the free memory on the CPU, 90% on the GPU.
  int64_t kv_cache_bytes = 0;
  double kv_cache_share = 0;
  std::string kv_cache_dtype;  // f32 | bf16 | fp8; empty: f32 on the CPU, bf16 on the GPU
  // auto | f32 | fp8 | fp8-f32. On the CPU f32 by default; fp8 quantises 1x128, rounds everything else to bf16 where
  // the GPU does and sums as its tensor cores do, slowly; fp8-f32 quantises alone.
  std::string activation = "auto";
  bool wants_fp8() const { return activation == "fp8" || activation == "fp8-f32"; }
  bool is_exact = false;        // BackendOptions
  bool random_weights = false;  // the model of config.json alone, its weights made up; GPU only
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_OPTIONS_H_
