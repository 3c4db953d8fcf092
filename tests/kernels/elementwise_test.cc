// Norms, silu, embedding, gathering and the latent path against double, in every activation format.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "kernels/exponential.h"
#include "nlohmann/json.hpp"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::Close;
using testing::CloseBf16;
using testing::CloseF32;
using testing::Element;
using testing::Owned;
using testing::OwnedActivation;
using testing::OwnedWeight;
using testing::Random;
using testing::SameRow;
using testing::Values;

constexpr ActivationFormat kFormats[] = {ActivationFormat::kF32, ActivationFormat::kBF16, ActivationFormat::kFP8};

class ElementwiseTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { testing::UseTarget(GetParam()); }
  void TearDown() override { testing::UseTarget(""); }

  static bool HasFusedMultiplyAdd() { return GetParam() != "EMU128" && !GetParam().starts_with("SSE"); }

  // `got` holds `want` (in double, exact) in its format. FP8 values may fall to a neighbour when fp32 rounding moves a
  // tie, which is why single elements are compared at e4m3's step.
  static void CheckActivation(const OwnedActivation& got, const std::vector<double>& want, ScaleRule rule) {
    if (got.values->dtype == DType::kF32) {
      EXPECT_TRUE(CloseF32(Values(got.view()), want));
    } else if (got.values->dtype == DType::kBF16) {
      EXPECT_TRUE(CloseBf16(Values(got.view()), want));
    } else {
      const int64_t cols = got.values->dim(1);
      std::vector<double> rounded;
      for (size_t i = 0; i < want.size(); i += cols) {
        const auto row = testing::ThroughFp8({want.begin() + i, want.begin() + i + cols}, rule);
        rounded.insert(rounded.end(), row.begin(), row.end());
      }
      EXPECT_TRUE(Close(Values(got.view()), rounded, 1e-5, 0.13));
    }
  }

  static BackendOptions Options(ScaleRule rule) {
    BackendOptions options = testing::CpuOptions();
    options.scale_rule = rule;
    return options;
  }
};

std::vector<double> RmsNormRow(const std::vector<double>& x, const std::vector<double>& w, double eps) {
  double squares = 0;
  for (double v : x) squares += v * v;
  const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * factor * w[i];
  return y;
}

TEST_P(ElementwiseTest, AddRmsNorm) {
  Random random(1);
  for (ScaleRule rule : {ScaleRule::kFP32, ScaleRule::kUE8M0}) {
    const auto backend = testing::MakeTestBackend(Options(rule));
    for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{{0, 320}, {1, 7168}, {7, 144}, {129, 130}}) {
      Owned w(DType::kBF16, {cols});
      w.FillNormal(random);
      const std::unique_ptr<Weight> weight = backend->ops().MakeVector(w);
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        for (ActivationFormat format : kFormats) {
          Owned h(dtype, {rows, cols}), delta(dtype, {rows, cols}), plain(dtype, {rows, cols});
          h.FillNormal(random, 3);
          delta.FillNormal(random);
          const bool add = format != ActivationFormat::kBF16;
          std::vector<double> sum = Values(h), want;
          const std::vector<double> d = Values(delta), weights = Values(w);
          for (size_t i = 0; add && i < sum.size(); ++i) sum[i] = testing::Rounded(sum[i] + d[i], dtype);
          for (int64_t t = 0; t < rows; ++t) {
            const auto row = RmsNormRow({sum.begin() + t * cols, sum.begin() + (t + 1) * cols}, weights, 1e-6);
            want.insert(want.end(), row.begin(), row.end());
          }
          OwnedActivation x(format, rows, cols);
          backend->ops().AddRmsNorm(h, x.view(), plain, add ? *delta : Tensor(), *weight, 1e-6f);
          EXPECT_EQ(Values(h), sum);
          EXPECT_TRUE(dtype == DType::kF32 ? CloseF32(Values(plain), want) : CloseBf16(Values(plain), want));
          CheckActivation(x, want, rule);
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, SiluMul) {
  Random random(2);
  const auto backend = testing::MakeTestBackend(Options(ScaleRule::kFP32));
  for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{{0, 128}, {1, 2048}, {5, 144}, {33, 77}}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      Owned gate_up(dtype, {rows, 2 * cols});
      gate_up.FillNormal(random, 4);
      // NOTE: exp must neither overflow to NaN nor lose a sign.
      if (rows > 0) gate_up->dtype == DType::kF32 ? void(gate_up.data<float>()[0] = -400.0f) : void();
      const std::vector<double> in = Values(gate_up);
      std::vector<double> want(rows * cols);
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = 0; i < cols; ++i) {
          const double g = in[t * 2 * cols + i], u = in[t * 2 * cols + cols + i];
          want[t * cols + i] = g / (1 + std::exp(-g)) * u;
        }
      }
      for (ActivationFormat format : kFormats) {
        OwnedActivation out(format, rows, cols);
        backend->ops().SiluMul(out.view(), gate_up);
        CheckActivation(out, want, ScaleRule::kFP32);
        if (format != ActivationFormat::kF32 || !HasFusedMultiplyAdd()) continue;
        // The same bits on every backend.
        for (int64_t i = 0; i < rows * cols; ++i) {
          const auto g = static_cast<float>(in[i / cols * 2 * cols + i % cols]);
          const auto u = static_cast<float>(in[i / cols * 2 * cols + cols + i % cols]);
          ASSERT_EQ(out.values.data<float>()[i], g / (1.0f + Exp(-g)) * u) << g << " " << u;
        }
      }
      // Grouped: rows past the last offset stay as they are.
      Owned offsets(DType::kI32, {3});
      const int32_t count = static_cast<int32_t>(rows / 2);
      offsets.Set({0, count / 2, count});
      OwnedActivation out(ActivationFormat::kF32, rows, cols), all(ActivationFormat::kF32, rows, cols);
      backend->ops().SiluMul(all.view(), gate_up);
      backend->ops().GroupedSiluMul(out.view(), gate_up, offsets);
      for (int64_t t = 0; t < count; ++t) EXPECT_TRUE(SameRow(out.values, t, all.values, t));
      for (int64_t t = count; t < rows; ++t) EXPECT_TRUE(std::isnan(Element(out.values, t, 0)));
    }
  }
}

