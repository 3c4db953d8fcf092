// The one factory: CPU linked in, CUDA opened as a shared object.
#include "kernels/backend.h"

#include <dlfcn.h>

#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda_plugin.h"

namespace cachalot {
namespace {

struct CudaPlugin {
  decltype(&cachalot_cuda_num_devices) num_devices;
  decltype(&cachalot_make_cuda_backend) make_backend;
};

// By the loader's own search, then beside the program; null where it is in neither place or does not open. NOTE: never
// closed: CUDA does not like to be unloaded.
void* OpenLibrary(std::string* reason) {
  void* library = dlopen(kCudaLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) return library;
  *reason = dlerror();
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return nullptr;
  // The reason of a library that is there and does not open is the one worth telling.
  const std::string beside = program.parent_path() / kCudaLibrary;
  if (!std::filesystem::exists(beside, error)) return nullptr;
  library = dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) *reason = dlerror();
  return library;
}

absl::Status AnotherBuild(const std::string& why) {
  return absl::FailedPreconditionError(
      absl::StrCat(kCudaLibrary, " is of another build than this program (", why, "): install the two together"));
}

// NotFound when there is none; FailedPrecondition when it does not belong to this program.
absl::StatusOr<CudaPlugin> OpenCudaPlugin() {
  std::string reason;
  void* library = OpenLibrary(&reason);
  if (library == nullptr && absl::StrContains(reason, "undefined symbol")) return AnotherBuild(reason);
  if (library == nullptr) return absl::NotFoundError(absl::StrCat("the CUDA backend cannot be opened: ", reason));
  const auto build_id = reinterpret_cast<decltype(&cachalot_cuda_build_id)>(dlsym(library, kCudaBuildIdSymbol));
  if (build_id == nullptr) return AnotherBuild("it has no id");
  if (std::string_view(build_id()) != kBuildId) return AnotherBuild(absl::StrCat(build_id(), ", not ", kBuildId));
  CudaPlugin plugin;
  plugin.num_devices = reinterpret_cast<decltype(plugin.num_devices)>(dlsym(library, kCudaNumDevicesSymbol));
  plugin.make_backend = reinterpret_cast<decltype(plugin.make_backend)>(dlsym(library, kCudaMakeBackendSymbol));
  CHECK(plugin.num_devices != nullptr && plugin.make_backend != nullptr);
  return plugin;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaPlugin& plugin, const BackendOptions& options) {
  int code = static_cast<int>(absl::StatusCode::kUnknown);
  char message[1024] = "";
  std::unique_ptr<Backend> backend(plugin.make_backend(&options, &code, message, sizeof(message)));
  if (backend == nullptr) return absl::Status(static_cast<absl::StatusCode>(code), message);
  return backend;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const BackendOptions& options) {
  if (options.device == "cpu") return MakeCpuBackend(options);
  if (options.device != "auto" && options.device != "cuda") {
    return absl::InvalidArgumentError(absl::StrCat("device '", options.device, "' is none of auto, cpu, cuda"));
  }
  const absl::StatusOr<CudaPlugin> plugin = OpenCudaPlugin();
  if (absl::IsFailedPrecondition(plugin.status())) return plugin.status();
  if (options.device == "auto" && (!plugin.ok() || plugin->num_devices() == 0)) return MakeCpuBackend(options);
  if (!plugin.ok()) return plugin.status();
  return MakeCudaBackend(*plugin, options);  // says why when it sees no GPU
}

}  // namespace cachalot
