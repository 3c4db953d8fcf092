// Kernels of a step's begin: updates in order, rows as padding, then one block a sequence.
#include "kernels/cuda/steps_kernels.h"

namespace cachalot {
namespace {

constexpr int kUpdateThreads = 256;
constexpr int kFillThreads = 256;
constexpr int kSequenceThreads = 512;
constexpr uint32_t kPromptBit = 0x8000;  // as penalty_counts.h has it
constexpr uint32_t kGeneratedMask = 0x7fff;

// One block: a thread an update, a chunk of updates after the other. Within a chunk the last of equal keys writes.
__global__ void __launch_bounds__(kUpdateThreads) UpdatesKernel(UpdateArgs a) {
  __shared__ int2 keys[kUpdateThreads];
  for (int64_t first = 0; first < a.num_updates; first += kUpdateThreads) {
    const int64_t left = a.num_updates - first;
    const int count = left < kUpdateThreads ? static_cast<int>(left) : kUpdateThreads;
    const int i = threadIdx.x;
    const int32_t* update = a.updates + (first + i) * a.update_stride;
    const int2 key = i < count ? make_int2(update[0], update[1]) : make_int2(-1, -1);
    keys[i] = key;
    __syncthreads();
    bool writes = key.x >= 0 && key.x < a.num_slots && key.y >= 0 && key.y < a.num_indices;
    for (int j = i + 1; writes && j < count; ++j) writes = keys[j].x != key.x || keys[j].y != key.y;
    if (writes) {
      int32_t* entry = a.table + key.x * a.slot_stride + static_cast<int64_t>(key.y) * a.num_words;
      for (int w = 0; w < a.num_words; ++w) entry[w] = update[2 + w];
    }
    // NOTE: orders the chunks' writes, and lets the keys be overwritten.
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kFillThreads) FillPaddingKernel(BeginStepArgs a) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (t >= a.num_rows) return;
  a.tokens[t] = 0;
  a.positions[t] = 0;
  a.slots[t] = -1;
}

// NOTE: by bytes, since rows of parameters may lie at any address.
__device__ int32_t LoadParam(const uint8_t* params, int offset) {
  const uint8_t* p = params + offset;
  return static_cast<int32_t>(p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
}

// [begin, end) <- 0, by 16 bytes but for its ends.
__device__ void ClearCounts(uint16_t* begin, uint16_t* end) {
  uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + 15) / 16 * 16,
            last = reinterpret_cast<uintptr_t>(end) / 16 * 16;
  if (first > last) first = last = reinterpret_cast<uintptr_t>(end);
  uint16_t* aligned_begin = reinterpret_cast<uint16_t*>(first);
  uint16_t* aligned_end = reinterpret_cast<uint16_t*>(last);
  for (uint16_t* p = begin + threadIdx.x; p < aligned_begin; p += blockDim.x) *p = 0;
  for (uint16_t* p = aligned_end + threadIdx.x; p < end; p += blockDim.x) *p = 0;
  uint4* end4 = reinterpret_cast<uint4*>(last);
  for (uint4* p = reinterpret_cast<uint4*>(first) + threadIdx.x; p < end4; p += blockDim.x) *p = make_uint4(0, 0, 0, 0);
}

// A token enters the cache: marked when it is of the prompt, else counted up to kGeneratedMask. Atomics work on the
// aligned word that has the count in one of its halves; those of other tokens keep theirs.
__device__ void CountToken(uint16_t* count, bool is_prompt) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(count);
  uint32_t* word = reinterpret_cast<uint32_t*>(address / 4 * 4);
  const int shift = static_cast<int>(address % 4) * 8;
  if (is_prompt) {
    atomicOr(word, kPromptBit << shift);
    return;
  }
  uint32_t seen = *reinterpret_cast<volatile uint32_t*>(word);
  while ((seen >> shift & kGeneratedMask) != kGeneratedMask) {
    const uint32_t before = atomicCAS(word, seen, seen + (1u << shift));
    if (before == seen) return;
    seen = before;
  }
}

// The sequence takes its slot: new parameters, nothing counted. All threads; complete at the caller's barrier.
__device__ void EnterSlot(const BeginStepArgs& a, int32_t slot, const uint8_t* params) {
  uint8_t* dst = a.params + slot * a.params_stride;
  for (int i = threadIdx.x; i < kParamsBytes; i += blockDim.x) dst[i] = params[i];
  if (a.counts == nullptr) return;
  uint16_t* counts = a.counts + slot * a.counts_stride;
  ClearCounts(counts, counts + a.vocab_size);
}

// Decode rows come from the slot, rows of a chunk from the host.
__device__ int32_t TokenOf(const BeginStepArgs& a, int32_t slot, bool is_decode, int64_t row, int32_t i) {
  if (!is_decode) return a.input_tokens[row];
  if (i == 0) return a.last_token[slot];
  return i <= a.num_drafts ? a.drafts[slot * a.drafts_stride + i - 1] : 0;
}

__global__ void __launch_bounds__(kSequenceThreads) BeginSequenceKernel(BeginStepArgs a) {
  const int64_t s = blockIdx.x;
  const int32_t slot = a.seq_slot[s];
  if (slot < 0 || slot >= a.num_slots) return;
  const uint8_t* new_params = a.seq_params + s * a.seq_params_stride;
  const bool enters = LoadParam(new_params, kParamsApply) != 0;
  const uint8_t* params = enters ? new_params : a.params + slot * a.params_stride;
  const int32_t prompt_tokens = LoadParam(params, kParamsPromptTokens);
  const int32_t start = a.seq_start[s], first_row = a.query_start[s], count = a.query_start[s + 1] - first_row;
  const bool is_decode = start < 0;
  const int32_t first_position = !is_decode ? start : enters ? 0 : a.length[slot];
  if (enters) EnterSlot(a, slot, new_params);
  // NOTE: the length has been read and the counts are zero before anyone goes on.
  __syncthreads();
  for (int32_t i = threadIdx.x; i < count; i += kSequenceThreads) {
    const int64_t row = first_row + static_cast<int64_t>(i);
    if (row < 0 || row >= a.num_rows) continue;
    const int32_t token = TokenOf(a, slot, is_decode, row, i), position = first_position + i;
    a.tokens[row] = token;
    a.positions[row] = position;
    a.slots[row] = slot;
    if (a.counts == nullptr || token < 0 || token >= a.vocab_size) continue;
    CountToken(a.counts + slot * a.counts_stride + token, position < prompt_tokens);
  }
  if (threadIdx.x == 0) a.length[slot] = first_position + count;
}

__global__ void __launch_bounds__(kFillThreads) CountTokensKernel(CountTokensArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (i >= a.num_tokens) return;
  const int32_t* entry = a.tokens + i * a.token_stride;
  const int32_t slot = entry[0], token = entry[1];
  if (slot < 0 || slot >= a.num_slots || token < 0 || token >= a.vocab_size) return;
  CountToken(a.counts + slot * a.counts_stride + token, entry[2] == 0);
}

}  // namespace

void LaunchUpdates(cudaStream_t stream, const UpdateArgs& args) {
  UpdatesKernel<<<1, kUpdateThreads, 0, stream>>>(args);
}

void LaunchBeginStep(cudaStream_t stream, const BeginStepArgs& args) {
  if (args.num_rows > 0) {
    const unsigned blocks = static_cast<unsigned>((args.num_rows + kFillThreads - 1) / kFillThreads);
    FillPaddingKernel<<<blocks, kFillThreads, 0, stream>>>(args);
  }
  if (args.num_sequences > 0) {
    BeginSequenceKernel<<<static_cast<unsigned>(args.num_sequences), kSequenceThreads, 0, stream>>>(args);
  }
}

void LaunchCountTokens(cudaStream_t stream, const CountTokensArgs& args) {
  const unsigned blocks = static_cast<unsigned>((args.num_tokens + kFillThreads - 1) / kFillThreads);
  CountTokensKernel<<<blocks, kFillThreads, 0, stream>>>(args);
}

}  // namespace cachalot
