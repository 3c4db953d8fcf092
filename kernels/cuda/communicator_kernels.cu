// Kernels of dispatch and combine within one rank.
#include "kernels/cuda/communicator_kernels.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace cachalot {
namespace {

constexpr int kGroupThreads = 1024;
constexpr int kScatterThreads = 256;
constexpr int kCombineThreads = 128;
constexpr int kMaxFewChoices = 512;  // of all tokens of a step of few
constexpr int kHeldWords = 4;
constexpr int kRowsInFlight = 8;  // of y, that a thread of Combine has asked for at a time

__device__ __forceinline__ int32_t SlotAt(const GroupRowsArgs& a, int32_t i) {
  if (a.topk_slots_stride == a.num_choices) return __ldg(a.topk_slots + i) - a.first_slot;
  return __ldg(a.topk_slots + i / a.num_choices * a.topk_slots_stride + i % a.num_choices) - a.first_slot;
}

// A block a slot. Every warp has a contiguous part of the (token, choice)s: it counts those of earlier slots and of its
// own; then it knows its first row, and gives rows out in order.
__global__ void __launch_bounds__(kGroupThreads) GroupRowsKernel(GroupRowsArgs a) {
  constexpr int kNumWarps = kGroupThreads / kWarpSize;
  static_assert(kNumWarps == kWarpSize, "a lane reads a warp's counts");
  __shared__ int32_t less_of[kNumWarps], equal_of[kNumWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t slot = blockIdx.x, n = a.num_tokens * a.num_choices;
  const int32_t part = (n + kGroupThreads - 1) / kGroupThreads * kWarpSize;
  const int32_t begin = min(n, warp * part), end = min(n, begin + part);
  int32_t less = 0, equal = 0;
#pragma unroll 4
  for (int32_t i = begin + lane; i < end; i += kWarpSize) {
    const int32_t s = SlotAt(a, i);
    less += static_cast<uint32_t>(s) < static_cast<uint32_t>(slot) ? 1 : 0;
    equal += s == slot ? 1 : 0;
  }
  less = __reduce_add_sync(kFullWarp, less);
  equal = __reduce_add_sync(kFullWarp, equal);
  if (lane == 0) {
    less_of[warp] = less;
    equal_of[warp] = equal;
  }
  __syncthreads();
  const int32_t slot_begin = __reduce_add_sync(kFullWarp, less_of[lane]);
  const int32_t slot_rows = __reduce_add_sync(kFullWarp, equal_of[lane]);
  int32_t row = slot_begin + __reduce_add_sync(kFullWarp, lane < warp ? equal_of[lane] : 0);
  if (threadIdx.x == 0) {
    a.offsets[slot] = min(slot_begin, a.capacity);
    if (slot == a.num_slots - 1) a.offsets[a.num_slots] = min(slot_begin + slot_rows, a.capacity);
  }
  if (equal == 0 && slot != 0) return;
    // The first slot's block also writes what goes nowhere.
#pragma unroll 4
  for (int32_t first = begin; first < end; first += kWarpSize) {
    const int32_t i = first + lane, s = i < end ? SlotAt(a, i) : -1;
    const uint32_t mine = __ballot_sync(kFullWarp, s == slot);
    if (s == slot) {
      const int32_t own = row + __popc(mine & ((1u << lane) - 1));
      a.row_of[i] = own < a.capacity ? own : -1;
    } else if (slot == 0 && i < end && static_cast<uint32_t>(s) >= static_cast<uint32_t>(a.num_slots)) {
      a.row_of[i] = -1;
    }
    row += __popc(mine);
  }
}

// Words of 16 bytes of a row, that a thread has asked for.
__device__ __forceinline__ void LoadWords(const RowCopy& copy, int64_t t, uint4 (&held)[kHeldWords]) {
  const uint4* src = reinterpret_cast<const uint4*>(copy.src + t * copy.src_stride);
#pragma unroll
  for (int i = 0; i < kHeldWords; ++i) {
    const int word = i * kScatterThreads + threadIdx.x;
    if (word < copy.bytes / 16) held[i] = __ldg(src + word);
  }
}

__device__ __forceinline__ void StoreWords(const RowCopy& copy, const uint4 (&held)[kHeldWords], const int32_t* rows,
                                           int32_t num_choices) {
  for (int k = 0; k < num_choices; ++k) {
    if (rows[k] < 0) continue;
    uint4* dst = reinterpret_cast<uint4*>(copy.dst + rows[k] * copy.dst_stride);
#pragma unroll
    for (int i = 0; i < kHeldWords; ++i) {
      const int word = i * kScatterThreads + threadIdx.x;
      if (word < copy.bytes / 16) dst[word] = held[i];
    }
  }
}

// Every word is read once, and written for each choice. `rows`: of global or shared memory.
template <typename Word>
__device__ void ScatterWords(const RowCopy& copy, int64_t t, const int32_t* rows, int32_t num_choices) {
  const Word* src = reinterpret_cast<const Word*>(copy.src + t * copy.src_stride);
  for (int i = threadIdx.x; i < copy.bytes / static_cast<int>(sizeof(Word)); i += kScatterThreads) {
    const Word word = __ldg(src + i);
    for (int k = 0; k < num_choices; ++k) {
      const int64_t row = rows[k];
      if (row >= 0) reinterpret_cast<Word*>(copy.dst + row * copy.dst_stride)[i] = word;
    }
  }
}

__device__ void ScatterRow(const RowCopy& copy, int64_t t, const int32_t* rows, int32_t num_choices) {
  switch (copy.word) {
    case 16: return ScatterWords<uint4>(copy, t, rows, num_choices);
    case 4: return ScatterWords<uint32_t>(copy, t, rows, num_choices);
    default: return ScatterWords<uint8_t>(copy, t, rows, num_choices);
  }
}

__global__ void __launch_bounds__(kScatterThreads) ScatterRowsKernel(ScatterRowsArgs a) {
  const int64_t t = blockIdx.x;
  const int32_t* rows = a.row_of + t * a.num_choices;
  ScatterRow(a.values, t, rows, a.num_choices);
  ScatterRow(a.scales, t, rows, a.num_choices);
}

// Both for few rows, a block a token, whose choices' rows it counts itself, and one more for where slots begin. `src`
// is asked for before anything is counted.
__global__ void __launch_bounds__(kScatterThreads) DispatchFewKernel(GroupRowsArgs g, ScatterRowsArgs s) {
  __shared__ int32_t slots[kMaxFewChoices], rows[kMaxFewChoices];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t n = g.num_tokens * g.num_choices, t = static_cast<int32_t>(blockIdx.x), own = t * g.num_choices;
  const bool has_row = t < g.num_tokens;
  uint4 held[kHeldWords];
  if (has_row) LoadWords(s.values, t, held);
  for (int32_t i = threadIdx.x; i < n; i += kScatterThreads) slots[i] = SlotAt(g, i);
  __syncthreads();
  // How many choices go before a slot's: a warp a choice, or a slot.
  const int32_t count = has_row ? g.num_choices : g.num_slots + 1;
  for (int32_t k = warp; k < count; k += kScatterThreads / kWarpSize) {
    const int32_t slot = has_row ? slots[own + k] : k;
    int32_t before = 0;
    for (int32_t i = lane; i < n; i += kWarpSize) {
      before += static_cast<uint32_t>(slots[i]) < static_cast<uint32_t>(slot) ? 1 : 0;
      before += has_row && i < own + k && slots[i] == slot ? 1 : 0;
    }
    before = __reduce_add_sync(kFullWarp, before);
    if (lane != 0) continue;
    if (!has_row) {
      g.offsets[k] = min(before, g.capacity);
      continue;
    }
    rows[k] = static_cast<uint32_t>(slot) < static_cast<uint32_t>(g.num_slots) && before < g.capacity ? before : -1;
    g.row_of[own + k] = rows[k];
  }
  if (!has_row) return;
  __syncthreads();
  StoreWords(s.values, held, rows, g.num_choices);
  ScatterRow(s.scales, t, rows, g.num_choices);
}

__global__ void __launch_bounds__(kCombineThreads) CombineVectorKernel(CombineArgs a) {
  AllowNextKernel();
  const int64_t t = blockIdx.x;
  const int chunk = blockIdx.y * kCombineThreads + threadIdx.x;
  if (chunk >= a.cols / kChunk) return;
  const int32_t* rows = a.row_of + t * a.num_choices;
  const float* weights = a.weights + t * a.weights_stride;
  float sum[kChunk] = {};
  if (a.shared.data != nullptr) UnpackBf16(*ChunkOf(a.shared, t, chunk), sum);
  for (int first = 0; first < a.num_choices; first += kRowsInFlight) {
    uint4 packed[kRowsInFlight];
    int32_t row[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      row[j] = first + j < a.num_choices ? __ldg(rows + first + j) : -1;
      if (row[j] >= 0) packed[j] = *ChunkOf(a.y, row[j], chunk);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (row[j] < 0) continue;
      const float weight = weights[first + j];
      float v[kChunk];
      UnpackBf16(packed[j], v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[i] = fmaf(weight, v[i], sum[i]);
    }
  }
  StoreChunk(a.out, t, chunk, sum);
}

__global__ void __launch_bounds__(kCombineThreads) CombineScalarKernel(CombineArgs a) {
  const int64_t t = blockIdx.x;
  const int c = blockIdx.y * kCombineThreads + threadIdx.x;
  if (c >= a.cols) return;
  float sum = 0.0f;
  if (a.shared.data != nullptr) sum = LoadNumber(a.shared.data, t * a.shared.row_stride + c, a.shared.type);
  for (int k = 0; k < a.num_choices; ++k) {
    const int64_t row = a.row_of[t * a.num_choices + k];
    if (row < 0) continue;
    sum = fmaf(a.weights[t * a.weights_stride + k], LoadNumber(a.y.data, row * a.y.row_stride + c, a.y.type), sum);
  }
  StoreNumber(a.out.data, t * a.out.row_stride + c, a.out.type, sum);
}

}  // namespace

void LaunchDispatch(cudaStream_t stream, const GroupRowsArgs& group, const ScatterRowsArgs& scatter) {
  const auto num_tokens = static_cast<unsigned>(group.num_tokens);
  if (group.num_tokens * group.num_choices <= kMaxFewChoices && scatter.values.word == 16 &&
      scatter.values.bytes <= kHeldWords * kScatterThreads * 16) {
    DispatchFewKernel<<<num_tokens + 1, kScatterThreads, 0, stream>>>(group, scatter);
    return;
  }
  GroupRowsKernel<<<group.num_slots, kGroupThreads, 0, stream>>>(group);
  if (num_tokens > 0) ScatterRowsKernel<<<num_tokens, kScatterThreads, 0, stream>>>(scatter);
}

void LaunchCombine(cudaStream_t stream, const CombineArgs& args, int64_t num_tokens) {
  const bool is_vector = args.y.type == NumberType::kBF16 && IsBf16OrAbsent(args.shared) && args.cols % kChunk == 0 &&
                         MovesByChunks(args.y) && MovesByChunks(args.shared) && MovesByChunks(args.out);
  const int block_cols = kCombineThreads * (is_vector ? kChunk : 1);
  const dim3 grid(static_cast<unsigned>(num_tokens), static_cast<unsigned>((args.cols + block_cols - 1) / block_cols));
  if (is_vector) {
    CombineVectorKernel<<<grid, kCombineThreads, 0, stream>>>(args);
  } else {
    CombineScalarKernel<<<grid, kCombineThreads, 0, stream>>>(args);
  }
}

}  // namespace cachalot
