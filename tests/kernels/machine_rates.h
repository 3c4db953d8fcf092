// What the machine can do at best, to set a kernel's rate beside.
#ifndef CACHALOT_TESTS_KERNELS_MACHINE_RATES_H_
#define CACHALOT_TESTS_KERNELS_MACHINE_RATES_H_

#include <cstdint>

namespace cachalot::testing {

// Reads whole vectors and does nothing else; returns something that depends on them. `bytes` is a multiple of 4096.
float ReadAll(const uint8_t* data, int64_t bytes);

// `loops` times sixteen independent fused multiply-adds of whole vectors; returns how many floating-point operations
// that was.
double MultiplyAdd(int64_t loops);

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_MACHINE_RATES_H_
