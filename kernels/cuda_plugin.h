// What libcachalot_cuda.so exports: the CUDA backend behind two C functions, found by name at start.
#ifndef CACHALOT_KERNELS_CUDA_PLUGIN_H_
#define CACHALOT_KERNELS_CUDA_PLUGIN_H_

#include <cstddef>

#include "kernels/backend.h"

// Both are built from the same tree as the program that opens them; only plain types cross in errors.
extern "C" {

// The GPUs that this process may use; 0 when there is no driver.
int cachalot_cuda_num_devices();

// A backend that the caller owns; or null, with an absl::StatusCode and a message.
cachalot::Backend* cachalot_make_cuda_backend(const cachalot::BackendOptions* options, int* code, char* message,
                                              size_t message_size);
}

namespace cachalot {

inline constexpr char kCudaLibrary[] = "libcachalot_cuda.so";
inline constexpr char kCudaNumDevicesSymbol[] = "cachalot_cuda_num_devices";
inline constexpr char kCudaMakeBackendSymbol[] = "cachalot_make_cuda_backend";

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_PLUGIN_H_
