// Sequence: one request as the scheduler sees it.
#ifndef CACHALOT_ENGINE_SCHEDULE_SEQUENCE_H_
#define CACHALOT_ENGINE_SCHEDULE_SEQUENCE_H_

#include <cstdint>
#include <vector>

#include "engine/request.h"

namespace cachalot {

struct Sequence {
  RequestId id = 0;
  SamplingParams sampling;
  int priority = 0;
  int num_prompt_tokens = 0;
  std::vector<int32_t> tokens;  // prompt, then what has been generated and committed

  // Owned while running.
  int slot = -1;
  std::vector<int32_t> blocks;

  // What launched steps have done, whether or not they have been committed.
  int num_fed = 0;            // tokens whose latents are, or will be, in the cache
  int num_sampling = 0;       // sampled tokens under way: launched, not committed
  int num_in_flight = 0;      // launched steps that name this sequence
  int num_prompt_scored = 0;  // prompt log-probabilities asked of launched steps
  bool is_in_slot = false;    // a launched step has brought the slot's parameters
  bool is_decoding = false;   // a launched step samples: the slot holds the next row's token
  bool is_ended = false;      // finished, cancelled or preempted: holds slot and blocks until num_in_flight is 0
  bool is_preempted = false;  // goes back to the queue then

  int num_generated() const { return static_cast<int>(tokens.size()) - num_prompt_tokens; }
  bool scores_prompt() const { return sampling.prompt_logprobs >= 0; }
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_SEQUENCE_H_
