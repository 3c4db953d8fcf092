// Launches of dispatch and combine between GPUs that reach each other's memory.
#ifndef CACHALOT_KERNELS_CUDA_PEER_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_PEER_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/device_tensor.h"

namespace cachalot {

inline constexpr int kMaxPeers = 64;

// What every rank has for the others to write to. Token t of rank r is row r * T + t, T being the step's, the same on
// all ranks.
struct PeerInbox {
  char* values;        // [ranks * T] rows of x
  char* scales;        // likewise, of fp8
  int32_t* slots;      // [ranks * T, K] physical; -1: padding
  float* weights;      // [ranks * T, K]
  char* sums;          // [ranks * T, D] bf16: of this rank's token t, what rank r has
  uint64_t* arrivals;  // [2, ranks] the last dispatch, and the last combine, whose writes of a rank are all there
};

// The ranks, as kernels of one of them see them. All on its device but for `abort` and `fault`, which are pinned.
struct Peers {
  const PeerInbox* inboxes;  // [ranks]
  int32_t rank, num_ranks;
  uint32_t* num_ended;            // [1] blocks of the kernel that runs
  uint64_t* round;                // [1] dispatches so far
  const volatile int32_t* abort;  // not 0: nobody waits any more
  volatile int32_t* fault;        // 1 + the rank that has not answered within kPeerTimeoutNs; -1: abort
};
inline constexpr int64_t kPeerTimeoutNs = int64_t{4} * 1000 * 1000 * 1000;

// Every token's row to each rank that has a slot of its, once; slots and weights to all. Then waits until all have done
// the same.
struct SendRowsArgs {
  Peers peers;
  const char *values, *scales;
  int64_t values_stride, scales_stride;  // bytes
  int32_t value_bytes, scale_bytes;      // of a row; multiples of 16 and of 4
  const int32_t* topk_slots;
  int64_t topk_slots_stride;
  const float* topk_weights;
  int64_t topk_weights_stride;
  int32_t num_choices, slots_per_rank;
};
void LaunchSendRows(cudaStream_t stream, const SendRowsArgs& args, int64_t num_tokens);

// Of every token that came, weighted sums of its rows here, bf16, to its rank. Then waits until all have done the same.
struct SendSumsArgs {
  Peers peers;
  MatrixRef y;            // bf16
  const int32_t* row_of;  // [ranks * T, K]; -1: elsewhere
  int32_t num_choices, cols;
};
void LaunchSendSums(cudaStream_t stream, const SendSumsArgs& args, int64_t num_tokens);

// out[t] <- shared[t] + the sums that came of token t, in order of ranks.
struct AddSumsArgs {
  Peers peers;
  MatrixRef out, shared;  // `shared` may be absent
  const int32_t* topk_slots;
  int64_t topk_slots_stride;
  int32_t num_choices, slots_per_rank, cols;
};
void LaunchAddSums(cudaStream_t stream, const AddSumsArgs& args, int64_t num_tokens);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PEER_KERNELS_H_
