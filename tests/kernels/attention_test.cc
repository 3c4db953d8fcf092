// MlaAttention against double precision, and bit for bit however rows are cut, batched and shared out.
#include <gtest/gtest.h>

#include "kernels/cpu/highway_targets.h"
#include "tests/kernels/attention_world.h"

namespace cachalot {
namespace {

using testing::AllRows;
using testing::OwnedActivation;
using testing::SameRow;
using testing::Values;
using Dims = testing::AttentionDims;
using World = testing::AttentionWorld;

constexpr Dims kV3 = {128, 128, 64, 128, 512};
constexpr Dims kSmall = {4, 32, 16, 32, 128};
constexpr Dims kUgly = {3, 20, 18, 24, 100};

class AttentionTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ForceSimdTarget(GetParam()); }
  void TearDown() override { ForceSimdTarget(""); }
};

TEST_P(AttentionTest, SmallShapesEveryType) {
  for (const Dims& dims : {kSmall, kUgly}) {
    for (KvDType kv_dtype : {KvDType::kF32, KvDType::kBF16, KvDType::kFP8}) {
      for (DType weight : {DType::kF32, DType::kBF16, DType::kF8E4M3}) {
        World world(dims, kv_dtype, weight, 4, 700);
        world.Write(0, 70);
        world.Write(1, 1);
        world.Write(2, 641);
        world.Write(3, 256);
        // A prefill chunk, a first token, decode rows across a group's border, the last key of a group.
        world.Check({{0, 61, 9}, {1, 0, 1}, {2, 510, 4}, {3, 255, 1}, {2, 640, 1}}, AllRows(16));
      }
    }
  }
}

// Of a layer whose cache has nothing at position 0, where memory may hold anything.
TEST_P(AttentionTest, WithoutTheFirstKey) {
  for (const Dims& dims : {kSmall, kUgly}) {
    for (KvDType kv_dtype : {KvDType::kF32, KvDType::kBF16, KvDType::kFP8}) {
      World world(dims, kv_dtype, DType::kBF16, 4, 700);
      world.HideKeysBelow(1);
      for (auto [slot, length] : {std::pair{0, 70}, {1, 2}, {2, 641}, {3, 256}}) world.Write(slot, length);
      world.Check({{0, 61, 9}, {1, 1, 1}, {2, 510, 4}, {3, 255, 1}, {2, 640, 1}}, AllRows(16));
      world.Check({{0, 1, 69}}, {0, 1, 62, 63, 68});
    }
  }
}

TEST_P(AttentionTest, QueriesAndResultsInOtherTypes) {
  for (ActivationFormat format : {ActivationFormat::kBF16, ActivationFormat::kFP8}) {
    for (DType weight : {DType::kBF16, DType::kF8E4M3}) {
      World world(kSmall, KvDType::kBF16, weight, 1, 300, format);
      world.Write(0, 290);
      world.Check({{0, 280, 5}}, AllRows(5), DType::kBF16);
    }
  }
}

TEST_P(AttentionTest, RealShape) {
  World world(kV3, KvDType::kF32, DType::kF8E4M3, 2, 400);
  world.Write(0, 300);
  world.Write(1, 20);
  world.Check({{0, 298, 2}, {1, 17, 3}}, {1, 4});
}

TEST_P(AttentionTest, NothingAndPadding) {
  World world(kSmall, KvDType::kF32, DType::kBF16, 1, 128);
  world.Write(0, 10);
  EXPECT_EQ(world.Attend({}).values->dim(0), 0);
  const OwnedActivation out = world.Attend({{-1, 0, 1}, {0, 9, 1}, {-1, 0, 2}});
  for (int64_t row : {0, 2, 3}) {
    EXPECT_EQ(Values(out.values->Rows(row, 1)), std::vector<double>(out.values->dim(1), 0.0));
  }
  EXPECT_TRUE(SameRow(out.values, 1, world.Attend({{0, 9, 1}}).values, 0));
}

