// cuda_kernels_test runs the tests of the verbs on the CUDA backend. Without a GPU every test says that it did not run;
// where there is a driver but no backend every test fails.
#include <algorithm>
#include <filesystem>
#include <string>
#include <system_error>

#include "tests/kernels/on_device.h"
#include "tests/kernels/testing.h"

namespace cachalot::testing {
namespace {

constexpr char kDriver[] = "/dev/nvidiactl";

BackendOptions CudaOptions(BackendOptions options) {
  options.device = "cuda";
  if (options.activation == ActivationFormat::kF32) options.activation = ActivationFormat::kBF16;
  // Some tests of sampling draw for many sequences at once.
  options.limits.max_sequences = std::max(options.limits.max_sequences, 1024);
  options.limits.max_rows = std::max(options.limits.max_rows, 4096);
  return options;
}

// Whether there is a GPU to run on, and if not, why.
struct Gpu {
  bool is_there = false;
  bool has_driver = false;
  std::string reason;
};

const Gpu& TheGpu() {
  static const Gpu gpu = [] {
    const absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend(CudaOptions(CpuOptions()));
    std::error_code error;
    return Gpu{backend.ok(), std::filesystem::exists(kDriver, error), backend.status().ToString()};
  }();
  return gpu;
}

// NOTE: what is found when a test starts keeps its body from running.
class GpuCheck : public ::testing::EmptyTestEventListener {
 public:
  void OnTestStart(const ::testing::TestInfo&) override {
    const Gpu& gpu = TheGpu();
    if (gpu.is_there) return;
    if (gpu.has_driver) GTEST_FAIL() << "there is a driver, but no CUDA backend: " << gpu.reason;
    GTEST_SKIP() << "no GPU: did not run";
  }
};

[[maybe_unused]] const bool is_checked = [] {
  ::testing::UnitTest::GetInstance()->listeners().Append(new GpuCheck);
  return true;
}();

}  // namespace

// NOTE: fixtures are made before a test is kept from running, so without a GPU there is nothing to report here.
std::unique_ptr<Backend> MakeTestBackend(const BackendOptions& options) {
  return TheGpu().is_there ? MakeOnDevice(CudaOptions(options)) : nullptr;
}
bool TestsOnGpu() { return true; }
std::vector<std::string> TestTargets() { return {"cuda"}; }
void UseTarget(const std::string&) {}

}  // namespace cachalot::testing
