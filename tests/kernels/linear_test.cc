// Linear and GroupedLinear against sums in double, and against themselves bit for bit.
#include <gtest/gtest.h>

#include "kernels/cpu/highway_targets.h"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::CloseBf16;
using testing::CloseF32;
using testing::CloseProduct;
using testing::Element;
using testing::MatMul;
using testing::Owned;
using testing::OwnedActivation;
using testing::OwnedWeight;
using testing::Random;
using testing::RandomActivation;
using testing::SameProduct;
using testing::Values;

constexpr DType kWeightTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3};

class LinearTest : public ::testing::Test {
 protected:
  void TearDown() override { testing::UseTarget(""); }
  Ops& ops() { return backend_->ops(); }

  // y in `y_type` is the product of x and the stacked parts.
  void Check(int64_t rows, const std::vector<const OwnedWeight*>& parts, const Activation& x, DType y_type) {
    std::vector<WeightPart> row_stacked;
    std::vector<double> w;
    for (const OwnedWeight* part : parts) {
      row_stacked.push_back(part->part());
      const std::vector<double> values = Values(part->part());
      w.insert(w.end(), values.begin(), values.end());
    }
    const std::unique_ptr<Weight> weight = ops().MakeLinear(row_stacked);
    Owned y(y_type, {rows, weight->rows()});
    ops().Linear(y, x, *weight);
    const std::vector<double> want = MatMul(Values(x), w, rows, weight->rows(), weight->cols());
    const bool has_fp8 = !x.scales.empty() || row_stacked[0].weight.dtype == DType::kF8E4M3;
    EXPECT_TRUE(y_type == DType::kF32 ? CloseProduct(Values(y), want, has_fp8) : CloseBf16(Values(y), want))
        << rows << " rows, " << weight->rows() << "x" << weight->cols() << " " << row_stacked[0].weight.ToString();
  }

  // Rows offsets[g] .. offsets[g+1] of x meet expert g, gate stacked on up; rows past the last offset stay as they are.
  void CheckGroups(const std::vector<OwnedWeight>& gate, const std::vector<OwnedWeight>& up, const Weight& experts,
                   const Activation& x, const std::vector<int32_t>& offsets, DType y_type) {
    const int64_t out = experts.rows() / 2, in = experts.cols();
    const bool has_fp8 = !x.scales.empty() || gate[0].weight->dtype == DType::kF8E4M3;
    Owned y(y_type, {x.rows(), 2 * out}), ends(DType::kI32, {static_cast<int64_t>(offsets.size())});
    ops().GroupedLinear(y, x, experts, ends.Set(offsets));
    const auto is_close = [&](const Tensor& got, const std::vector<double>& want) {
      return y_type == DType::kF32 ? CloseProduct(Values(got), want, has_fp8) : CloseBf16(Values(got), want);
    };
    for (size_t g = 0; g < gate.size(); ++g) {
      const int64_t begin = offsets[g], count = offsets[g + 1] - begin;
      if (count == 0) continue;
      const std::vector<double> rows = Values(x.Rows(begin, count));
      EXPECT_TRUE(
          is_close(y->Rows(begin, count).Columns(0, out), MatMul(rows, Values(gate[g].part()), count, out, in)));
      EXPECT_TRUE(
          is_close(y->Rows(begin, count).Columns(out, out), MatMul(rows, Values(up[g].part()), count, out, in)));
      // And as a Linear of its own gives it.
      const std::unique_ptr<Weight> alone = ops().MakeLinear({gate[g].part(), up[g].part()});
      Owned other(y_type, {count, 2 * out});
      ops().Linear(other, x.Rows(begin, count), *alone);
      for (int64_t t = 0; t < count; ++t) ASSERT_TRUE(SameProduct(other, t, y, begin + t));
    }
    for (int64_t t = offsets.back(); t < x.rows(); ++t) EXPECT_TRUE(std::isnan(Element(y, t, 0)));
  }

  std::unique_ptr<Backend> backend_ = testing::MakeTestBackend(testing::CpuOptions());
};

TEST_F(LinearTest, EveryWeightTypeAndRowCount) {
  Random random(1);
  for (DType dtype : kWeightTypes) {
    const OwnedWeight w(dtype, 300, 1100, random);
    for (int64_t rows : {0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 129}) {
      Owned x(DType::kF32, {rows, 1100});
      x.FillNormal(random);
      Check(rows, {&w}, Activation{x, Tensor()}, DType::kF32);
    }
  }
}