TEST_P(ElementwiseTest, QuantisedValuesAreTheDefinition) {
  // Values that are exact in fp32 leave no room for rounding: bytes and scales must match.
  const auto backend = testing::MakeTestBackend(Options(ScaleRule::kUE8M0));
  Random random(3);
  Owned gate_up(DType::kF32, {1, 2 * 300}), up(DType::kF32, {1, 300});
  std::vector<double> values(600, 100.0);  // silu(100) is 100 in fp32
  for (int i = 0; i < 300; ++i) values[300 + i] = std::ldexp(random.Below(4096) - 2048, -10 - random.Below(12));
  gate_up.Fill(values);
  OwnedActivation out(ActivationFormat::kFP8, 1, 300);
  backend->ops().SiluMul(out.view(), gate_up);
  std::vector<double> row(300);
  for (int i = 0; i < 300; ++i) row[i] = 100 * values[300 + i];
  EXPECT_EQ(Values(out.view()), testing::ThroughFp8(row, ScaleRule::kUE8M0));
}

TEST_P(ElementwiseTest, EmbedAndGather) {
  Random random(4);
  const auto backend = testing::MakeTestBackend(Options(ScaleRule::kFP32));
  const int64_t cols = 300;
  for (DType dtype : {DType::kBF16, DType::kF8E4M3, DType::kF32}) {
    const OwnedWeight table(dtype, 200, cols, random);
    const std::unique_ptr<Weight> weight = backend->ops().MakeLinear({table.part()});
    Owned tokens(DType::kI32, {4}), slots(DType::kI32, {4}), h(DType::kF32, {4, cols});
    tokens.Set({0, 199, 7, 130});
    slots.Set({3, 0, -1, 2});
    backend->ops().Embed(h, *weight, StepRows{tokens, Tensor(), slots});
    const std::vector<double> w = Values(table.part());
    for (int64_t t : {0, 1, 3}) {
      const int64_t token = tokens.data<int32_t>()[t];
      for (int64_t i = 0; i < cols; ++i) {
        EXPECT_EQ(Element(h, t, i), static_cast<float>(w[token * cols + i]));
      }
    }
    for (int64_t i = 0; i < cols; ++i) EXPECT_EQ(Element(h, 2, i), 0);

    Owned row_token(DType::kI32, {3}), out(DType::kF32, {3, cols});
    row_token.Set({3, -1, 0});
    backend->ops().GatherRows(Activation{out, Tensor()}, Activation{h, Tensor()}, row_token);
    EXPECT_TRUE(SameRow(out, 0, h, 3) && SameRow(out, 1, h, 2) && SameRow(out, 2, h, 0));
  }
  OwnedActivation x(ActivationFormat::kFP8, 3, cols), out(ActivationFormat::kFP8, 2, cols);
  x.values.FillNormal(random);
  x.scales.FillNormal(random);
  Owned row_token(DType::kI32, {2});
  row_token.Set({2, -1});
  backend->ops().GatherRows(out.view(), x.view(), row_token);
  EXPECT_TRUE(SameRow(out.values, 0, x.values, 2) && SameRow(out.scales, 0, x.scales, 2));
  EXPECT_EQ(Values(out.scales->Rows(1, 1)), std::vector<double>(3, 0.0));
}

