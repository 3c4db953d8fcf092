// CudaPeerCommunicator: expert parallelism of GPUs of one process that reach each other's memory, by NVLink at best.
#ifndef CACHALOT_KERNELS_CUDA_PEER_COMMUNICATOR_H_
#define CACHALOT_KERNELS_CUDA_PEER_COMMUNICATOR_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/communicator.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/peer_kernels.h"

namespace cachalot {

// A token goes to a rank once, however many of its experts are there, and what they make of it comes back as one sum.
// All ranks run every step at the same T, which is not 0.
class CudaPeerCommunicator : public Communicator {
 public:
  // Meets the other ranks, which must do the same, by `options.mesh`; from then on the mesh is listened to for an abort
  // only. ResourceExhausted when its memory does not fit; Unimplemented where another rank is of another process, or
  // its GPU out of reach. `options.mesh` and `device` must outlive the result.
  static absl::StatusOr<std::unique_ptr<CudaPeerCommunicator>> Make(const BackendOptions& options, CudaDevice* device);
  ~CudaPeerCommunicator() override;
  // Device memory that Make allocates; 0 for one rank.
  static int64_t DeviceBytes(const OpLimits& limits);

  int rank() const override { return mesh_.rank(); }
  int num_ranks() const override { return mesh_.num_ranks(); }

  // Rows of a slot are in order of their rank, then of t, then of k.
  void Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                const Tensor& topk_weights) override;
  void Combine(const Tensor& out, const Tensor& y, const Tensor& shared) override;

 private:
  CudaPeerCommunicator(Mesh* mesh, CudaDevice* device) : mesh_(*mesh), device_(*device), stream_(*device->stream()) {}
  absl::Status Start(const OpLimits& limits);
  absl::Status Meet();
  int64_t num_rows() const { return num_tokens_ * num_ranks(); }

  Mesh& mesh_;
  CudaDevice& device_;
  CudaStream& stream_;
  int64_t max_tokens_ = 0;
  Buffer inbox_memory_, inboxes_, row_of_, counters_;
  Buffer abort_, fault_;  // pinned
  PeerInbox inbox_ = {};
  Peers peers_ = {};
  // Of the last Dispatch.
  int64_t num_tokens_ = 0;
  Tensor topk_slots_;
  int32_t slots_per_rank_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PEER_COMMUNICATOR_H_
