// What libcachalot_cuda.so exports: the CUDA backend behind three C functions, found by name at start.
#ifndef CACHALOT_KERNELS_CUDA_PLUGIN_H_
#define CACHALOT_KERNELS_CUDA_PLUGIN_H_

#include <cstddef>

#include "kernels/backend.h"

// Only plain types cross in errors.
extern "C" {

// kBuildId of the library. Where the program's differs, nothing else may be called.
const char* cachalot_cuda_build_id();

// The GPUs that this process may use; 0 when there is no driver.
int cachalot_cuda_num_devices();

// A backend that the caller owns; or null, with an absl::StatusCode and a message.
cachalot::Backend* cachalot_make_cuda_backend(const cachalot::BackendOptions* options, int* code, char* message,
                                              size_t message_size);
}

namespace cachalot {

// Of the headers that the program and the library share, as this one of the two was compiled with them.
extern const char kBuildId[];

inline constexpr char kCudaLibrary[] = "libcachalot_cuda.so";
inline constexpr char kCudaBuildIdSymbol[] = "cachalot_cuda_build_id";
inline constexpr char kCudaNumDevicesSymbol[] = "cachalot_cuda_num_devices";
inline constexpr char kCudaMakeBackendSymbol[] = "cachalot_make_cuda_backend";

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PLUGIN_H_
