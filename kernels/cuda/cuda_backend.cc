// The CUDA backend's parts, put together; and the two functions that the library exports.
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/local_communicator.h"
#include "kernels/cuda/peer_communicator.h"
#include "kernels/cuda/planned_backend.h"
#include "kernels/cuda/weight_loader.h"
#include "kernels/cuda/workspace.h"
#include "kernels/cuda_plugin.h"

namespace cachalot {
namespace {

// NOTE: kernels are of sm_90a, which runs on compute capability 9.0 and nothing else.
constexpr int kMajor = 9, kMinor = 0;

// The ordinals of the GPUs that kernels run on; NotFound with what there is instead.
absl::StatusOr<std::vector<int>> UsableGpus() {
  // NOTE: kernels are loaded at once, not at their first launch: memory that is free at the start stays free.
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return absl::NotFoundError(absl::StrCat("the CUDA backend sees no GPU: ", cudaGetErrorString(error)));
  }
  if (count == 0) return absl::NotFoundError("the CUDA backend sees no GPU");
  std::vector<int> usable;
  std::vector<std::string> others;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, ordinal) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    if (properties.major == kMajor && properties.minor == kMinor) {
      usable.push_back(ordinal);
    } else {
      others.push_back(absl::StrFormat("%s (%d.%d)", properties.name, properties.major, properties.minor));
    }
  }
  if (!usable.empty()) return usable;
  return absl::NotFoundError(absl::StrFormat("the CUDA backend sees no GPU of compute capability %d.%d: found %s",
                                             kMajor, kMinor, absl::StrJoin(others, ", ")));
}

class CudaBackend : public Backend {
 public:
  absl::Status Start(BackendOptions options) {
    if (options.activation == ActivationFormat::kF32) options.activation = ActivationFormat::kBF16;
    const absl::StatusOr<std::vector<int>> gpus = UsableGpus();
    if (!gpus.ok()) return gpus.status();
    if (options.ordinal < 0 || options.ordinal >= static_cast<int>(gpus->size())) {
      return absl::NotFoundError(absl::StrFormat("GPU %d: the CUDA backend sees %d", options.ordinal, gpus->size()));
    }
    auto device = CudaDevice::Make((*gpus)[options.ordinal]);
    if (!device.ok()) return device.status();
    device_ = *std::move(device);
    loader_ = std::make_unique<WeightLoader>(device_->stream());
    auto ops = CudaOps::Make(options, device_.get(), device_->stream(), loader_.get());
    if (!ops.ok()) return ops.status();
    ops_ = *std::move(ops);
    if (absl::Status status = MakeCommunicator(options); !status.ok()) return status;
    workspace_bytes_ = CudaWorkspaceBytes(options.limits, device_->num_sms());
    return absl::OkStatus();
  }

  std::string name() const override {
    return absl::StrFormat("cuda (%s, %d SMs)", device_->properties().name, device_->num_sms());
  }
  DType value_dtype() const override { return DType::kBF16; }
  bool is_gpu() const override { return true; }
  Device& device() override { return *device_; }
  Ops& ops() override { return *ops_; }
  Communicator& communicator() override { return *communicator_; }
  size_t workspace_bytes() const override { return workspace_bytes_; }

 private:
  absl::Status MakeCommunicator(const BackendOptions& options) {
    const auto take = [this](auto made) {
      if (made.ok()) communicator_ = *std::move(made);
      return made.status();
    };
    if (options.mesh != nullptr) return take(CudaPeerCommunicator::Make(options, device_.get()));
    return take(CudaLocalCommunicator::Make(options.limits, device_.get(), device_->stream()));
  }

  // NOTE: destroyed from the last to the first.
  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<WeightLoader> loader_;
  std::unique_ptr<CudaOps> ops_;
  std::unique_ptr<Communicator> communicator_;
  size_t workspace_bytes_ = 0;
};

absl::StatusOr<std::unique_ptr<Backend>> MakeBackendOf(const BackendOptions& options) {
  if (options.planned_memory > 0) return MakePlannedCudaBackend(options);
  auto backend = std::make_unique<CudaBackend>();
  if (absl::Status status = backend->Start(options); !status.ok()) return status;
  return backend;
}

}  // namespace
}  // namespace cachalot

extern "C" {

__attribute__((visibility("default"))) const char* cachalot_cuda_build_id() { return cachalot::kBuildId; }

__attribute__((visibility("default"))) int cachalot_cuda_num_devices() {
  const auto gpus = cachalot::UsableGpus();
  return gpus.ok() ? static_cast<int>(gpus->size()) : 0;
}

__attribute__((visibility("default"))) cachalot::Backend* cachalot_make_cuda_backend(
    const cachalot::BackendOptions* options, int* code, char* message, size_t message_size) {
  auto backend = cachalot::MakeBackendOf(*options);
  *code = static_cast<int>(backend.status().code());
  std::snprintf(message, message_size, "%s", std::string(backend.status().message()).c_str());
  return backend.ok() ? backend->release() : nullptr;
}
}
