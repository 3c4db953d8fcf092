// Dispatch and combine by stores to other GPUs' memory. Floor: the bytes of the rows that leave, at the rate of NVLink
// (450 GB/s a direction on H100 and H200), plus a flag's way there (1 to 2 us) each way. A kernel's blocks store rows;
// the last of them, which has seen all others end, tells every rank by a flag, and waits for theirs: one block waits,
// the other SMs are free for what runs beside.
#include "kernels/cuda/peer_kernels.h"
#include "kernels/cuda/rows.cuh"

namespace cachalot {
namespace {

constexpr int kSendThreads = 256;
constexpr int kSumThreads = 128;

__device__ __forceinline__ void StoreFlag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t LoadFlag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t Nanoseconds() {
  uint64_t value;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
  return value;
}

// Whether this block is the last of the grid: then all that the others have written is visible to it.
__device__ bool IsLastBlock(const Peers& peers) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    is_last = atomicAdd(peers.num_ended, 1) == gridDim.x * gridDim.y - 1;
    __threadfence_system();
  }
  __syncthreads();
  return is_last;
}

// By the last block: tells all ranks that this one's writes of the round are there, and waits until theirs are here.
__device__ void MeetPeers(const Peers& peers, int what, uint64_t round) {
  const int r = threadIdx.x;
  if (r == 0) *peers.num_ended = 0;
  if (r >= peers.num_ranks) return;
  StoreFlag(peers.inboxes[r].arrivals + what * peers.num_ranks + peers.rank, round);
  const uint64_t* arrived = peers.inboxes[peers.rank].arrivals + what * peers.num_ranks + r;
  uint64_t begin = 0;
  for (int i = 0; LoadFlag(arrived) < round; ++i) {
    if (i % 256 != 255) continue;
    if (*peers.abort != 0) {
      *peers.fault = -1;
      return;
    }
    const uint64_t now = Nanoseconds();
    if (begin == 0) begin = now;
    if (now - begin < kPeerTimeoutNs) continue;
    *peers.fault = 1 + r;
    return;
  }
}

__global__ void __launch_bounds__(kSendThreads) SendRowsKernel(SendRowsArgs a) {
  const Peers& peers = a.peers;
  const int64_t t = blockIdx.x, row = static_cast<int64_t>(peers.rank) * gridDim.x + t;
  const int32_t* slots = a.topk_slots + t * a.topk_slots_stride;
  const float* weights = a.topk_weights + t * a.topk_weights_stride;
  __shared__ uint64_t destinations;
  if (threadIdx.x == 0) {
    uint64_t ranks = 0;
    for (int k = 0; k < a.num_choices; ++k) {
      const int32_t slot = slots[k];
      if (slot >= 0) ranks |= uint64_t{1} << slot / a.slots_per_rank;
    }
    destinations = ranks;
  }
  // NOTE: every rank has to know that a token has nothing for it.
  for (int i = threadIdx.x; i < peers.num_ranks * a.num_choices; i += kSendThreads) {
    const PeerInbox& inbox = peers.inboxes[i / a.num_choices];
    const int k = i % a.num_choices;
    inbox.slots[row * a.num_choices + k] = slots[k];
    inbox.weights[row * a.num_choices + k] = weights[k];
  }
  __syncthreads();
  const uint4* values = reinterpret_cast<const uint4*>(a.values + t * a.values_stride);
  for (int i = threadIdx.x; i < a.value_bytes / 16; i += kSendThreads) {
    const uint4 word = __ldg(values + i);
    for (uint64_t left = destinations; left != 0; left &= left - 1) {
      char* to = peers.inboxes[__ffsll(left) - 1].values + row * a.value_bytes;
      reinterpret_cast<uint4*>(to)[i] = word;
    }
  }
  const uint32_t* scales = reinterpret_cast<const uint32_t*>(a.scales + t * a.scales_stride);
  for (int i = threadIdx.x; i < a.scale_bytes / 4; i += kSendThreads) {
    const uint32_t word = __ldg(scales + i);
    for (uint64_t left = destinations; left != 0; left &= left - 1) {
      char* to = peers.inboxes[__ffsll(left) - 1].scales + row * a.scale_bytes;
      reinterpret_cast<uint32_t*>(to)[i] = word;
    }
  }
  if (!IsLastBlock(peers)) return;
  const uint64_t round = *peers.round + 1;
  __syncthreads();
  if (threadIdx.x == 0) *peers.round = round;
  MeetPeers(peers, 0, round);
}

