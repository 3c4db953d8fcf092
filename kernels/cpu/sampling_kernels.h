// Sampling kernels: passes over one row of logits.
#ifndef CACHALOT_KERNELS_CPU_SAMPLING_KERNELS_H_
#define CACHALOT_KERNELS_CPU_SAMPLING_KERNELS_H_

#include <cstdint>

namespace cachalot {

inline constexpr int64_t kLogitBlock = 64;  // tokens a block: sixteen Philox counters of four words

// What keys the noise of one draw (ops.h, Sample).
struct NoiseKey {
  uint64_t seed = 0;
  uint32_t choice = 0;
  uint32_t position = 0;  // of the token that is drawn
};

// log of the sum of exp over x[0..n).
float LogSumExp(const float* x, int64_t n);

// The `count` largest of x[0..n), falling, ties by id; ids of -1 where there are fewer.
void TopLogits(const float* x, int64_t n, int count, int32_t* ids, float* values);

// The index of the largest of x[0..n), the lowest among equals; 0 when nothing is above -inf.
int32_t ArgMax(const float* x, int64_t n);

// maxima[b] <- the largest of block b; n is a multiple of kLogitBlock.
void BlockMaxima(const float* x, int64_t n, float* maxima);

// The sum of exp(x - max).
float SumOfExp(const float* x, int64_t n, float max);

// The arg-max of x[id] + Gumbel noise of id; `max` is the largest of x, n a multiple of kLogitBlock. Blocks that cannot
// win, since the noise is bounded, are skipped.
int32_t GumbelArgMax(const float* x, int64_t n, float max, const NoiseKey& key);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_SAMPLING_KERNELS_H_
