// Sequence: one request as the scheduler sees it.
#ifndef CACHALOT_ENGINE_SCHEDULE_SEQUENCE_H_
#define CACHALOT_ENGINE_SCHEDULE_SEQUENCE_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "engine/request.h"
#include "engine/schedule/block_pool.h"
#include "kernels/ops_types.h"

namespace cachalot {

struct ClientShare;

struct alignas(64) Sequence {
  // ---- What every step reads or writes comes first: see Prefetch.
  RequestId id = 0;
  std::vector<int32_t> tokens;  // prompt, then what has been generated and committed
  int num_prompt_tokens = 0;

  // Owned while running.
  int slot = -1;
  std::vector<int32_t> blocks;  // the first of them perhaps shared with others

  // What launched steps have done, whether or not they have been committed.
  int num_fed = 0;            // tokens whose latents are, or will be, in the cache, if every draft under way is right
  int num_sampling = 0;       // launched steps that sample and are not committed: each brings at least one token
  int num_in_flight = 0;      // launched steps that name this sequence
  int num_prompt_scored = 0;  // prompt log-probabilities asked of launched steps
  int num_counted = 0;        // tokens that launched steps have fed or otherwise counted in the slot
  int num_published = 0;      // blocks, from the first on, that were found in the prefix cache or offered to it
  BlockPool::Serial published = BlockPool::kRoot;  // names what they hold; kNothing: no more can be published
  int num_blocks_told = 0;                         // blocks whose ids launched steps have brought to the slot
  int num_drafts = 0;                              // that the slot holds once launched steps have run
  bool is_in_slot = false;                         // a launched step has brought the slot's parameters
  bool is_decoding = false;                        // a launched step samples: the slot holds the next row's token
  bool is_ended = false;      // finished, cancelled or preempted: holds slot and blocks until num_in_flight is 0
  bool is_preempted = false;  // goes back to the queue then

  int num_cached = 0;  // prompt tokens that were found in the prefix cache before they were ever fed
  absl::Time first_step = absl::InfiniteFuture();   // when a step first named it
  absl::Time first_token = absl::InfiniteFuture();  // when its first token was committed
  absl::InlinedVector<int32_t, 4> end_tokens;       // EndTokens; made when it is queued
  SamplingParams sampling;

  // ---- The rest.
  std::string client, cache_salt;
  int priority = 0;
  absl::Time submitted = absl::InfinitePast();
  absl::Time deadline = absl::InfiniteFuture();

  // Made when it is queued.
  absl::Time standing = absl::InfinitePast();  // where it stands in the queue: Admission
  ClientShare* share = nullptr;                // of its client; none while it is on its way out
  std::vector<TokenBias> token_biases;         // banned tokens, then biased ones
  int num_banned = 0;
  std::vector<PrefixKey> keys;  // of the full blocks of `tokens`, as far as they were needed

  // While it waits: blocks that it lacked when it was looked up in the prefix cache, and BlockPool::num_gains then.
  int num_missing = 0;  // 0: not looked up yet
  uint64_t num_gains = 0;

  // Its life so far, preemptions included.
  int num_ever_fed = 0;  // or found in the prefix cache
  int num_preemptions = 0;

  int num_generated() const { return static_cast<int>(tokens.size()) - num_prompt_tokens; }
  int num_unfed() const { return static_cast<int>(tokens.size()) - num_fed; }
  bool scores_prompt() const { return sampling.prompt_logprobs >= 0; }
  bool has_penalties() const {
    return sampling.repetition_penalty != 1 || sampling.presence_penalty != 0 || sampling.frequency_penalty != 0;
  }
  // How many blocks may come from the prefix cache: at least one token must be fed, whose logits are the next token's,
  // and every one whose prompt log-probability has not been asked for.
  int max_cached_blocks() const {
    const int last = static_cast<int>(tokens.size()) - 1;
    return (scores_prompt() ? std::min(num_prompt_scored, last) : last) / kBlockTokens;
  }
  bool is_over() const { return is_ended && !is_preempted; }  // its last delta has been made
  // Between two steps others have used the CPU's caches. Who goes over many sequences asks for all of them beforehand,
  // lest it wait for each in turn.
  void Prefetch() const {
    const char* begin = reinterpret_cast<const char*>(this);
    for (const char* line = begin; line < reinterpret_cast<const char*>(&sampling.stop_token_ids); line += 64)
      __builtin_prefetch(line, 1);
  }
};

// The token ids that end an answer, each once.
inline std::vector<int32_t> EndTokens(const SamplingParams& sampling, const std::vector<int>& eos_token_ids) {
  std::vector<int32_t> ids = sampling.stop_token_ids;
  if (!sampling.ignore_eos) ids.insert(ids.end(), eos_token_ids.begin(), eos_token_ids.end());
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

// How many token ids the sampling of a sequence bans and biases; at most kMaxTokenBiases may run.
inline size_t NumTokenBiases(const SamplingParams& sampling, const std::vector<int>& eos_token_ids) {
  const size_t num_banned = sampling.min_tokens > 0 ? EndTokens(sampling, eos_token_ids).size() : 0;
  return num_banned + sampling.logit_bias.size();
}

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_SEQUENCE_H_