__global__ void __launch_bounds__(kSumThreads) SendSumsKernel(SendSumsArgs a) {
  const Peers& peers = a.peers;
  const int64_t row = blockIdx.x, num_tokens = gridDim.x / peers.num_ranks;
  const int64_t from = row / num_tokens, t = row % num_tokens;
  const int32_t* rows = a.row_of + row * a.num_choices;
  const float* weights = peers.inboxes[peers.rank].weights + row * a.num_choices;
  const int chunk = blockIdx.y * kSumThreads + threadIdx.x;
  if (chunk < a.cols / kChunk) {
    float sum[kChunk] = {};
    bool has_rows = false;
    for (int k = 0; k < a.num_choices; ++k) {
      const int32_t y_row = __ldg(rows + k);
      if (y_row < 0) continue;
      has_rows = true;
      const float weight = weights[k];
      float v[kChunk];
      UnpackBf16(*ChunkOf(a.y, y_row, chunk), v);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[i] = fmaf(weight, v[i], sum[i]);
    }
    if (has_rows) {
      char* to = peers.inboxes[from].sums + (peers.rank * num_tokens + t) * a.cols * 2;
      reinterpret_cast<uint4*>(to)[chunk] = PackBf16(sum);
    }
  }
  if (!IsLastBlock(peers)) return;
  MeetPeers(peers, 1, *peers.round);
}

__global__ void __launch_bounds__(kSumThreads) AddSumsKernel(AddSumsArgs a) {
  const Peers& peers = a.peers;
  const int64_t t = blockIdx.x, num_tokens = gridDim.x;
  const int chunk = blockIdx.y * kSumThreads + threadIdx.x;
  if (chunk >= a.cols / kChunk) return;
  uint64_t ranks = 0;
  for (int k = 0; k < a.num_choices; ++k) {
    const int32_t slot = __ldg(a.topk_slots + t * a.topk_slots_stride + k);
    if (slot >= 0) ranks |= uint64_t{1} << slot / a.slots_per_rank;
  }
  float sum[kChunk] = {};
  if (a.shared.data != nullptr) UnpackBf16(*ChunkOf(a.shared, t, chunk), sum);
  for (; ranks != 0; ranks &= ranks - 1) {
    const int r = __ffsll(ranks) - 1;
    const char* from = peers.inboxes[peers.rank].sums + (r * num_tokens + t) * a.cols * 2;
    float v[kChunk];
    UnpackBf16(reinterpret_cast<const uint4*>(from)[chunk], v);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sum[i] += v[i];
  }
  StoreChunk(a.out, t, chunk, sum);
}

dim3 SumGrid(int64_t num_rows, int cols) {
  const int block_cols = kSumThreads * kChunk;
  return dim3(static_cast<unsigned>(num_rows), static_cast<unsigned>((cols + block_cols - 1) / block_cols));
}

}  // namespace

void LaunchSendRows(cudaStream_t stream, const SendRowsArgs& args, int64_t num_tokens) {
  SendRowsKernel<<<static_cast<unsigned>(num_tokens), kSendThreads, 0, stream>>>(args);
}

void LaunchSendSums(cudaStream_t stream, const SendSumsArgs& args, int64_t num_tokens) {
  SendSumsKernel<<<SumGrid(num_tokens * args.peers.num_ranks, args.cols), kSumThreads, 0, stream>>>(args);
}

void LaunchAddSums(cudaStream_t stream, const AddSumsArgs& args, int64_t num_tokens) {
  AddSumsKernel<<<SumGrid(num_tokens, args.cols), kSumThreads, 0, stream>>>(args);
}

}  // namespace cachalot
