// e4m3, bf16, f16 and scale rules against tables and definitions.
#include "kernels/cpu/quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "nlohmann/json.hpp"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

std::vector<double> E4m3Table() {
  std::ifstream file(std::string(CACHALOT_TEST_DATA_DIR) + "/kernels/data/numeric_vectors.json");
  const nlohmann::json json = nlohmann::json::parse(file);
  std::vector<double> table;
  for (const auto& value : json["e4m3"]) table.push_back(value.is_null() ? NAN : value.get<double>());
  return table;
}

TEST(E4m3, DecodesTheTable) {
  const std::vector<double> table = E4m3Table();
  ASSERT_EQ(table.size(), 128u);
  for (int byte = 0; byte < 127; ++byte) {
    EXPECT_EQ(E4m3ToFloat(static_cast<uint8_t>(byte)), table[byte]) << byte;
    EXPECT_EQ(E4m3ToFloat(static_cast<uint8_t>(byte | 0x80)), -table[byte]) << byte;
  }
  EXPECT_TRUE(std::isnan(E4m3ToFloat(0x7f)) && std::isnan(E4m3ToFloat(0xff)) && std::isnan(table[127]));
}

TEST(E4m3, RoundsToTheNearestTiesToEven) {
  const std::vector<double> table = E4m3Table();
  for (int byte = 0; byte < 126; ++byte) {
    const double low = table[byte], high = table[byte + 1], middle = (low + high) / 2;
    const int even = byte % 2 == 0 ? byte : byte + 1;
    EXPECT_EQ(FloatToE4m3(static_cast<float>(low)), byte);
    EXPECT_EQ(FloatToE4m3(static_cast<float>(middle)), even) << byte;
    EXPECT_EQ(FloatToE4m3(std::nextafter(static_cast<float>(middle), 0.0f)), byte) << byte;
    EXPECT_EQ(FloatToE4m3(std::nextafter(static_cast<float>(middle), 1000.0f)), byte + 1) << byte;
    EXPECT_EQ(FloatToE4m3(-static_cast<float>(middle)), even | 0x80) << byte;
  }
  EXPECT_EQ(FloatToE4m3(1e9f), 126);
  EXPECT_EQ(FloatToE4m3(-std::numeric_limits<float>::infinity()), 126 | 0x80);
  EXPECT_EQ(FloatToE4m3(NAN) & 0x7f, 0x7f);
}

TEST(Bf16, RoundsToTheNearestTiesToEven) {
  EXPECT_EQ(FloatToBf16(1.0f), 0x3f80);
  EXPECT_EQ(FloatToBf16(1.0f + 0x1p-8f), 0x3f80);            // a tie, down to even
  EXPECT_EQ(FloatToBf16(1.0f + 0x1p-7f + 0x1p-8f), 0x3f82);  // a tie, up to even
  EXPECT_EQ(FloatToBf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81);
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(NAN))));
  EXPECT_TRUE(std::isinf(Bf16ToFloat(FloatToBf16(std::numeric_limits<float>::max()))));
}

TEST(F16, Decodes) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    _Float16 half;
    const uint16_t word = static_cast<uint16_t>(bits);
    std::memcpy(&half, &word, 2);
    const float want = static_cast<float>(half), got = F16ToFloat(word);
    ASSERT_TRUE(got == want || (std::isnan(got) && std::isnan(want))) << bits;
  }
}

TEST(QuantScale, FollowsTheRule) {
  EXPECT_EQ(QuantScale(0, ScaleRule::kFP32), 1e-4f / 448);
  EXPECT_EQ(QuantScale(3.5f, ScaleRule::kFP32), 3.5f / 448);
  EXPECT_EQ(QuantScale(448, ScaleRule::kUE8M0), 1);
  EXPECT_EQ(QuantScale(448.1f, ScaleRule::kUE8M0), 2);
  EXPECT_EQ(QuantScale(1, ScaleRule::kUE8M0), 0x1p-8f);
  for (double x = 1e-5; x < 1e5; x *= 1.37) {
    const float amax = static_cast<float>(x);
    const double want = std::exp2(std::ceil(std::log2(static_cast<double>(std::max(amax, 1e-4f) / 448.0f))));
    EXPECT_EQ(QuantScale(amax, ScaleRule::kUE8M0), want) << amax;
  }
}

}  // namespace
}  // namespace cachalot
