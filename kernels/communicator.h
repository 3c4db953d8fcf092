// Communicator: how rows reach the experts they were routed to, and come back. One per rank.
#ifndef CACHALOT_KERNELS_COMMUNICATOR_H_
#define CACHALOT_KERNELS_COMMUNICATOR_H_

#include "kernels/tensor.h"

namespace cachalot {

// Rows on the rank that computes them, grouped by local expert. G local physical expert slots, M capacity in rows.
struct ExpertRows {
  Activation x;    // [M, D]: rows offsets[g] .. offsets[g+1] belong to local slot g; rows past offsets[G] are undefined
  Tensor offsets;  // [G+1] i32, on the device: the host never learns the counts
};

// Called inside a step's body only, in the same order on every rank; stream-ordered, allocates nothing. Expert
// parallelism (DeepSeek-V3 report, 3.2.2): physical slot p lives on rank p / G. Every rank must make every call, with
// T = 0 when it has no tokens. A peer that is gone or late makes the device fault (Device::Wait), never a hang.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;

  // rows <- every row t of x once for each k with topk_slots[t,k] >= 0. A padding row has slots of -1 and goes nowhere.
  virtual void Dispatch(const ExpertRows& rows, const Activation& x,
                        const Tensor& topk_slots,         // [T, K] i32 physical slots
                        const Tensor& topk_weights) = 0;  // [T, K] f32, as they are until Combine

  // out[t] = shared[t] + sum over k = 0..K-1, in that order and in fp32, of topk_weights[t,k] * y[row of (t,k)], at the
  // token's origin. `y` are the results for the rows of the last Dispatch, whose routing the communicator remembers. On
  // GPUs each rank sums what it has, rounds that to bf16, and the origin sums over ranks.
  virtual void Combine(const Tensor& out,          // [T, D] f32 | bf16
                       const Tensor& y,            // [M, D] f32 | bf16
                       const Tensor& shared) = 0;  // [T, D] f32 | bf16, or empty
};

// What every implementation takes, and nothing else.
inline void CheckDispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                          const Tensor& topk_weights) {
  CHECK_SHAPE(topk_slots, x.rows(), -1);
  CHECK_SHAPE(topk_weights, x.rows(), topk_slots.dim(1));
  CHECK_SHAPE(rows.offsets, -1);
  CHECK_SHAPE(rows.x.values, -1, x.cols());
  CHECK(rows.x.values.dtype == x.values.dtype, "rows change type");
}
inline void CheckCombine(const Tensor& out, const Tensor& y, const Tensor& shared, int64_t num_tokens) {
  CHECK_SHAPE(out, num_tokens, -1);
  CHECK_SHAPE(y, -1, out.dim(1));
  if (!shared.empty()) CHECK_SHAPE(shared, num_tokens, out.dim(1));
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_COMMUNICATOR_H_
