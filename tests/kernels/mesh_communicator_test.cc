// MeshCommunicator: what one rank would compute, bit for bit, on several; and faults where a rank is gone.
#include "kernels/cpu/mesh_communicator.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::Owned;
using testing::Random;
using testing::SameRow;

constexpr int kSlots = 8, kRanks = 4, kLocal = kSlots / kRanks;
constexpr int64_t kChoices = 3, kCols = 256, kCapacity = 200;

std::vector<int32_t> RandomSlots(int64_t rows, Random& random) {
  std::vector<int32_t> slots(rows * kChoices);
  for (int64_t t = 0; t < rows; ++t) {
    const int32_t first = random.Below(kSlots);
    for (int64_t k = 0; k < kChoices; ++k) {
      slots[t * kChoices + k] = t % 5 == 4 ? -1 : (first + static_cast<int32_t>(k) * 2) % kSlots;
    }
  }
  return slots;
}

// A rank's part: its tokens, where they go, and what comes back.
struct Part {
  Part(int64_t rows, DType dtype, Random& random)
      : x(dtype, {rows, kCols}),
        shared(dtype, {rows, kCols}),
        out(dtype, {rows, kCols}),
        topk_slots(DType::kI32, {rows, kChoices}),
        weights(DType::kF32, {rows, kChoices}) {
    x.FillNormal(random);
    shared.FillNormal(random);
    weights.FillNormal(random);
    topk_slots.Set(RandomSlots(rows, random));
  }
  Owned x, shared, out, topk_slots, weights;
};

// Every "expert" g makes (g + 1) * x: each row's values depend on its slot alone.
void Compute(const Tensor& y, const Tensor& x, const Tensor& offsets, int first_slot) {
  for (int64_t g = 0; g + 1 < offsets.dim(0); ++g) {
    for (int32_t row = offsets.as<int32_t>()[g]; row < offsets.as<int32_t>()[g + 1]; ++row) {
      for (int64_t c = 0; c < y.dim(1); ++c) {
        testing::SetElement(y, row, c, (first_slot + g + 1) * testing::Element(x, row, c));
      }
    }
  }
}

void RunLayer(Communicator& communicator, Part& part, int num_local, int first_slot, bool has_shared) {
  Owned rows(part.x->dtype, {kCapacity, kCols}), y(part.x->dtype, {kCapacity, kCols}),
      offsets(DType::kI32, {num_local + 1});
  communicator.Dispatch({Activation{rows, Tensor()}, offsets}, Activation{part.x, Tensor()}, part.topk_slots,
                        part.weights);
  Compute(y, rows, offsets, first_slot);
  communicator.Combine(part.out, y, has_shared ? *part.shared : Tensor());
}

TEST(MeshCommunicator, SumsAreThoseOfOneRank) {
  Random random(3);
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (bool has_shared : {true, false}) {
      // Uneven: the second rank has nothing, and computes for the others.
      std::vector<Part> parts;
      for (int64_t rows : {13, 0, 1, 40}) parts.emplace_back(rows, dtype, random);
      auto ranks = MakeThreadMesh(kRanks);
      std::vector<std::thread> threads;
      for (int r = 0; r < kRanks; ++r) {
        threads.emplace_back([&, r] {
          ThreadPool pool(1);
          CpuDevice device;
          MeshCommunicator communicator(ranks[r].get(), &device, &pool);
          EXPECT_EQ(communicator.rank(), r);
          for (int layer = 0; layer < 3; ++layer) {
            RunLayer(communicator, parts[r], kLocal, r * kLocal, has_shared);
          }
          EXPECT_TRUE(device.Wait(device.Record(), absl::Minutes(1)).ok());
        });
      }
      for (std::thread& thread : threads) thread.join();
      const auto alone = testing::MakeTestBackend(testing::CpuOptions());
      for (Part& part : parts) {
        const int64_t rows = part.x->dim(0);
        Owned out(dtype, {rows, kCols});
        std::swap(out, part.out);
        RunLayer(alone->communicator(), part, kSlots, 0, has_shared);
        for (int64_t t = 0; t < rows; ++t) EXPECT_TRUE(SameRow(out, t, part.out, t));
      }
    }
  }
}

