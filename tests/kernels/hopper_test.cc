// The oracle's tensor core arithmetic against sums worked out by hand.
#include "kernels/cpu/hopper.h"

#include <gtest/gtest.h>

#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::Owned;

// x * w, one row each, FP8 with scales of 1.
float Product(DType dtype, std::vector<double> x, std::vector<double> w, int64_t num_splits = 1) {
  const int64_t cols = static_cast<int64_t>(x.size()), groups = (cols + kQuantGroup - 1) / kQuantGroup;
  Owned xs(dtype, {1, cols}), ws(dtype, {1, cols}), scales(DType::kF32, {1, groups}), y(DType::kF32, {1, 1});
  xs.Fill(x);
  ws.Fill(w);
  scales.Fill(std::vector<double>(groups, 1.0));
  const RowBlock block = {static_cast<const uint8_t*>(ws->data),
                          static_cast<const uint8_t*>(scales->data),
                          cols * DTypeBytes(dtype),
                          0,
                          1,
                          dtype};
  TensorCoreBlock(block, Activation{xs, dtype == DType::kF8E4M3 ? *scales : Tensor()}, y, num_splits);
  return *y.data<float>();
}

std::vector<double> Padded(std::vector<double> values, size_t size) {
  values.resize(size);
  return values;
}

constexpr DType kF8 = DType::kF8E4M3, kBf16 = DType::kBF16;

TEST(HopperTest, ExactWhereItFits) {
  for (DType dtype : {kF8, kBf16}) {
    EXPECT_EQ(Product(dtype, {1, 2, -3, 4}, {5, 6, 7, -8}), 5 + 12 - 21 - 32) << DTypeName(dtype);
    EXPECT_EQ(Product(dtype, std::vector<double>(300, 1.5), std::vector<double>(300, -2)), -900) << DTypeName(dtype);
    EXPECT_EQ(Product(dtype, {0, 0, 0}, {1, 2, 3}), 0) << DTypeName(dtype);
  }
}

// 13 bits below the largest product's exponent are kept, of every product, before they are added.
TEST(HopperTest, Fp8ProductsAreCutWhenTheyAreAligned) {
  EXPECT_EQ(Product(kF8, {1, 0x1p-7}, {1, 0x1p-6}), 1 + 0x1p-13);
  EXPECT_EQ(Product(kF8, {1, 0x1p-7}, {1, 0x1p-7}), 1);
  EXPECT_EQ(Product(kF8, {1, 0x1p-7, 0x1p-7}, {1, 0x1p-7, 0x1p-7}), 1) << "two halves of a unit are nothing";
  EXPECT_EQ(Product(kF8, {1, 0x1p-7}, {1, -0x1p-7}), 1) << "towards zero";
  EXPECT_EQ(Product(kF8, {-1, 0x1p-7}, {1, 3 * 0x1p-7}), -1 + 0x1p-13);
  // A product's exponent is the sum of its factors', though 1.5 * 1.5 is more than 2.
  EXPECT_EQ(Product(kF8, {1.5, -1.5, 0x1p-7}, {1.5, 1.5, 0x1p-6}), 0x1p-13);
}

// The accumulator counts as one of the products, and keeps 13 bits; every 128 values begin a new one.
TEST(HopperTest, Fp8AccumulatorIsCutToo) {
  std::vector<double> x = Padded({256}, 128), w = Padded({256}, 128);
  x[32] = w[32] = 2;  // the next instruction: 4 below 65536 is half a unit of 8
  EXPECT_EQ(Product(kF8, x, w), 65536);
  x[32] = 4;
  EXPECT_EQ(Product(kF8, x, w), 65536 + 8);
  x = Padded({256}, 256), w = Padded({256}, 256);
  x[128] = w[128] = 1;  // promoted in fp32
  EXPECT_EQ(Product(kF8, x, w), 65537);
  EXPECT_EQ(Product(kF8, x, w, 2), 65537);
}

TEST(HopperTest, Bf16KeepsTwentyFiveBits) {
  EXPECT_EQ(Product(kBf16, {1, 0x1p-12}, {1, 0x1p-12}), 1) << "the result is cut to 23";
  EXPECT_EQ(Product(kBf16, {1, 0x1p-12, 0x1p-12}, {1, 0x1p-12, 0x1p-12}), 1 + 0x1p-23) << "but the sum is not";
  EXPECT_EQ(Product(kBf16, {1, 0x1p-13, 0x1p-13}, {1, 0x1p-12, 0x1p-12}), 1) << "25 bits are kept of each";
  EXPECT_EQ(Product(kBf16, {1, -1, 0x1p-13}, {1, 1, 0x1p-12}), 0x1p-25);
  EXPECT_EQ(Product(kBf16, {1, -1, 0x1p-13}, {1, 1, 0x1p-13}), 0);
}

}  // namespace
}  // namespace cachalot
