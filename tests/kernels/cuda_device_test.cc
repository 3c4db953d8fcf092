// CudaDevice: replayed graphs, what does not fit, and a fault that is reported once and for good.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

constexpr Device::Memory kDevice = Device::Memory::kDevice;

class CudaDeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    BackendOptions options = testing::CpuOptions();
    options.device = "cuda";
    auto backend = MakeBackend(options);
    if (!backend.ok() && !std::filesystem::exists("/dev/nvidiactl")) GTEST_SKIP() << "no GPU: did not run";
    ASSERT_TRUE(backend.ok()) << "a driver, but no backend: " << backend.status();
    backend_ = *std::move(backend);
  }
  Device& device() { return backend_->device(); }
  std::unique_ptr<Backend> backend_;
};

// To the rounding of a dozen allocations. Weights without data: nothing is copied.
TEST_F(CudaDeviceTest, ADryRunSaysWhatWeightsTake) {
  const auto part = [](DType dtype, int64_t rows, int64_t cols) {
    const Tensor scale =
        dtype != DType::kF8E4M3 ? Tensor() : Tensor(nullptr, DType::kF32, {(rows + 127) / 128, (cols + 127) / 128});
    return WeightPart{Tensor(nullptr, dtype, {rows, cols}), scale};
  };
  Ops& ops = backend_->ops();
  ASSERT_TRUE(ops.FinishWeights().ok()) << "workspace is made by the first";
  std::vector<std::unique_ptr<Weight>> weights;
  const auto make = [&] {
    weights.push_back(ops.MakeVector(Tensor(nullptr, DType::kF32, {7168})));
    weights.push_back(ops.MakeLinear({part(DType::kBF16, 4096, 7001), part(DType::kBF16, 100, 7001)}));
    weights.push_back(ops.MakeLinear({part(DType::kF8E4M3, 8192, 4096)}));
    const std::vector<WeightPart> expert = {part(DType::kF8E4M3, 512, 4096), part(DType::kF8E4M3, 512, 4096)};
    weights.push_back(ops.MakeExperts({expert, expert, expert, expert}));
    weights.push_back(ops.MakeKvUp(part(DType::kBF16, 128 * 256, 512), 128, 128, 128));
  };
  const int64_t before = static_cast<int64_t>(device().FreeMemory());
  const int64_t measured = ops.MeasureWeights(make);
  EXPECT_EQ(static_cast<int64_t>(device().FreeMemory()), before) << "a dry run allocates nothing";
  weights.clear();
  make();
  ASSERT_TRUE(ops.FinishWeights().ok());
  const int64_t taken = before - static_cast<int64_t>(device().FreeMemory());
  EXPECT_GT(taken, int64_t{100} << 20);
  EXPECT_NEAR(static_cast<double>(taken), static_cast<double>(measured), 12 << 20);
}

// A prepared body with its copies is replayed: it takes what pinned memory holds by then, and runs no code of ours.
TEST_F(CudaDeviceTest, ReplaysWhatWasPrepared) {
  constexpr int64_t kRows = 5, kCols = 300;
  Buffer x = *device().Allocate(kRows * kCols * 4, kDevice), y = *device().Allocate(kRows * kCols * 4, kDevice);
  Buffer rows = *device().Allocate(kRows * 4, kDevice);
  Buffer in = *device().Allocate(kRows * kCols * 4, Device::Memory::kPinnedHost);
  Buffer out = *device().Allocate(kRows * kCols * 4, Device::Memory::kPinnedHost);
  const Tensor from(x.data(), DType::kF32, {kRows, kCols}), to(y.data(), DType::kF32, {kRows, kCols});
  const Tensor row_token(rows.data(), DType::kI32, {kRows});  // zeros: every row is row 0
  int runs = 0;
  const auto body = [&] {
    ++runs;
    device().Upload(from, in.data());
    backend_->ops().GatherRows(Activation{to, Tensor()}, Activation{from, Tensor()}, row_token);
    device().Download(out.data(), to);
  };
  const StepKey key = {static_cast<int32_t>(kRows), 1, 1, 7};
  ASSERT_TRUE(device().Prepare(key, body).ok());
  EXPECT_EQ(device().NumKernels(key), 3) << "the rows, and a copy before and after";
  const int prepared = runs;
  for (float value : {1.0f, 2.0f, 3.0f}) {
    std::fill_n(static_cast<float*>(in.data()), kRows * kCols, value);
    device().Submit(key, body);
    ASSERT_TRUE(device().Wait(device().Record(), absl::Seconds(10)).ok());
    for (int64_t i = 0; i < kRows * kCols; ++i) ASSERT_EQ(static_cast<float*>(out.data())[i], value);
  }
  EXPECT_EQ(runs, prepared);
  device().Submit({1, 1, 1, 8}, body);  // not prepared: runs as it is
  ASSERT_TRUE(device().Wait(device().Record(), absl::Seconds(10)).ok());
  EXPECT_EQ(runs, prepared + 1);
  StepKey long_chunk = key;
  long_chunk.long_chunks = {.min_rows = 1, .first_row = 0, .other_rows = 0, .num_keys = 128};
  device().Submit(long_chunk, body);  // nor this
  ASSERT_TRUE(device().Wait(device().Record(), absl::Seconds(10)).ok());
  EXPECT_EQ(runs, prepared + 2);
}