TEST_F(LinearTest, RaggedBlocksAndTails) {
  Random random(2);
  for (auto [out, in] : std::vector<std::pair<int64_t, int64_t>>{{144, 320}, {1, 1}, {5, 3}, {129, 130}, {64, 1033}}) {
    for (DType dtype : kWeightTypes) {
      const OwnedWeight w(dtype, out, in, random);
      for (int64_t rows : {1, 3, 6, 17}) {
        Owned x(DType::kF32, {rows, in});
        x.FillNormal(random);
        Check(rows, {&w}, Activation{x, Tensor()}, DType::kF32);
      }
    }
  }
}

// q_a on kv_a, as the model stacks them: two grids of scales, the second with a half block at its end.
TEST_F(LinearTest, StackedPartsAtRealShape) {
  Random random(3);
  const OwnedWeight q_a(DType::kF8E4M3, 1536, 7168, random), kv_a(DType::kF8E4M3, 576, 7168, random);
  for (int64_t rows : {1, 4, 6}) {
    Owned x(DType::kF32, {rows, 7168});
    x.FillNormal(random);
    Check(rows, {&q_a, &kv_a}, Activation{x, Tensor()}, DType::kF32);
  }
  if (testing::TestsOnGpu()) return;  // it stacks parts of one type only, as the loader demands
  const OwnedWeight bf16(DType::kBF16, 40, 7168, random), f32(DType::kF32, 24, 7168, random);
  Owned x(DType::kF32, {5, 7168});
  x.FillNormal(random);
  Check(5, {&bf16, &f32}, Activation{x, Tensor()}, DType::kF32);
}

TEST_F(LinearTest, LongRowsPassTheSpanOfFewRows) {
  Random random(4);
  const OwnedWeight w(DType::kF8E4M3, 20, 18432, random);
  for (int64_t rows : {2, 5}) {
    Owned x(DType::kF32, {rows, 18432});
    x.FillNormal(random);
    Check(rows, {&w}, Activation{x, Tensor()}, DType::kF32);
  }
}

TEST_F(LinearTest, QuantisedActivations) {
  Random random(5);
  for (DType dtype : {DType::kF8E4M3, DType::kBF16}) {
    const OwnedWeight w(dtype, 200, 1100, random);
    for (int64_t rows : {1, 6, 40}) {
      for (ActivationFormat format : {ActivationFormat::kBF16, ActivationFormat::kFP8}) {
        OwnedActivation x(format, rows, 1100);
        x.values.FillNormal(random, 40);
        if (format == ActivationFormat::kFP8) {
          std::vector<double> scales(rows * 9);
          for (double& s : scales) s = 0.001 + 0.05 * random.Uniform();
          x.scales.Fill(scales);
        }
        Check(rows, {&w}, x.view(), DType::kF32);
        Check(rows, {&w}, x.view(), DType::kBF16);
      }
    }
  }
}

// As a GPU serves them: whole blocks of scales, and rows from a decode step's to a prefill chunk's.
TEST_F(LinearTest, ServedShapes) {
  Random random(11);
  for (auto [dtype, format] :
       {std::pair{DType::kF8E4M3, ActivationFormat::kFP8}, {DType::kBF16, ActivationFormat::kBF16}}) {
    const OwnedWeight first(dtype, 256, 2048, random), second(dtype, 64, 2048, random);
    for (int64_t rows : {1, 7, 16, 33, 64, 65, 128, 200}) {
      const OwnedActivation x = RandomActivation(format, rows, 2048, random);
      Check(rows, {&first, &second}, x.view(), rows == 33 ? DType::kF32 : DType::kBF16);
    }
  }
}

TEST_F(LinearTest, ColumnSlicesAreTensors) {
  Random random(6);
  const OwnedWeight w(DType::kBF16, 70, 130, random);
  const std::unique_ptr<Weight> weight = ops().MakeLinear({w.part()});
  Owned x(DType::kF32, {9, 400}), y(DType::kF32, {9, 100});
  x.FillNormal(random);
  const Tensor slice = x->Columns(200, 130);
  ops().Linear(y->Columns(20, 70), Activation{slice, Tensor()}, *weight);
  EXPECT_TRUE(CloseF32(Values(y->Columns(20, 70)), MatMul(Values(slice), Values(w.part()), 9, 70, 130)));
  for (int64_t t = 0; t < 9; ++t) {
    EXPECT_TRUE(std::isnan(Element(y, t, 19)) && std::isnan(Element(y, t, 90))) << "written outside";
  }
}

