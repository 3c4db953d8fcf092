// MlaAttention of the CUDA backend against double precision: bf16 queries, both caches, decode and prefill.
#include <gtest/gtest.h>

#include <cstdio>
#include <limits>
#include <memory>
#include <tuple>

#include "tests/kernels/attention_world.h"

namespace cachalot {
namespace {

using testing::AllRows;
using testing::AttentionWorld;
using testing::Chunk;
using testing::OwnedActivation;
using testing::SameRow;
using Dims = testing::AttentionDims;

// 128 heads; what a rank of eight has; an odd number; smaller heads.
constexpr Dims kDims[] = {{128, 128, 64, 128, 512}, {16, 128, 64, 128, 512}, {5, 128, 64, 128, 512},
                          {5, 32, 64, 32, 512},     {3, 10, 6, 7, 36},       {5, 32, 16, 32, 128},
                          {2, 40, 100, 24, 600}};  // these without tensor cores

// Contexts around a page's border, and one of many pages of which the last is partly filled. Slots in this order.
constexpr int32_t kContexts[] = {1, 63, 64, 65, 700};
constexpr int32_t kNumSlots = 5;

// The first, middle and last row of every chunk that is not padding.
std::vector<int64_t> SomeRows(const std::vector<Chunk>& chunks) {
  std::vector<int64_t> rows;
  int64_t first = 0;
  for (const Chunk& chunk : chunks) {
    if (chunk.slot >= 0) {
      rows.push_back(first);
      if (chunk.count > 2) rows.push_back(first + chunk.count / 2);
      if (chunk.count > 1) rows.push_back(first + chunk.count - 1);
    }
    first += chunk.count;
  }
  return rows;
}

using Case = std::tuple<Dims, KvDType, ActivationFormat>;

class CudaAttentionTest : public ::testing::TestWithParam<Case> {
 protected:
  static std::unique_ptr<AttentionWorld> MakeWorld(DType weight = DType::kF8E4M3) {
    const auto [dims, kv_dtype, format] = GetParam();
    auto world = std::make_unique<AttentionWorld>(dims, kv_dtype, weight, kNumSlots, 768, format);
    for (int32_t slot = 0; slot < kNumSlots; ++slot) world->Write(slot, kContexts[slot]);
    return world;
  }
};

// One to four rows a sequence, as with no draft up to three.
TEST_P(CudaAttentionTest, Decode) {
  const auto world = MakeWorld();
  const std::vector<Chunk> chunks = {
      {0, 0, 1, true}, {1, 62, 1, true}, {2, 62, 2, true}, {3, 62, 3, true}, {4, 696, 4, true}};
  world->Check(chunks, AllRows(11), DType::kBF16);
  for (int32_t slot = 0; slot < kNumSlots; ++slot) {
    world->Check({{slot, kContexts[slot] - 1, 1, true}}, {0}, DType::kBF16);
  }
}

// Sequences that are not there, between and after those that are.
TEST_P(CudaAttentionTest, DecodeWithPadding) {
  const auto world = MakeWorld(DType::kBF16);
  const std::vector<Chunk> chunks = {{4, 699, 1, true}, {-1, 0, 1, true}, {2, 63, 1, true}, {-1, 0, 5, true}};
  world->Check(chunks, {0, 2}, DType::kBF16);
  world->Attend({{-1, 0, 3, true}}, DType::kBF16);
}

TEST_P(CudaAttentionTest, NoRows) { EXPECT_EQ(MakeWorld(DType::kBF16)->Attend({}, DType::kBF16).values->dim(0), 0); }

TEST_P(CudaAttentionTest, Prefill) {
  const auto world = MakeWorld();
  for (const std::vector<Chunk>& chunks :
       {std::vector<Chunk>{{3, 0, 65}, {4, 613, 87}, {1, 5, 58}, {2, 0, 64}, {0, 0, 1}, {-1, 0, 3}},
        std::vector<Chunk>{{4, 0, 129}}, std::vector<Chunk>{{4, 64, 64}, {3, 64, 1}}}) {
    world->Check(chunks, SomeRows(chunks), DType::kBF16);
  }
}

// A step of both kinds, prefill between decodes.
TEST_P(CudaAttentionTest, PrefillAndDecode) {
  const auto world = MakeWorld();
  const std::vector<Chunk> chunks = {{1, 62, 1, true}, {4, 600, 70}, {3, 63, 2, true}, {2, 1, 33}, {0, 0, 1, true}};
  world->Check(chunks, SomeRows(chunks), DType::kBF16);
}

// Of a layer whose cache has nothing at position 0, where memory may hold anything.
TEST_P(CudaAttentionTest, WithoutTheFirstKey) {
  const auto [dims, kv_dtype, format] = GetParam();
  AttentionWorld world(dims, kv_dtype, DType::kBF16, 3, 700, format);
  world.HideKeysBelow(1);
  for (auto [slot, length] : {std::pair{0, 2}, {1, 65}, {2, 700}}) world.Write(slot, length);
  const std::vector<Chunk> chunks = {{2, 699, 1, true}, {-1, 0, 1, true}, {1, 64, 1, true}, {0, 1, 1, true}};
  world.Check(chunks, {0, 2, 3}, DType::kBF16);
  world.Check({{1, 1, 64}}, {0, 1, 62, 63}, DType::kBF16);
}

std::string CaseName(const ::testing::TestParamInfo<Case>& info) {
  const auto [dims, kv_dtype, format] = info.param;
  return std::to_string(dims.heads) + "x" + std::to_string(dims.value) + "_of_" + std::to_string(dims.latent) +
         (kv_dtype == KvDType::kFP8 ? "_fp8_cache" : "_bf16_cache") +
         (format == ActivationFormat::kFP8 ? "_fp8" : "_bf16");
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaAttentionTest,
                         ::testing::Combine(::testing::ValuesIn(kDims),
                                            ::testing::Values(KvDType::kBF16, KvDType::kFP8),
                                            ::testing::Values(ActivationFormat::kBF16, ActivationFormat::kFP8)),
                         CaseName);

// One after the other in one process: what a kernel needs of a device it needs of each.
TEST(CudaEveryGpuTest, Attends) {
  AttentionWorld world({16, 128, 64, 128, 512}, KvDType::kBF16, DType::kF8E4M3, 2, 400, ActivationFormat::kFP8);
  world.Write(0, 300);
  world.Write(1, 70);
  int num_gpus = 0;
  for (; world.UseGpu(num_gpus); ++num_gpus) {
    world.UseLongChunks(std::numeric_limits<int32_t>::max());
    world.Check({{0, 298, 2, true}, {1, 69, 1, true}}, AllRows(3), DType::kBF16);
    world.UseLongChunks(64);
    world.Check({{1, 6, 64}}, {0, 63}, DType::kBF16);
  }
  std::printf("[ measured ] attends on %d GPUs\n", num_gpus);
  EXPECT_GE(num_gpus, 1);
}

// What the CPU's oracle says, bit for bit: keys whole, and cut into splits, by rows that see all of them or a part.
TEST(CudaAttentionOracleTest, SameBits) {
  const std::vector<std::vector<Chunk>> steps = {
      {{1, 62, 2, true}, {2, 190, 10}, {-1, 0, 2}, {0, 0, 1, true}, {3, 0, 70}},
      {{4, 698, 2, true}},
      {{1, 64, 1, true}, {-1, 0, 1, true}, {4, 600, 70}, {4, 699, 1, true}, {5, 2399, 1, true}}};
  for (const Dims& dims : {Dims{16, 128, 64, 128, 512}, Dims{5, 32, 64, 32, 512}}) {
    for (KvDType kv_dtype : {KvDType::kBF16, KvDType::kFP8}) {
      for (ActivationFormat format : {ActivationFormat::kBF16, ActivationFormat::kFP8}) {
        AttentionWorld world(dims, kv_dtype, DType::kF8E4M3, 6, 2432, format);
        for (auto [slot, length] : {std::pair{0, 1}, {1, 65}, {2, 200}, {3, 70}, {4, 700}, {5, 2400}}) {
          world.Write(slot, length);
        }
        world.UseExact();
        std::vector<OwnedActivation> got;
        for (const std::vector<Chunk>& chunks : steps) got.push_back(world.Attend(chunks, DType::kBF16));
        world.UseGpuOracle();
        for (size_t i = 0; i < steps.size(); ++i) {
          const OwnedActivation want = world.Attend(steps[i], DType::kBF16);
          int64_t t = 0;
          for (const Chunk& chunk : steps[i]) {
            for (int64_t end = t + chunk.count; t < end; ++t) {
              if (chunk.slot < 0) continue;
              EXPECT_TRUE(SameRow(got[i].values, t, want.values, t)) << i << " " << t;
              if (format != ActivationFormat::kFP8) continue;
              EXPECT_TRUE(SameRow(got[i].scales, t, want.scales, t)) << i << " " << t;
            }
          }
        }
      }
    }
  }
}

// Steps of long chunks: every sequence one, decode rows and padding too; or only those of 60 rows, wherever they stand.
TEST(CudaLongChunksTest, EverySequenceOrSome) {
  const std::vector<std::vector<Chunk>> steps = {
      {{3, 0, 65}, {4, 613, 87}, {1, 5, 58}, {2, 0, 64}, {0, 0, 1}, {-1, 0, 3}},
      {{4, 0, 129}},
      {{4, 200, 500}},
      {{1, 62, 1, true}, {4, 440, 260}, {3, 63, 2, true}, {2, 1, 33}, {0, 0, 1, true}, {-1, 0, 4}},
      {{-1, 0, 2, true}, {2, 63, 1, true}, {3, 1, 64}, {4, 300, 128}}};
  for (const Dims& dims : {Dims{16, 128, 64, 128, 512}, Dims{5, 128, 64, 128, 512}}) {
    for (KvDType kv_dtype : {KvDType::kBF16, KvDType::kFP8}) {
      for (ActivationFormat format : {ActivationFormat::kBF16, ActivationFormat::kFP8}) {
        AttentionWorld world(dims, kv_dtype, DType::kF8E4M3, kNumSlots, 768, format);
        for (int32_t slot = 0; slot < kNumSlots; ++slot) world.Write(slot, kContexts[slot]);
        for (int32_t min_rows : {1, 60}) {
          world.UseLongChunks(min_rows);
          for (const std::vector<Chunk>& chunks : steps) world.Check(chunks, SomeRows(chunks), DType::kBF16);
        }
      }
    }
  }
}

// Padding gives zeros whichever kernel has it.
TEST(CudaLongChunksTest, Padding) {
  for (ActivationFormat format : {ActivationFormat::kBF16, ActivationFormat::kFP8}) {
    AttentionWorld world({5, 128, 64, 128, 512}, KvDType::kBF16, DType::kBF16, 1, 768, format);
    world.Write(0, 300);
    world.UseLongChunks(60);
    const OwnedActivation out = world.Attend({{-1, 0, 2}, {0, 0, 300}, {-1, 0, 5}, {-1, 0, 70}}, DType::kBF16);
    for (int64_t row = 0; row < 377; ++row) {
      if (row >= 2 && row < 302) continue;
      EXPECT_EQ(testing::Values(out.view().values.Rows(row, 1)), std::vector<double>(5 * 128, 0.0)) << row;
    }
  }
}

// More keys than the window has: sequences that lie across its borders, one of them across two.
TEST(CudaLongChunksTest, SeveralPasses) {
  for (KvDType kv_dtype : {KvDType::kBF16, KvDType::kFP8}) {
    AttentionWorld world({15, 128, 64, 128, 512}, kv_dtype, DType::kF8E4M3, 4, 9000, ActivationFormat::kBF16);
    for (auto [slot, length] : {std::pair{0, 9000}, {1, 300}, {2, 5000}, {3, 2500}}) world.Write(slot, length);
    world.UseLongChunks(100);
    const std::vector<Chunk> chunks = {{1, 299, 1, true}, {1, 200, 99}, {2, 4900, 100}, {0, 8850, 150}, {3, 2350, 150}};
    world.Check(chunks, SomeRows(chunks), DType::kBF16);
  }
}

// Every position that the model has. A few keys are large: a mean over so many hears no single one of the others.
TEST(CudaAttentionLongTest, LongestContext) {
  constexpr int32_t kContext = 163840;
  for (KvDType kv_dtype : {KvDType::kFP8, KvDType::kBF16}) {
    AttentionWorld world({5, 128, 64, 128, 512}, kv_dtype, DType::kBF16, 1, kContext, ActivationFormat::kBF16);
    world.Write(0, kContext);
    for (int32_t position : {0, 1, 63, 64, 4095, 81919, 163775, 163776, 163838, 163839}) {
      world.WriteLarge(0, position, 3);
    }
    world.Check({{0, kContext - 4, 4, true}}, {0, 3}, DType::kBF16);
    world.Check({{0, kContext - 40, 40}}, {39}, DType::kBF16);
    world.UseLongChunks(40);
    world.Check({{0, kContext - 40, 40}}, {39}, DType::kBF16);
  }
}

}  // namespace
}  // namespace cachalot