// Chunks, company, threads and the way work is shared out change no bit.
TEST_P(AttentionTest, CutsChangeNothing) {
  for (const Dims& dims : {kSmall, kUgly}) {
    for (KvDType kv_dtype : {KvDType::kF32, KvDType::kFP8}) {
      World world(dims, kv_dtype, DType::kF8E4M3, 3, 1100);
      const int32_t n = 600;
      world.Write(0, n);
      world.Write(1, 1090);
      world.Write(2, 40);
      const OwnedActivation whole = world.Attend({{0, 0, n}});
      for (int32_t size : {1, 7, 64, 129, 255, 500}) {
        for (int32_t start = 0; start < n; start += std::max(size, 40)) {
          const int32_t count = std::min(size, n - start);
          const OwnedActivation part = world.Attend({{1, 1080, 3}, {0, start, count}, {2, 39, 1}});
          for (int32_t i = 0; i < count; ++i) {
            ASSERT_TRUE(SameRow(part.values, 3 + i, whole.values, start + i)) << size << " from " << start;
          }
        }
      }
      for (int num_threads : {1, 5}) {
        world.UseThreads(num_threads);
        EXPECT_EQ(world.Attend({{0, 0, n}}).values.bytes(), whole.values.bytes()) << num_threads;
      }
    }
  }
}

TEST_P(AttentionTest, CutsChangeNothingAtRealShape) {
  World world(kV3, KvDType::kF32, DType::kF8E4M3, 2, 600);
  world.Write(0, 530);
  world.Write(1, 3);
  const OwnedActivation whole = world.Attend({{0, 500, 30}});
  const OwnedActivation some = world.Attend({{1, 2, 1}, {0, 509, 5}}), one = world.Attend({{0, 529, 1}});
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(SameRow(some.values, 1 + i, whole.values, 9 + i));
  EXPECT_TRUE(SameRow(one.values, 0, whole.values, 29));
}

TEST_P(AttentionTest, LongestContext) {
  const Dims dims = {2, 16, 16, 16, 32};
  constexpr int32_t kContext = 163840;
  World world(dims, KvDType::kF32, DType::kBF16, 1, kContext);
  world.Write(0, kContext);
  world.Check({{0, kContext - 3, 3}}, {0, 2});
  const OwnedActivation three = world.Attend({{0, kContext - 3, 3}}), one = world.Attend({{0, kContext - 1, 1}});
  EXPECT_TRUE(SameRow(one.values, 0, three.values, 2));
}

// The GPU's oracle: pages one after the other, rounded, summed and cut as there.
TEST(AttentionOracleTest, PrefillAndDecode) {
  for (const Dims& dims : {Dims{3, 128, 64, 128, 512}, Dims{3, 10, 6, 7, 36}}) {
    for (KvDType kv_dtype : {KvDType::kBF16, KvDType::kFP8}) {
      for (ActivationFormat format : {ActivationFormat::kBF16, ActivationFormat::kFP8}) {
        World world(dims, kv_dtype, DType::kF8E4M3, 4, 2432, format);
        world.UseGpuOracle();
        for (auto [slot, length] : {std::pair{0, 1}, {1, 65}, {2, 200}, {3, 2400}}) world.Write(slot, length);
        world.Check({{1, 62, 2, true}, {2, 190, 10}, {-1, 0, 2}, {0, 0, 1, true}}, {0, 1, 2, 11, 14}, DType::kBF16);
        // These keys are cut, if the dimensions are those of the tensor cores' kernel.
        world.Check({{3, 2399, 1, true}, {2, 199, 1, true}}, {0, 1}, DType::kBF16);
        world.Check({{3, 2300, 100}}, {0, 50, 99}, DType::kBF16);
        world.HideKeysBelow(1);
        world.Check({{1, 64, 1, true}, {2, 1, 3}}, {0, 1, 3}, DType::kBF16);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest, ::testing::ValuesIn(SupportedSimdTargets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace cachalot
