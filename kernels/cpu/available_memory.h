// AvailableMemory: what this process may still take.
#ifndef CACHALOT_KERNELS_CPU_AVAILABLE_MEMORY_H_
#define CACHALOT_KERNELS_CPU_AVAILABLE_MEMORY_H_

#include <cstddef>
#include <string>

namespace cachalot {

// Bytes: the least that is left by the machine, by each control group that the process is in or below (versions 1 and
// 2), and by its limit of address space. `root` is where /proc and /sys are looked for. Any thread.
size_t AvailableMemory(const std::string& root = "");

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_AVAILABLE_MEMORY_H_
