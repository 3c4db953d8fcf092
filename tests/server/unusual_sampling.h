// UnusualSampling: what tests give a server as the defaults of requests that say nothing.
#ifndef CACHALOT_TESTS_SERVER_UNUSUAL_SAMPLING_H_
#define CACHALOT_TESTS_SERVER_UNUSUAL_SAMPLING_H_

#include "engine/request.h"

namespace cachalot {

// Defaults of sampling that a checkpoint may have; none is the usual one.
inline SamplingParams UnusualSampling() {
  SamplingParams sampling;
  sampling.temperature = 0.6f;
  sampling.top_k = 20;
  sampling.top_p = 0.95f;
  sampling.min_p = 0.1f;
  sampling.repetition_penalty = 1.2f;
  return sampling;
}

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_UNUSUAL_SAMPLING_H_
