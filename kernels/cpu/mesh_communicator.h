// MeshCommunicator: expert parallelism of CPU ranks; every expert's rows travel to its rank and back by a Mesh.
#ifndef CACHALOT_KERNELS_CPU_MESH_COMMUNICATOR_H_
#define CACHALOT_KERNELS_CPU_MESH_COMMUNICATOR_H_

#include <vector>

#include "kernels/communicator.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/mesh.h"

namespace cachalot {

class MeshCommunicator : public Communicator {
 public:
  // All must outlive it.
  MeshCommunicator(Mesh* mesh, CpuDevice* device, ThreadPool* pool) : mesh_(*mesh), device_(*device), pool_(*pool) {}
  int rank() const override { return mesh_.rank(); }
  int num_ranks() const override { return mesh_.num_ranks(); }

  // Rows of a slot are in order of their rank, then of t, then of k. A slot that no rank has and more rows than there
  // is room for are faults of the device, as a mesh that was aborted is.
  void Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                const Tensor& topk_weights) override;
  void Combine(const Tensor& out, const Tensor& y, const Tensor& shared) override;

 private:
  void Pack(const Activation& x, const Tensor& topk_slots, int64_t num_slots);
  absl::Status Place(const ExpertRows& rows, const std::vector<Mesh::Bytes>& came);

  Mesh& mesh_;
  CpuDevice& device_;
  ThreadPool& pool_;
  // Of the last Dispatch.
  int64_t num_tokens_ = 0, num_choices_ = 0;
  Tensor topk_weights_;
  std::vector<int32_t> row_of_;               // [T, K] among the rows that left, by rank, then slot, t, k; or -1
  std::vector<int32_t> num_sent_;             // [ranks]
  std::vector<std::vector<int32_t>> origin_;  // [ranks] of rows that came from it, in the order in which they came
  std::vector<char> returned_;                // [rows that left, D]
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_MESH_COMMUNICATOR_H_
