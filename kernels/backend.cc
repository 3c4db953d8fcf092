// The one factory: CPU linked in, CUDA opened as a shared object.
#include "kernels/backend.h"

#include <dlfcn.h>

#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda_plugin.h"

namespace cachalot {
namespace {

struct CudaPlugin {
  decltype(&cachalot_cuda_num_devices) num_devices;
  decltype(&cachalot_make_cuda_backend) make_backend;
};

// By the loader's own search, then beside the program. NOTE: never closed: CUDA does not like to be unloaded.
absl::StatusOr<CudaPlugin> OpenCudaPlugin() {
  void* library = dlopen(kCudaLibrary, RTLD_NOW | RTLD_LOCAL);
  std::string reason = library == nullptr ? dlerror() : "";
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (library == nullptr && !error) {
    const std::string beside = program.parent_path() / kCudaLibrary;
    // The reason of a library that is there and does not open is the one worth telling.
    if (std::filesystem::exists(beside, error)) {
      library = dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library == nullptr) reason = dlerror();
    }
  }
  if (library == nullptr) return absl::NotFoundError(absl::StrCat("the CUDA backend cannot be opened: ", reason));
  CudaPlugin plugin;
  plugin.num_devices = reinterpret_cast<decltype(plugin.num_devices)>(dlsym(library, kCudaNumDevicesSymbol));
  plugin.make_backend = reinterpret_cast<decltype(plugin.make_backend)>(dlsym(library, kCudaMakeBackendSymbol));
  if (plugin.num_devices == nullptr || plugin.make_backend == nullptr) {
    return absl::NotFoundError(absl::StrCat(kCudaLibrary, " is not of this program's version: a symbol is missing"));
  }
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
  if (options.device == "auto" && (!plugin.ok() || plugin->num_devices() == 0)) return MakeCpuBackend(options);
  if (!plugin.ok()) return plugin.status();
  return MakeCudaBackend(*plugin, options);  // says why when it sees no GPU
}

}  // namespace cachalot
