// LocalCommunicator: one rank, so rows only have to be grouped by expert.
#ifndef CACHALOT_KERNELS_CPU_LOCAL_COMMUNICATOR_H_
#define CACHALOT_KERNELS_CPU_LOCAL_COMMUNICATOR_H_

#include <vector>

#include "kernels/communicator.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/ops_types.h"

namespace cachalot {

class LocalCommunicator : public Communicator {
 public:
  LocalCommunicator(const OpLimits& limits, ThreadPool* pool);  // `pool` must outlive it
  int rank() const override { return 0; }
  int num_ranks() const override { return 1; }

  // Rows of a slot are in order of t, then k.
  void Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                const Tensor& topk_weights) override;
  void Combine(const Tensor& out, const Tensor& y, const Tensor& shared) override;

 private:
  ThreadPool& pool_;
  std::vector<int32_t> row_of_;  // of the last Dispatch: [T, K] its row, or -1
  int64_t num_tokens_ = 0, num_choices_ = 0;
  Tensor topk_weights_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_LOCAL_COMMUNICATOR_H_
