// What benchmarks of a GPU share: arrays on a device, and an end where something fails.
#ifndef CACHALOT_TESTS_BENCH_DEVICE_ARRAYS_H_
#define CACHALOT_TESTS_BENCH_DEVICE_ARRAYS_H_

#include <errno.h>
#include <fmt/core.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace cachalot {

// NOTE: at once: other threads may wait on a device for ever.
[[noreturn]] inline void Die(const std::string& message) {
  std::fflush(stdout);
  fmt::print(stderr, "{}: {}\n", program_invocation_short_name, message);
  std::_Exit(1);
}
inline void Must(const absl::Status& status) {
  if (!status.ok()) Die(status.ToString());
}
template <typename T>
T Must(absl::StatusOr<T> value) {
  Must(value.status());
  return *std::move(value);
}

class DeviceArrays {
 public:
  explicit DeviceArrays(Device& device) : device_(device) {}

  Tensor New(DType dtype, std::initializer_list<int64_t> dims) {  // zeros
    Tensor tensor(nullptr, dtype, dims);
    Buffer buffer = Must(device_.Allocate(std::max<int64_t>(tensor.num_bytes(), 1), Device::Memory::kDevice));
    tensor.data = buffer.data();
    buffers_.push_back(std::move(buffer));
    return tensor;
  }
  void Put(const Tensor& dst, const void* bytes) {
    const Buffer staging = Must(device_.Allocate(dst.num_bytes(), Device::Memory::kPinnedHost));
    std::memcpy(staging.data(), bytes, dst.num_bytes());
    device_.Upload(dst, staging.data());
    Finish();
  }
  template <typename T>
  std::vector<T> Get(const Tensor& src) {
    const Buffer staging = Must(device_.Allocate(src.num_bytes(), Device::Memory::kPinnedHost));
    device_.Download(staging.data(), src);
    Finish();
    const T* data = static_cast<const T*>(staging.data());
    return std::vector<T>(data, data + src.num_bytes() / sizeof(T));
  }
  void Finish() { Must(device_.Wait(device_.Record(), absl::Minutes(1))); }  // what is queued
  void Clear() { buffers_.clear(); }

 private:
  Device& device_;
  std::vector<Buffer> buffers_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_BENCH_DEVICE_ARRAYS_H_
