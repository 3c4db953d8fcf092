// Arena: carves typed arrays out of one block of workspace.
#ifndef CACHALOT_KERNELS_CPU_ARENA_H_
#define CACHALOT_KERNELS_CPU_ARENA_H_

#include <cstddef>
#include <cstdint>

#include "kernels/check.h"

namespace cachalot {

// A copy starts again where the original stood: pass it by value to lend what is left.
class Arena {
 public:
  Arena() = default;
  Arena(void* data, size_t bytes) : next_(static_cast<char*>(data)), end_(next_ + bytes) {}

  static constexpr int64_t kAlign = 64;
  template <typename T>
  static constexpr int64_t Bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }

  // 64-byte aligned and not initialised. The workspace was made for the maxima: running out is a bug.
  template <typename T>
  T* Take(int64_t count) {
    const int64_t bytes = Bytes<T>(count);
    CHECK(bytes <= end_ - next_, "{} bytes of workspace wanted, {} left", bytes, end_ - next_);
    T* result = reinterpret_cast<T*>(next_);
    next_ += bytes;
    return result;
  }

 private:
  char* next_ = nullptr;
  char* end_ = nullptr;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_ARENA_H_
