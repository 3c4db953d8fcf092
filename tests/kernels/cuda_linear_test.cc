// Products on tensor cores against the oracle's arithmetic, bit for bit: FP8 and bf16, alone and by expert, at V3's
// shapes (fewer rows of the weight where the oracle would take long) and at ugly ones.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::Owned;
using testing::OwnedActivation;
using testing::OwnedWeight;
using testing::Random;
using testing::RandomActivation;

class CudaLinearTest : public ::testing::Test {
 protected:
  static BackendOptions OracleOptions() {
    BackendOptions options = testing::CpuOptions(0);
    options.device = "cpu";
    options.value_dtype = DType::kBF16;
    return options;
  }
  static ActivationFormat FormatOf(DType dtype) {
    return dtype == DType::kBF16 ? ActivationFormat::kBF16 : ActivationFormat::kFP8;
  }
  static void ExpectSameBits(const Owned& got, const Owned& want, const std::string& what) {
    const std::vector<uint8_t> a = got.bytes(), b = want.bytes();
    size_t num_different = 0;
    for (size_t i = 0; i < a.size(); ++i) num_different += a[i] != b[i];
    EXPECT_EQ(num_different, 0u) << "of " << a.size() << " bytes: " << what;
  }

  std::unique_ptr<Backend> gpu_ = testing::MakeTestBackend(testing::CpuOptions());
  std::unique_ptr<Backend> oracle_ = *MakeBackend(OracleOptions());
};

TEST_F(CudaLinearTest, ProductsAreTheOraclesBitForBit) {
  struct Case {
    int64_t out, in;
    std::vector<int64_t> rows;
  };
  const std::vector<Case> cases = {{2112, 7168, {1, 8, 17}},   {384, 7168, {64, 65, 129, 300}},
                                   {1024, 1536, {1, 33, 128}}, {256, 16384, {1, 64, 200}},
                                   {640, 2048, {5, 100}},      {300, 1040, {3, 70}},
                                   {129, 16, {1, 9}},          {1, 128, {2}}};
  Random random(11);
  for (DType dtype : {DType::kF8E4M3, DType::kBF16}) {
    for (const Case& c : cases) {
      const OwnedWeight w(dtype, c.out, c.in, random);
      const auto on_gpu = gpu_->ops().MakeLinear({w.part()}), on_cpu = oracle_->ops().MakeLinear({w.part()});
      for (int64_t rows : c.rows) {
        const OwnedActivation x = RandomActivation(FormatOf(dtype), rows, c.in, random);
        for (DType y_type : {DType::kF32, DType::kBF16}) {
          Owned got(y_type, {rows, c.out}), want(y_type, {rows, c.out});
          gpu_->ops().Linear(got, x.view(), *on_gpu);
          oracle_->ops().Linear(want, x.view(), *on_cpu);
          ExpectSameBits(got, want, absl::StrCat(rows, " rows, ", c.out, "x", c.in, " ", DTypeName(dtype)));
        }
      }
    }
  }
}

TEST_F(CudaLinearTest, GroupedProductsAreTheOraclesBitForBit) {
  Random random(12);
  constexpr int64_t kOut = 384, kIn = 2048;
  std::vector<OwnedWeight> weights;
  std::vector<std::vector<WeightPart>> slots;
  for (int g = 0; g < 5; ++g) {
    weights.emplace_back(DType::kF8E4M3, kOut, kIn, random);
    slots.push_back({weights.back().part()});
  }
  const auto on_gpu = gpu_->ops().MakeExperts(slots), on_cpu = oracle_->ops().MakeExperts(slots);
  for (const std::vector<int32_t>& counts :
       {std::vector<int32_t>{1, 0, 7, 64, 130}, std::vector<int32_t>{0, 0, 90, 0, 0}}) {
    Owned offsets(DType::kI32, {6});
    std::vector<int32_t> ends = {0};
    for (int32_t count : counts) ends.push_back(ends.back() + count);
    offsets.Set(ends);
    const OwnedActivation x = RandomActivation(ActivationFormat::kFP8, ends.back(), kIn, random);
    Owned got(DType::kBF16, {ends.back(), kOut}), want(DType::kBF16, {ends.back(), kOut});
    gpu_->ops().GroupedLinear(got, x.view(), *on_gpu, offsets);
    oracle_->ops().GroupedLinear(want, x.view(), *on_cpu, offsets);
    ExpectSameBits(got, want, "grouped");
  }
}

}  // namespace
}  // namespace cachalot
