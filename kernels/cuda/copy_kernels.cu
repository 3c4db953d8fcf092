// A thread a word: every read is under way at once, as one over the bus takes a microsecond.
#include "kernels/cuda/copy_kernels.h"

namespace cachalot {
namespace {

constexpr int kThreads = 256;

template <typename Word>
__global__ void __launch_bounds__(kThreads) CopyKernel(Word* dst, const Word* src, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) dst[i] = src[i];
}

template <typename Word>
void Launch(cudaStream_t stream, void* dst, const void* src, int64_t bytes) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Word));
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  CopyKernel<<<blocks, kThreads, 0, stream>>>(static_cast<Word*>(dst), static_cast<const Word*>(src), count);
}

}  // namespace

void LaunchCopy(cudaStream_t stream, void* dst, const void* src, int64_t bytes) {
  if (bytes <= 0) return;
  const uintptr_t all =
      reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | static_cast<uintptr_t>(bytes);
  if (all % sizeof(uint4) == 0) {
    Launch<uint4>(stream, dst, src, bytes);
  } else if (all % sizeof(uint32_t) == 0) {
    Launch<uint32_t>(stream, dst, src, bytes);
  } else {
    Launch<uint8_t>(stream, dst, src, bytes);
  }
}

}  // namespace cachalot