// Small and large, at any address, and columns of a wider matrix; what lies beside them stays.
TEST_F(CudaDeviceTest, CopiesEverySize) {
  constexpr int64_t kBytes = 1 << 20, kGuard = 64;
  Buffer memory = *device().Allocate(kBytes + 2 * kGuard, kDevice);
  Buffer in = *device().Allocate(kBytes + kGuard, Device::Memory::kPinnedHost);
  Buffer out = *device().Allocate(kBytes + 2 * kGuard, Device::Memory::kPinnedHost);
  auto* const source = static_cast<uint8_t*>(in.data());
  auto* const result = static_cast<uint8_t*>(out.data());
  for (int64_t i = 0; i < kBytes + kGuard; ++i) source[i] = static_cast<uint8_t>(1 + i % 251);
  const auto bytes_at = [&](int64_t offset, int64_t count) {
    return Tensor(static_cast<uint8_t*>(memory.data()) + offset, DType::kU8, {count});
  };
  for (const int64_t count : {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{4100}, int64_t{256 << 10}, kBytes}) {
    for (const int64_t offset : {0, 1, 4, 16}) {
      std::fill_n(result, kBytes + 2 * kGuard, 0);
      device().Upload(bytes_at(0, kBytes + 2 * kGuard), result);
      device().Upload(bytes_at(kGuard + offset, count), source + offset);
      device().Download(result + offset, bytes_at(kGuard, offset + count + 1));
      ASSERT_TRUE(device().Wait(device().Record(), absl::Seconds(10)).ok());
      ASSERT_TRUE(std::equal(source + offset, source + offset + count, result + 2 * offset))
          << count << " at " << offset;
      ASSERT_EQ(result[2 * offset + count], 0) << count << " at " << offset;
    }
  }
  const Tensor wide(memory.data(), DType::kU8, {7, 40});
  device().Upload(wide.Columns(8, 17), source);
  device().Download(result, wide.Columns(8, 17));
  ASSERT_TRUE(device().Wait(device().Record(), absl::Seconds(10)).ok());
  EXPECT_TRUE(std::equal(source, source + 7 * 17, result));
}

TEST_F(CudaDeviceTest, SaysWhatDoesNotFit) {
  const auto buffer = device().Allocate(size_t{1} << 50, kDevice);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted) << buffer.status();
  EXPECT_TRUE(device().Allocate(1 << 20, kDevice).ok()) << "and goes on";
  EXPECT_TRUE(device().Wait(device().Record(), absl::Seconds(10)).ok());
}

// In a process of its own: a context does not survive it.
TEST_F(CudaDeviceTest, AFaultIsFinal) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto fault = [this] {
    Buffer y = *device().Allocate(4096, kDevice), rows = *device().Allocate(64, kDevice);
    const Tensor nowhere(reinterpret_cast<void*>(uintptr_t{4096}), DType::kF32, {1, 16});
    backend_->ops().GatherRows(Activation{Tensor(y.data(), DType::kF32, {1, 16}), Tensor()},
                               Activation{nowhere, Tensor()}, Tensor(rows.data(), DType::kI32, {1}));
    const absl::Status first = device().Wait(device().Record(), absl::Seconds(10));
    const absl::Status second = device().Wait(device().Record(), absl::Seconds(10));
    std::fprintf(stderr, "%s\n", first.ToString().c_str());
    std::_Exit(first.code() == absl::StatusCode::kInternal && second == first ? 42 : 1);
  };
  EXPECT_EXIT(fault(), ::testing::ExitedWithCode(42), "INTERNAL.*illegal");
}

}  // namespace
}  // namespace cachalot
