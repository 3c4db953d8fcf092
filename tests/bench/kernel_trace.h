// KernelTrace: what ran on the GPU and when, by CUPTI's activity records; for benchmarks, and for any program by
// CUDA_INJECTION64_PATH=libcachalot_trace.so, which prints the summary when the program ends.
#ifndef CACHALOT_TESTS_BENCH_KERNEL_TRACE_H_
#define CACHALOT_TESTS_BENCH_KERNEL_TRACE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace cachalot::bench {

struct KernelSpan {
  std::string name;  // without its arguments
  uint64_t start_ns = 0, end_ns = 0;
};

// Records every kernel and copy from here on. False where CUPTI cannot.
bool StartTrace();
// What has been recorded since the start, by start.
std::vector<KernelSpan> StopTrace();

// By name: launches, time and share of the whole span; then the time in which nothing ran.
std::string Summary(const std::vector<KernelSpan>& spans, int num_steps);

}  // namespace cachalot::bench

#endif  // CACHALOT_TESTS_BENCH_KERNEL_TRACE_H_
