// Launches of dispatch and combine within one rank.
#ifndef CACHALOT_KERNELS_CUDA_COMMUNICATOR_KERNELS_H_
#define CACHALOT_KERNELS_CUDA_COMMUNICATOR_KERNELS_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/device_tensor.h"
#include "kernels/cuda/row_copy.h"

namespace cachalot {

// Rows of a slot in order of tokens, then of choices: where every (token, choice) goes, and where slots begin.
struct GroupRowsArgs {
  const int32_t* topk_slots;  // [num_tokens, num_choices]; -1: nowhere
  int64_t topk_slots_stride;
  int32_t* row_of;   // [num_tokens, num_choices], contiguous; -1: nowhere
  int32_t* offsets;  // [num_slots + 1]
  int32_t num_tokens, num_choices;
  int32_t first_slot = 0, num_slots;  // others go nowhere
  int32_t capacity;                   // rows that there is room for; what comes after goes nowhere
};
// Row t of src to the rows row_of[t, 0..num_choices) of dst.
struct ScatterRowsArgs {
  RowCopy values, scales;
  const int32_t* row_of;
  int32_t num_choices;
};
// One after the other; where there are few rows by one kernel: a launch and a reading of the rows less.
void LaunchDispatch(cudaStream_t stream, const GroupRowsArgs& group, const ScatterRowsArgs& scatter);

// out[t] <- shared[t] + sum over k, in order, of weights[t,k] * y[row_of[t,k]].
struct CombineArgs {
  MatrixRef out, y;
  MatrixRef shared;  // may be absent
  const float* weights;
  int64_t weights_stride;
  const int32_t* row_of;
  int32_t num_choices, cols;
};
void LaunchCombine(cudaStream_t stream, const CombineArgs& args, int64_t num_tokens);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_COMMUNICATOR_KERNELS_H_