// The same row alone, among others, and in the other code path.
TEST_F(LinearTest, RowsDoNotDependOnTheirCompany) {
  Random random(7);
  for (DType dtype : kWeightTypes) {
    for (auto [out, in] : std::vector<std::pair<int64_t, int64_t>>{{300, 2100}, {144, 320}}) {
      const OwnedWeight w(dtype, out, in, random);
      const std::unique_ptr<Weight> weight = ops().MakeLinear({w.part()});
      const int64_t rows = 300;
      Owned x(DType::kF32, {rows, in}), together(DType::kF32, {rows, out});
      x.FillNormal(random);
      ops().Linear(together, Activation{x, Tensor()}, *weight);
      for (int64_t count : {1, 2, 3, 4, 5, 8, 33}) {
        const int64_t begin = 77;
        Owned some(DType::kF32, {count, out});
        ops().Linear(some, Activation{x->Rows(begin, count), Tensor()}, *weight);
        for (int64_t t = 0; t < count; ++t) ASSERT_TRUE(SameProduct(some, t, together, begin + t)) << count;
      }
    }
  }
}

TEST_F(LinearTest, ThreadsChangeNothing) {
  Random random(8);
  const OwnedWeight w(DType::kF8E4M3, 700, 1100, random);
  Owned x(DType::kF32, {9, 1100});
  x.FillNormal(random);
  const std::unique_ptr<Weight> weight = ops().MakeLinear({w.part()});
  Owned want(DType::kF32, {9, 700});
  ops().Linear(want, Activation{x, Tensor()}, *weight);
  for (int num_threads : {1, 3, 5}) {
    const auto other = testing::MakeTestBackend(testing::CpuOptions(num_threads));
    Owned got(DType::kF32, {9, 700});
    other->ops().Linear(got, Activation{x, Tensor()}, *weight);
    EXPECT_EQ(got.bytes(), want.bytes()) << num_threads;
  }
}

TEST_F(LinearTest, EverySimdTarget) {
  Random random(9);
  const std::vector<std::string> targets = testing::TestTargets();
  EXPECT_GE(targets.size(), 1u);
  for (const std::string& target : targets) {
    testing::UseTarget(target);
    EXPECT_TRUE(testing::TestsOnGpu() || SimdTargetName() == target) << target;
    for (DType dtype : kWeightTypes) {
      const OwnedWeight w(dtype, 150, 1100, random);
      for (int64_t rows : {1, 2, 4, 21}) {
        Owned x(DType::kF32, {rows, 1100});
        x.FillNormal(random);
        Check(rows, {&w}, Activation{x, Tensor()}, DType::kF32);
      }
    }
    OwnedActivation x(ActivationFormat::kFP8, 6, 1100);
    x.values.FillNormal(random, 40);
    x.scales.Fill(std::vector<double>(6 * 9, 0.01));
    const OwnedWeight w(DType::kF8E4M3, 150, 1100, random);
    Check(6, {&w}, x.view(), DType::kF32);
  }
}

TEST_F(LinearTest, GroupedRowsMeetTheirExpert) {
  Random random(10);
  constexpr int kExperts = 7;
  const int64_t out = 150, in = 320;
  for (DType dtype : {DType::kF8E4M3, DType::kBF16}) {
    std::vector<OwnedWeight> gate, up;
    std::vector<std::vector<WeightPart>> parts;
    for (int g = 0; g < kExperts; ++g) {
      gate.emplace_back(dtype, out, in, random);
      up.emplace_back(dtype, out, in, random);
      parts.push_back({gate[g].part(), up[g].part()});
    }
    const std::unique_ptr<Weight> experts = ops().MakeExperts(parts);
    EXPECT_EQ(experts->rows(), 2 * out);
    // No rows, one, a few, many; then one expert with all; then nothing at all.
    for (const std::vector<int32_t>& offsets : std::vector<std::vector<int32_t>>{
             {0, 0, 1, 4, 4, 104, 106, 106}, {0, 0, 0, 0, 120, 120, 120, 120}, {0, 0, 0, 0, 0, 0, 0, 0}}) {
      for (ActivationFormat format : {ActivationFormat::kF32, ActivationFormat::kBF16, ActivationFormat::kFP8}) {
        const OwnedActivation x = RandomActivation(format, 130, in, random);
        CheckGroups(gate, up, *experts, x.view(), offsets,
                    format == ActivationFormat::kF32 ? DType::kF32 : DType::kBF16);
      }
    }
  }
}

}  // namespace
}  // namespace cachalot
