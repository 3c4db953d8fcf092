// What the GPU at hand can do at most, measured in the run whose figures are compared with it.
#ifndef CACHALOT_TESTS_BENCH_CUDA_CEILINGS_H_
#define CACHALOT_TESTS_BENCH_CUDA_CEILINGS_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace cachalot::bench {

struct Ceilings {
  double read_bytes_per_s = 0;  // 8 GB by 16-byte loads
  double bf16_flops_per_s = 0;  // 8192 x 8192 x 8192 by cuBLASLt
};

std::string GpuName();  // "NVIDIA H200, driver 13.0"
// On random data, medians of ten. Takes 8 GB of device memory while it runs.
Ceilings MeasureCeilings();

// Random bytes that are finite as what they stand for.
void FillNormalBf16(void* data, int64_t count, uint32_t seed, float deviation);
// Cache entries of 656 bytes: e4m3 latents, their scales, bf16 rotated keys.
void FillFp8Entries(void* data, int64_t entries, uint32_t seed);

}  // namespace cachalot::bench

#endif  // CACHALOT_TESTS_BENCH_CUDA_CEILINGS_H_
