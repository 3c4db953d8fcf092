// MlaAttention against double precision, and bit for bit however rows are cut, batched and shared out.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/quantize.h"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::CloseBf16;
using testing::CloseF32;
using testing::Element;
using testing::Owned;
using testing::OwnedActivation;
using testing::OwnedWeight;
using testing::Random;
using testing::SameRow;
using testing::Values;

struct Dims {
  int64_t heads, nope, rope, value, latent;
};
constexpr Dims kV3 = {128, 128, 64, 128, 512};
constexpr Dims kSmall = {4, 32, 16, 32, 128};
constexpr Dims kUgly = {3, 20, 18, 24, 100};

// Rows of one slot at consecutive positions.
struct Chunk {
  int32_t slot;
  int32_t start;
  int32_t count;
};

// A cache with sequences in scattered pages, NaN wherever nothing was written, and queries that are a function of slot
// and position alone.
class World {
 public:
  World(const Dims& dims, KvDType kv_dtype, DType weight_dtype, int64_t num_slots, int64_t max_context,
        ActivationFormat format = ActivationFormat::kF32, int num_threads = 2)
      : dims_(dims),
        random_(dims.heads * 1000 + dims.latent),
        kv_b_(weight_dtype, dims.heads * (dims.nope + dims.value), dims.latent, random_),
        pages_((max_context + kBlockTokens - 1) / kBlockTokens),
        blocks_(DType::kU8, {num_slots * pages_ + 1, kBlockTokens, KvTokenBytes(kv_dtype, dims.latent, dims.rope)}),
        table_(DType::kI32, {num_slots, pages_}),
        rope_(testing::MakeRopeTable(max_context, dims.rope)),
        options_(testing::CpuOptions(num_threads)) {
    cache_ = {blocks_, kv_dtype};
    options_.activation = format;
    std::vector<int32_t> ids(num_slots * pages_);
    std::iota(ids.begin(), ids.end(), 1);
    for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[random_.Below(static_cast<int>(i))]);
    state_.block_table = table_.Set(ids);
    UseThreads(num_threads);
  }

  void UseThreads(int num_threads) {
    options_.num_threads = num_threads;
    backend_ = testing::MakeCpu(options_);
    kv_up_ = backend_->ops().MakeKvUp(kv_b_.part(), static_cast<int>(dims_.heads), static_cast<int>(dims_.nope),
                                      static_cast<int>(dims_.value));
  }

  // Writes random entries at positions [0, count) of a slot.
  void Write(int32_t slot, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      Owned values(DType::kF32, {1, dims_.latent + dims_.rope});
      values.FillNormal(random_, p % 7 == 0 ? 1.5 : 0.7);
      WriteEntry(Entry(slot, p), values.data<float>());
    }
  }

  Owned Queries(const std::vector<Chunk>& chunks, DType dtype = DType::kF32) const {
    int64_t rows = 0;
    for (const Chunk& chunk : chunks) rows += chunk.count;
    const int64_t width = dims_.heads * (dims_.nope + dims_.rope);
    std::vector<double> values;
    for (const Chunk& chunk : chunks) {
      for (int32_t i = 0; i < chunk.count; ++i) {
        Random random(chunk.slot * 1000003 + chunk.start + i + 17);
        for (int64_t j = 0; j < width; ++j) values.push_back(0.8 * random.Normal());
      }
    }
    Owned q(dtype, {rows, width});
    q.Fill(values);
    return q;
  }

  OwnedActivation Attend(const std::vector<Chunk>& chunks, DType q_dtype = DType::kF32) {
    const Owned q = Queries(chunks, q_dtype);
    std::vector<int32_t> slots, positions;
    for (const Chunk& chunk : chunks) {
      for (int32_t i = 0; i < chunk.count; ++i) {
        slots.push_back(chunk.slot);
        positions.push_back(chunk.slot < 0 ? 0 : chunk.start + i);
      }
    }
    const int64_t rows = static_cast<int64_t>(slots.size());
    Owned slot_rows(DType::kI32, {rows}), position_rows(DType::kI32, {rows});
    OwnedActivation out(options_.activation, rows, dims_.heads * dims_.value);
    backend_->ops().MlaAttention(out.view(), q, *kv_up_, cache_, state_, StepInput(),
                                 StepRows{Tensor(), position_rows.Set(positions), slot_rows.Set(slots)},
                                 RopeTable{rope_}, kScale);
    return out;
  }

  // One row in double precision: softmax over all keys at once, keys and values expanded only as far as cheap.
  std::vector<double> Reference(int32_t slot, int32_t position, const std::vector<double>& q) const {
    const auto [heads, nope, rope, value, latent] = dims_;
    const std::vector<double>& w = KvB();
    const int64_t width = latent + rope;
    std::vector<double> entries;
    for (int32_t p = 0; p <= position; ++p) {
      const std::vector<double> entry = ReadEntry(Entry(slot, p));
      entries.insert(entries.end(), entry.begin(), entry.end());
    }
    std::vector<double> out(heads * value);
    for (int64_t h = 0; h < heads; ++h) {
      const double* qh = q.data() + h * (nope + rope);
      const double* wh = w.data() + h * (nope + value) * latent;
      std::vector<double> query(width, 0.0), scores(position + 1), mean(latent, 0.0);
      for (int64_t n = 0; n < nope; ++n) {
        for (int64_t c = 0; c < latent; ++c) query[c] += qh[n] * wh[n * latent + c];
      }
      for (int64_t i = 0; i < rope / 2; ++i) {
        const double cos = Element(rope_, position, i), sin = Element(rope_, position, rope / 2 + i);
        const double even = qh[nope + 2 * i], odd = qh[nope + 2 * i + 1];
        query[latent + 2 * i] = even * cos - odd * sin;
        query[latent + 2 * i + 1] = even * sin + odd * cos;
      }
      double max = -1e300, sum = 0;
      for (int32_t p = 0; p <= position; ++p) {
        for (int64_t c = 0; c < width; ++c) scores[p] += query[c] * entries[p * width + c];
        scores[p] *= kScale;
        max = std::max(max, scores[p]);
      }
      for (int32_t p = 0; p <= position; ++p) {
        const double e = std::exp(scores[p] - max);
        sum += e;
        for (int64_t c = 0; c < latent; ++c) mean[c] += e * entries[p * width + c];
      }
      for (int64_t v = 0; v < value; ++v) {
        for (int64_t c = 0; c < latent; ++c) out[h * value + v] += mean[c] / sum * wh[(nope + v) * latent + c];
      }
    }
    return out;
  }

  // Rows of `chunks` that are worth a look against the reference; the others cost too much.
  void Check(const std::vector<Chunk>& chunks, const std::vector<int64_t>& rows, DType q_dtype = DType::kF32) {
    const OwnedActivation out = Attend(chunks, q_dtype);
    const std::vector<double> got = Values(out.view()), q = Values(Queries(chunks, q_dtype));
    const int64_t out_width = dims_.heads * dims_.value, q_width = dims_.heads * (dims_.nope + dims_.rope);
    for (int64_t row : rows) {
      int64_t first = 0;
      size_t i = 0;
      while (row >= first + chunks[i].count) first += chunks[i++].count;
      const int32_t position = chunks[i].start + static_cast<int32_t>(row - first);
      std::vector<double> want =
          Reference(chunks[i].slot, position, {q.begin() + row * q_width, q.begin() + (row + 1) * q_width});
      const std::vector<double> found(got.begin() + row * out_width, got.begin() + (row + 1) * out_width);
      if (options_.activation == ActivationFormat::kFP8) {
        EXPECT_TRUE(testing::Close(found, testing::ThroughFp8(want, ScaleRule::kFP32), 1e-4, 0.13)) << "row " << row;
      } else if (options_.activation == ActivationFormat::kBF16) {
        EXPECT_TRUE(CloseBf16(found, want)) << "row " << row;
      } else {
        EXPECT_TRUE(CloseF32(found, want)) << "row " << row;
      }
    }
  }

 private:
  static constexpr float kScale = 0.1352337789f;

  uint8_t* Entry(int32_t slot, int64_t position) const {
    const int64_t block = table_->row<int32_t>(slot)[position / kBlockTokens];
    return blocks_->row<uint8_t>(block) + position % kBlockTokens * blocks_->dim(2);
  }

  // Scalar and by the layout's definition (ops_types.h): the verb that writes entries has tests of its own.
  void WriteEntry(uint8_t* entry, const float* values) const {
    const int64_t latent = dims_.latent, groups = (latent + kQuantGroup - 1) / kQuantGroup;
    for (int64_t i = 0; i < latent + dims_.rope; ++i) {
      const uint16_t bits = FloatToBf16(values[i]);
      if (cache_.dtype == KvDType::kF32) std::memcpy(entry + 4 * i, values + i, 4);
      if (cache_.dtype == KvDType::kBF16) std::memcpy(entry + 2 * i, &bits, 2);
      if (cache_.dtype != KvDType::kFP8) continue;
      const float scale = 0.01f * static_cast<float>(1 + i / kQuantGroup);
      if (i < latent) {
        entry[i] = FloatToE4m3(values[i] / scale);
        std::memcpy(entry + latent + i / kQuantGroup * 4, &scale, 4);
      } else {
        std::memcpy(entry + latent + groups * 4 + (i - latent) * 2, &bits, 2);
      }
    }
  }

  std::vector<double> ReadEntry(uint8_t* entry) const {
    const int64_t latent = dims_.latent, width = latent + dims_.rope, groups = (latent + kQuantGroup - 1) / kQuantGroup;
    if (cache_.dtype == KvDType::kF32) return Values(Tensor(entry, DType::kF32, {1, width}));
    if (cache_.dtype == KvDType::kBF16) return Values(Tensor(entry, DType::kBF16, {1, width}));
    std::vector<double> values = Values(
        Activation{Tensor(entry, DType::kF8E4M3, {1, latent}), Tensor(entry + latent, DType::kF32, {1, groups})});
    const auto k_pe = Values(Tensor(entry + latent + 4 * groups, DType::kBF16, {1, dims_.rope}));
    values.insert(values.end(), k_pe.begin(), k_pe.end());
    return values;
  }

  const std::vector<double>& KvB() const {
    if (kv_b_values_.empty()) {
      kv_b_values_ = Values(kv_b_.part());
      // The mode that mirrors the GPU keeps kv_b in bf16.
      if (options_.activation == ActivationFormat::kFP8) {
        for (double& value : kv_b_values_) value = testing::Rounded(value, DType::kBF16);
      }
    }
    return kv_b_values_;
  }

  Dims dims_;
  Random random_;
  OwnedWeight kv_b_;
  int64_t pages_;
  Owned blocks_, table_, rope_;
  BackendOptions options_;
  KvCache cache_;
  SlotState state_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weight> kv_up_;
  mutable std::vector<double> kv_b_values_;
};

class AttentionTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ForceSimdTarget(GetParam()); }
  void TearDown() override { ForceSimdTarget(""); }
};

std::vector<int64_t> AllRows(int64_t n) {
  std::vector<int64_t> rows(n);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

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

INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest, ::testing::ValuesIn(SupportedSimdTargets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace cachalot
