// CpuDevice: order, events, uploads on the device thread, memory; and the factory.
#include "kernels/cpu/cpu_device.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/notification.h"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

constexpr Device::Memory kDevice = Device::Memory::kDevice;

TEST(CpuDevice, RunsInOrder) {
  CpuDevice device;
  Buffer memory = *device.Allocate(64, kDevice), host = *device.Allocate(64, Device::Memory::kPinnedHost);
  const Tensor tensor(memory.data(), DType::kI32, {4});
  int32_t* staged = static_cast<int32_t*>(host.data());
  int32_t results[3][4];
  // Two in flight: nothing runs ahead of what was queued before it.
  absl::Notification go;
  device.Submit({}, [&] { go.WaitForNotification(); });
  const Device::Event blocked = device.Record();
  std::iota(staged, staged + 4, 10);
  device.Upload(tensor, staged);
  device.Submit({}, [&] {
    for (int i = 0; i < 4; ++i) tensor.as<int32_t>()[i] *= 2;
  });
  device.Download(results[0], tensor);
  const Device::Event first = device.Record();
  device.Submit({}, [&] { ++tensor.as<int32_t>()[0]; });
  device.Download(results[1], tensor);
  const Device::Event second = device.Record();

  EXPECT_TRUE(device.IsComplete(0));
  EXPECT_FALSE(device.IsComplete(blocked));
  EXPECT_EQ(device.Wait(blocked, absl::Milliseconds(1)).code(), absl::StatusCode::kDeadlineExceeded);
  go.Notify();
  ASSERT_TRUE(device.Wait(second, absl::Seconds(10)).ok());
  EXPECT_TRUE(device.IsComplete(first));
  for (int i = 0; i < 4; ++i) EXPECT_EQ(results[0][i], 2 * (10 + i));
  EXPECT_EQ(results[1][0], 21);
}

TEST(CpuDevice, CopiesStridedRows) {
  CpuDevice device;
  std::vector<int32_t> matrix(5 * 4, -1), packed = {1, 2, 3, 4, 5, 6}, back(6);
  const Tensor columns = Tensor(matrix.data(), DType::kI32, {5, 4}).Rows(1, 3).Columns(1, 2);
  device.Upload(columns, packed.data());
  device.Download(back.data(), columns);
  ASSERT_TRUE(device.Wait(device.Record(), absl::Seconds(10)).ok());
  EXPECT_EQ(back, packed);
  EXPECT_EQ(matrix, (std::vector<int32_t>{-1, -1, -1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 5, 6, -1, -1, -1, -1, -1}));
}

TEST(CpuDevice, RunsABodyEveryTime) {
  CpuDevice device;
  int runs = 0;
  for (int i = 0; i < 3; ++i) device.Submit({1, 1, 1, 0}, [&] { ++runs; });
  ASSERT_TRUE(device.Wait(device.Record(), absl::Seconds(10)).ok());
  EXPECT_EQ(runs, 3);
}

TEST(CpuDevice, DrainsWhenDestroyed) {
  std::atomic<int> runs{0};
  {
    CpuDevice device;
    for (int i = 0; i < 100; ++i) device.Submit({}, [&] { ++runs; });
  }
  EXPECT_EQ(runs, 100);
}

TEST(CpuDevice, MemoryIsZeroedAlignedAndCounted) {
  CpuDevice device;
  for (size_t bytes : {size_t{1}, size_t{4096}, size_t{40} << 20}) {
    Buffer buffer = *device.Allocate(bytes, kDevice);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    EXPECT_EQ(buffer.bytes(), bytes);
    for (size_t i = 0; i < bytes; i += 997) ASSERT_EQ(static_cast<uint8_t*>(buffer.data())[i], 0);
    static_cast<uint8_t*>(buffer.data())[bytes - 1] = 1;
  }
  const size_t free = device.FreeMemory();
  EXPECT_GT(free, size_t{1} << 20);
  EXPECT_EQ(device.Allocate(free + (size_t{1} << 40), kDevice).status().code(), absl::StatusCode::kResourceExhausted);
  // What is allocated and not touched is gone all the same.
  Buffer half = *device.Allocate(free / 2, kDevice);
  EXPECT_LT(device.FreeMemory(), free - free / 4);
}

TEST(MakeBackend, ChoosesADevice) {
  BackendOptions options = testing::CpuOptions();
  options.device = "auto";
  setenv("CUDA_VISIBLE_DEVICES", "-1", /*overwrite=*/1);  // the CPU, that is
  const auto automatic = MakeBackend(options);
  ASSERT_TRUE(automatic.ok()) << automatic.status();
  options.device = "cpu";
  const auto cpu = MakeBackend(options);
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  EXPECT_EQ((*cpu)->name().rfind("cpu (2 threads, ", 0), 0u) << (*cpu)->name();
  EXPECT_EQ((*cpu)->communicator().num_ranks(), 1);
  options.device = "tpu";
  EXPECT_EQ(MakeBackend(options).status().code(), absl::StatusCode::kInvalidArgument);
}

// Whoever has been told may free what was named to the device.
TEST(CpuDevice, TellsAFaultWhenNothingRunsAnyMore) {
  CpuDevice device;
  absl::Notification go;
  bool has_ended = false, is_run = false;
  device.Submit({}, [] {});
  const Device::Event before = device.Record();
  ASSERT_TRUE(device.Wait(before, absl::Minutes(1)).ok());
  device.Submit({}, [&] {
    device.Fail(absl::AbortedError("a peer is gone"));
    device.Fail(absl::AbortedError("a later reason"));
    go.WaitForNotification();
    has_ended = true;
  });
  device.Submit({}, [&] { is_run = true; });
  const Device::Event event = device.Record();
  EXPECT_TRUE(absl::IsDeadlineExceeded(device.Wait(event, absl::Milliseconds(20))));
  go.Notify();
  EXPECT_EQ(device.Wait(event, absl::Minutes(1)), absl::InternalError("a peer is gone"));
  EXPECT_TRUE(has_ended);
  EXPECT_FALSE(is_run);
  EXPECT_EQ(device.Wait(before, absl::Minutes(1)), absl::InternalError("a peer is gone"));
}

// Where the library was built, it opens: all its symbols are found in this program.
TEST(MakeBackend, SaysWhenCudaIsNotThere) {
  BackendOptions options = testing::CpuOptions();
  options.device = "cuda";
  setenv("CUDA_VISIBLE_DEVICES", "-1", /*overwrite=*/1);
  const auto backend = MakeBackend(options);
  ASSERT_FALSE(backend.ok()) << (*backend)->name();
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kNotFound) << backend.status();
#ifdef CACHALOT_HAS_CUDA_LIBRARY
  const std::string expected = "the CUDA backend sees no GPU";
#else
  const std::string expected = "the CUDA backend cannot be opened";
#endif
  EXPECT_NE(backend.status().message().find(expected), std::string::npos) << backend.status();
}

}  // namespace
}  // namespace cachalot
