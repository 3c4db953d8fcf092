// What a slot's counts remember of a token: whether the prompt has it, and how often it was generated.
#ifndef CACHALOT_KERNELS_CPU_PENALTY_COUNTS_H_
#define CACHALOT_KERNELS_CPU_PENALTY_COUNTS_H_

#include <cstdint>

namespace cachalot {

inline constexpr uint16_t kPromptBit = 0x8000;
inline constexpr uint16_t kGeneratedMask = 0x7fff;

// A token enters the cache.
inline void CountToken(uint16_t* count, bool is_generated) {
  if (!is_generated) {
    *count |= kPromptBit;
  } else if ((*count & kGeneratedMask) != kGeneratedMask) {
    ++*count;
  }
}

// A generated token turns out not to be there: a rejected draft.
inline void UncountToken(uint16_t* count) {
  if ((*count & kGeneratedMask) != 0) --*count;
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_PENALTY_COUNTS_H_
