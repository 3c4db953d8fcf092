// CudaLocalCommunicator: one rank, so rows only have to be grouped by expert. The host never learns where they went.
#ifndef CACHALOT_KERNELS_CUDA_LOCAL_COMMUNICATOR_H_
#define CACHALOT_KERNELS_CUDA_LOCAL_COMMUNICATOR_H_

#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "kernels/communicator.h"
#include "kernels/cuda/stream.h"
#include "kernels/device.h"
#include "kernels/ops_types.h"

namespace cachalot {

// rows <- row t of x once for each of its choices that is one of rows' slots, the first of which is `first_slot`: in
// order of slots, then of t, then of k. `row_of` [T, K] gets where each went, or -1.
void GroupAndScatter(CudaStream* stream, const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                     int32_t first_slot, int32_t* row_of);

class CudaLocalCommunicator : public Communicator {
 public:
  // ResourceExhausted when its memory does not fit. `device` and `stream` must outlive the result.
  static absl::StatusOr<std::unique_ptr<CudaLocalCommunicator>> Make(const OpLimits& limits, Device* device,
                                                                     CudaStream* stream);
  int rank() const override { return 0; }
  int num_ranks() const override { return 1; }

  // Rows of a slot are in order of t, then k.
  void Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                const Tensor& topk_weights) override;
  void Combine(const Tensor& out, const Tensor& y, const Tensor& shared) override;

 private:
  CudaLocalCommunicator(CudaStream* stream, Buffer row_of) : stream_(*stream), row_of_(std::move(row_of)) {}

  CudaStream& stream_;
  Buffer row_of_;  // of the last Dispatch: [T, K] i32, its row, or -1
  int64_t num_tokens_ = 0, num_choices_ = 0;
  Tensor topk_weights_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_LOCAL_COMMUNICATOR_H_