TEST(MeshCommunicator, ScalesTravelWithTheirRows) {
  Random random(4);
  auto ranks = MakeThreadMesh(2);
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      ThreadPool pool(1);
      CpuDevice device;
      MeshCommunicator communicator(ranks[r].get(), &device, &pool);
      Owned values(DType::kF8E4M3, {2, kCols}), scales(DType::kF32, {2, kCols / kQuantGroup});
      Owned rows(DType::kF8E4M3, {8, kCols}), row_scales(DType::kF32, {8, kCols / kQuantGroup});
      Owned slots(DType::kI32, {2, 1}), weights(DType::kF32, {2, 1}), offsets(DType::kI32, {2});
      std::memset(values->data, 16 + r, values->num_bytes());
      for (int i = 0; i < 4; ++i) scales.data<float>()[i] = static_cast<float>(10 * r + i);
      slots.Set(std::vector<int32_t>{1, 0});  // the first token to rank 1, the second to rank 0
      communicator.Dispatch({Activation{rows, row_scales}, offsets}, Activation{values, scales}, slots, weights);
      EXPECT_EQ(offsets.data<int32_t>()[1], 2);
      const int token = r == 1 ? 0 : 1;
      for (int from = 0; from < 2; ++from) {
        EXPECT_EQ(*static_cast<const uint8_t*>(rows->Rows(from, 1).data), 16 + from);
        for (int i = 0; i < 2; ++i) {
          EXPECT_EQ(row_scales.data<float>()[2 * from + i], static_cast<float>(10 * from + 2 * token + i));
        }
      }
      Owned y(DType::kF32, {8, kCols}), out(DType::kF32, {2, kCols});
      communicator.Combine(out, y, Tensor());
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(MeshCommunicator, ARankThatIsGoneIsAFault) {
  Random random(5);
  auto ranks = MakeThreadMesh(2);
  ThreadPool pool(1);
  CpuDevice device;
  MeshCommunicator communicator(ranks[0].get(), &device, &pool);
  Part part(6, DType::kF32, random);
  device.Submit({}, [&] { RunLayer(communicator, part, kSlots / 2, 0, true); });
  bool is_run = false;
  device.Submit({}, [&] { is_run = true; });
  const Device::Event event = device.Record();
  EXPECT_TRUE(absl::IsDeadlineExceeded(device.Wait(event, absl::Milliseconds(1))));
  ranks[1]->Abort(absl::AbortedError("rank 1: out of memory"));
  EXPECT_EQ(device.Wait(event, absl::Minutes(1)), absl::InternalError("rank 1: out of memory"));
  EXPECT_EQ(device.Wait(device.Record(), absl::Minutes(1)), absl::InternalError("rank 1: out of memory"));
  EXPECT_FALSE(is_run);
}

TEST(MeshCommunicator, MoreRowsThanThereIsRoomForAreAFault) {
  auto ranks = MakeThreadMesh(1);
  ThreadPool pool(1);
  CpuDevice device;
  MeshCommunicator communicator(ranks[0].get(), &device, &pool);
  Owned x(DType::kF32, {3, 8}), rows(DType::kF32, {2, 8}), slots(DType::kI32, {3, 1}), weights(DType::kF32, {3, 1}),
      offsets(DType::kI32, {2});
  slots.Set(std::vector<int32_t>{0, 0, 0});
  communicator.Dispatch({Activation{rows, Tensor()}, offsets}, Activation{x, Tensor()}, slots, weights);
  EXPECT_EQ(device.Wait(device.Record(), absl::Minutes(1)), absl::InternalError("3 rows for experts, room for 2"));
}

}  // namespace
}  // namespace cachalot
