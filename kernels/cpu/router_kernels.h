// Router scores from logits.
#ifndef CACHALOT_KERNELS_CPU_ROUTER_KERNELS_H_
#define CACHALOT_KERNELS_CPU_ROUTER_KERNELS_H_

#include <cstdint>

#include "kernels/ops_types.h"

namespace cachalot {

// In place: sigmoid of each, or the softmax of all.
void RouterScores(RouterOptions::Scoring scoring, float* scores, int64_t n);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_ROUTER_KERNELS_H_
