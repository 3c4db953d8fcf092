// The planned backend: the real verbs that make weights, on a device that has a size and nothing else.
#include "kernels/cuda/planned_backend.h"

#include <string>
#include <utility>

#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/peer_communicator.h"
#include "kernels/cuda/workspace.h"
#include "kernels/splits.h"

namespace cachalot {
namespace {

class PlannedDevice : public Device {
 public:
  explicit PlannedDevice(int64_t memory) : memory_(memory) {}
  absl::StatusOr<Buffer> Allocate(size_t, Memory) override { return Nothing(); }
  void Upload(const Tensor&, const void*) override { Nothing().IgnoreError(); }
  void Download(void*, const Tensor&) override { Nothing().IgnoreError(); }
  void Submit(const StepKey&, std::function<void()>) override { Nothing().IgnoreError(); }
  Event Record() override { return 0; }
  bool IsComplete(Event) override { return true; }
  absl::Status Wait(Event, absl::Duration) override { return Nothing(); }
  int Bucket(int n) const override { return CudaDevice::BucketOf(n); }
  size_t FreeMemory() const override { return static_cast<size_t>(memory_); }

 private:
  static absl::Status Nothing() {
    CHECK(false, "a planned device runs nothing");
    return absl::OkStatus();
  }
  const int64_t memory_;
};

class PlannedCudaBackend : public Backend {
 public:
  explicit PlannedCudaBackend(const BackendOptions& options)
      : device_(options.planned_memory),
        loader_(&stream_),
        workspace_bytes_(CudaWorkspaceBytes(options.limits, kHopperSms) +
                         CudaPeerCommunicator::DeviceBytes(options.limits)) {}
  absl::Status Start(const BackendOptions& options) {
    auto ops = CudaOps::Make(options, &device_, &stream_, &loader_);
    if (ops.ok()) ops_ = *std::move(ops);
    return ops.status();
  }
  std::string name() const override { return "cuda, planned"; }
  DType value_dtype() const override { return DType::kBF16; }
  bool is_gpu() const override { return true; }
  Device& device() override { return device_; }
  Ops& ops() override { return *ops_; }
  Communicator& communicator() override {
    CHECK(false, "a planned device has no ranks");
    std::abort();
  }
  size_t workspace_bytes() const override { return workspace_bytes_; }

 private:
  PlannedDevice device_;
  CudaStream stream_;
  WeightLoader loader_;
  std::unique_ptr<CudaOps> ops_;
  const size_t workspace_bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakePlannedCudaBackend(const BackendOptions& options) {
  auto backend = std::make_unique<PlannedCudaBackend>(options);
  if (absl::Status status = backend->Start(options); !status.ok()) return status;
  return backend;
}

}  // namespace cachalot
