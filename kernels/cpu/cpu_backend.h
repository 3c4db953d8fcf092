// The CPU backend: device thread, pool, verbs and the communicator of one rank.
#ifndef CACHALOT_KERNELS_CPU_CPU_BACKEND_H_
#define CACHALOT_KERNELS_CPU_CPU_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace cachalot {

// ResourceExhausted when the workspace for options.limits does not fit.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const BackendOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_CPU_BACKEND_H_
