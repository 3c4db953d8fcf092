// Which instruction set Highway's dynamic dispatch runs.
#ifndef CACHALOT_KERNELS_CPU_HIGHWAY_TARGETS_H_
#define CACHALOT_KERNELS_CPU_HIGHWAY_TARGETS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace cachalot {

// The name of the target that kernels run at now: "AVX3", "AVX2", "SSE4", "NEON".
std::string SimdTargetName();

// For tests: the names of all targets that this machine can run, best first, and a way to run at one of them. Not
// while kernels run.
std::vector<std::string> SupportedSimdTargets();
void ForceSimdTarget(const std::string& name);  // "": the best again

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_HIGHWAY_TARGETS_H_
