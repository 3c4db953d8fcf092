// The CPU backend's parts, put together.
#include "kernels/cpu/cpu_backend.h"

#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/local_communicator.h"
#include "kernels/cpu/mesh_communicator.h"
#include "kernels/cpu/thread_pool.h"

namespace cachalot {
namespace {

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options) : value_dtype_(options.value_dtype), pool_(options.num_threads) {
    if (options.mesh != nullptr) {
      communicator_ = std::make_unique<MeshCommunicator>(options.mesh, &device_, &pool_);
    } else {
      communicator_ = std::make_unique<LocalCommunicator>(options.limits, &pool_);
    }
  }
  absl::Status Start(const BackendOptions& options) {
    absl::StatusOr<std::unique_ptr<CpuOps>> ops = CpuOps::Make(options, &device_, &pool_);
    if (!ops.ok()) return ops.status();
    ops_ = *std::move(ops);
    return absl::OkStatus();
  }

  std::string name() const override {
    return absl::StrFormat("cpu (%d threads, %s)", pool_.num_threads(), SimdTargetName());
  }
  DType value_dtype() const override { return value_dtype_; }
  Device& device() override { return device_; }
  Ops& ops() override { return *ops_; }
  Communicator& communicator() override { return *communicator_; }

 private:
  const DType value_dtype_;
  // NOTE: destroyed from the last to the first: workspace is freed into a device that is idle already.
  ThreadPool pool_;
  // The communicator is what the device's thread calls.
  std::unique_ptr<Communicator> communicator_;
  CpuDevice device_;
  std::unique_ptr<CpuOps> ops_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options) {
  auto backend = std::make_unique<CpuBackend>(options);
  if (absl::Status status = backend->Start(options); !status.ok()) return status;
  return backend;
}

}  // namespace cachalot