// c and k_pe of one entry, as doubles.
std::vector<double> EntryValues(const KvCache& cache, int64_t block, int64_t index, int64_t rank, int64_t rope) {
  uint8_t* entry = cache.blocks.row<uint8_t>(block) + index * cache.blocks.dim(2);
  if (cache.dtype == KvDType::kF32) return Values(Tensor(entry, DType::kF32, {1, rank + rope}));
  if (cache.dtype == KvDType::kBF16) return Values(Tensor(entry, DType::kBF16, {1, rank + rope}));
  const int64_t groups = (rank + 127) / 128;
  std::vector<double> values =
      Values(Activation{Tensor(entry, DType::kF8E4M3, {1, rank}), Tensor(entry + rank, DType::kF32, {1, groups})});
  const std::vector<double> k_pe = Values(Tensor(entry + rank + 4 * groups, DType::kBF16, {1, rope}));
  values.insert(values.end(), k_pe.begin(), k_pe.end());
  return values;
}

// Rotates interleaved pairs by the table's row.
std::vector<double> Rotated(const double* x, const Tensor& rope, int64_t position) {
  const int64_t half = rope.dim(1) / 2;
  std::vector<double> result(2 * half);
  for (int64_t i = 0; i < half; ++i) {
    const double cos = Element(rope, position, i), sin = Element(rope, position, half + i);
    result[2 * i] = x[2 * i] * cos - x[2 * i + 1] * sin;
    result[2 * i + 1] = x[2 * i] * sin + x[2 * i + 1] * cos;
  }
  return result;
}

// Two rows of slot 2 across a page's border, padding, and slot 1 far in.
class LatentStep {
 public:
  LatentStep(KvDType dtype, DType in_type, int64_t rank, int64_t q_rank, Random& random)
      : blocks(DType::kU8, {20, kBlockTokens, KvTokenBytes(dtype, rank, 64)}),
        kv(in_type, {4, rank + 64}),
        kv_weight(DType::kF32, {rank}),
        q_a(in_type, {4, q_rank}),
        q_weight(DType::kF32, {q_rank}),
        q_latent(ActivationFormat::kF32, 4, q_rank) {
    std::vector<int32_t> ids(36, -1);
    ids[2 * 12 + 0] = 7;
    ids[2 * 12 + 1] = 3;
    ids[1 * 12 + 10] = 11;
    state.block_table = table.Set(ids);
    cache = {blocks, dtype};
    kv.FillNormal(random, 2);
    kv_weight.FillNormal(random);
    q_a.FillNormal(random);
    q_weight.FillNormal(random);
  }
  void Run(Ops& ops, bool has_q, const Tensor& rope) {
    const auto kv_norm = ops.MakeVector(kv_weight), q_norm = ops.MakeVector(q_weight);
    ops.LatentNormRopeWrite(cache, state, has_q ? q_latent.view() : Activation{}, q_a, kv,
                            has_q ? q_norm.get() : nullptr, *kv_norm, StepRows{Tensor(), positions, slots},
                            RopeTable{rope}, 1e-6f);
  }

  Owned blocks, kv, kv_weight, q_a, q_weight;
  OwnedActivation q_latent;
  Owned table{DType::kI32, {3, 12}};
  Owned slots = Owned(DType::kI32, {4}).Set({2, 2, -1, 1}), positions = Owned(DType::kI32, {4}).Set({63, 64, 5, 699});
  SlotState state;
  KvCache cache;
};

TEST_P(ElementwiseTest, LatentNormRopeWrite) {
  Random random(5);
  const auto backend = testing::MakeTestBackend(Options(ScaleRule::kFP32));
  const Owned rope = testing::MakeRopeTable(700, 64);
  for (auto [rank, q_rank] : std::vector<std::pair<int64_t, int64_t>>{{512, 1536}, {144, 0}, {100, 130}}) {
    for (KvDType dtype : {KvDType::kF32, KvDType::kBF16, KvDType::kFP8}) {
      for (DType in_type : {DType::kF32, DType::kBF16}) {
        LatentStep step(dtype, in_type, rank, std::max<int64_t>(q_rank, 1), random);
        const std::vector<uint8_t> before = step.blocks.bytes();
        step.Run(backend->ops(), q_rank > 0, rope);

        const std::vector<double> in = Values(step.kv), weights = Values(step.kv_weight);
        const int64_t token_bytes = step.cache.blocks.dim(2);
        for (auto [t, block, index] : std::vector<std::array<int64_t, 3>>{{0, 7, 63}, {1, 3, 0}, {3, 11, 59}}) {
          const double* row = in.data() + t * (rank + 64);
          std::vector<double> want = RmsNormRow({row, row + rank}, weights, 1e-6);
          if (dtype == KvDType::kFP8) want = testing::ThroughFp8(want, ScaleRule::kFP32);
          const std::vector<double> rotated = Rotated(row + rank, rope, step.positions.data<int32_t>()[t]);
          const std::vector<double> got = EntryValues(step.cache, block, index, rank, 64);
          const std::vector<double> c(got.begin(), got.begin() + rank), k_pe(got.begin() + rank, got.end());
          EXPECT_TRUE(dtype == KvDType::kF32    ? CloseF32(c, want)
                      : dtype == KvDType::kBF16 ? CloseBf16(c, want)
                                                : Close(c, want, 1e-5, 0.13));
          EXPECT_TRUE(dtype == KvDType::kF32 ? CloseF32(k_pe, rotated) : CloseBf16(k_pe, rotated));
        }
        // Nothing else was touched.
        const std::vector<uint8_t> after = step.blocks.bytes();
        for (size_t i = 0; i < after.size(); ++i) {
          const int64_t entry = static_cast<int64_t>(i) / token_bytes;
          const bool is_ours = entry == 7 * 64 + 63 || entry == 3 * 64 || entry == 11 * 64 + 59;
          ASSERT_TRUE(is_ours || after[i] == before[i]) << "entry " << entry;
        }
        for (int64_t t = 0; t < 4 && q_rank > 0; ++t) {
          const std::vector<double> a = Values(step.q_a->Rows(t, 1));
          EXPECT_TRUE(CloseF32(Values(step.q_latent.values->Rows(t, 1)), RmsNormRow(a, Values(step.q_weight), 1e-6)));
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, RopeIsTheOfficialLayout) {
  std::ifstream file(std::string(CACHALOT_TEST_DATA_DIR) + "/kernels/data/numeric_vectors.json");
  const nlohmann::json example = nlohmann::json::parse(file)["rope"];
  const int64_t position = example["position"];
  const std::vector<double> inv_freq = example["inv_freq"], want = example["interleaved"];
  Owned rope(DType::kF32, {position + 1, 64}),
      blocks(DType::kU8, {1, kBlockTokens, KvTokenBytes(KvDType::kF32, 128, 64)});
  Owned table(DType::kI32, {1, 1}), slots(DType::kI32, {1}), positions(DType::kI32, {1}), kv(DType::kF32, {1, 192}),
      weight(DType::kF32, {128});
  for (int i = 0; i < 32; ++i) {
    rope->row<float>(position)[i] = static_cast<float>(std::cos(position * inv_freq[i]));
    rope->row<float>(position)[32 + i] = static_cast<float>(std::sin(position * inv_freq[i]));
  }
  std::vector<double> in(192, 1.0);
  for (int i = 0; i < 64; ++i) in[128 + i] = (i + 1) / 64.0;
  kv.Fill(in);
  weight.Fill(std::vector<double>(128, 1.0));
  slots.Set({0});
  positions.Set({static_cast<int32_t>(position)});
  SlotState state;
  state.block_table = table.Set({0});
  const auto backend = testing::MakeTestBackend(Options(ScaleRule::kFP32));
  const auto norm = backend->ops().MakeVector(weight);
  const KvCache cache = {blocks, KvDType::kF32};
  backend->ops().LatentNormRopeWrite(cache, state, Activation{}, Tensor(), kv, nullptr, *norm,
                                     StepRows{Tensor(), positions, slots}, RopeTable{rope}, 1e-6f);
  const std::vector<double> got = EntryValues(cache, 0, position, 128, 64);
  EXPECT_TRUE(CloseF32({got.begin() + 128, got.end()}, want));
}

INSTANTIATE_TEST_SUITE_P(Targets, ElementwiseTest, ::testing::ValuesIn(testing::TestTargets()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace cachalot
