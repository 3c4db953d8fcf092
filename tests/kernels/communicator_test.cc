// LocalCommunicator: rows grouped by slot in a stable order, and sums that come back to their token.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::CloseBf16;
using testing::CloseF32;
using testing::Element;
using testing::Owned;
using testing::OwnedActivation;
using testing::Random;
using testing::SameRow;
using testing::Values;

TEST(LocalCommunicator, GroupsRowsAndCombinesThem) {
  Random random(1);
  const auto backend = testing::MakeCpu(testing::CpuOptions());
  constexpr int64_t kSlots = 9, kChoices = 3;
  for (int64_t rows : {0, 1, 7, 129}) {
    for (ActivationFormat format : {ActivationFormat::kF32, ActivationFormat::kBF16, ActivationFormat::kFP8}) {
      for (int64_t cols : {320, 77}) {
        OwnedActivation x(format, rows, cols), grouped(format, rows * kChoices + 2, cols);
        x.values.FillNormal(random);
        if (format == ActivationFormat::kFP8) x.scales.FillNormal(random);
        Owned topk_slots(DType::kI32, {rows, kChoices}), weights(DType::kF32, {rows, kChoices}),
            offsets(DType::kI32, {kSlots + 1});
        std::vector<int32_t> slots(rows * kChoices);
        // Slot 4 gets nothing, slot 2 a row of every token; every fifth token is padding.
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t k = 0; k < kChoices; ++k) {
            const int32_t slot = random.Below(3) + (k == 2 ? 5 : 0);
            slots[t * kChoices + k] = t % 5 == 4 ? -1 : k == 1 ? 2 : slot;
          }
        }
        weights.FillNormal(random);
        backend->communicator().Dispatch({grouped.view(), offsets}, x.view(), topk_slots.Set(slots));

        // Stable: for each slot, tokens in order, then choices.
        std::vector<std::pair<int64_t, int64_t>> want_rows;
        const int32_t* ends = offsets.data<int32_t>();
        EXPECT_EQ(ends[0], 0);
        for (int32_t g = 0; g < kSlots; ++g) {
          for (int64_t i = 0; i < rows * kChoices; ++i) {
            if (slots[i] == g) want_rows.push_back({i / kChoices, i % kChoices});
          }
          EXPECT_EQ(ends[g + 1], static_cast<int32_t>(want_rows.size()));
        }
        for (size_t row = 0; row < want_rows.size(); ++row) {
          EXPECT_TRUE(SameRow(grouped.values, row, x.values, want_rows[row].first));
          if (format == ActivationFormat::kFP8) {
            EXPECT_TRUE(SameRow(grouped.scales, row, x.scales, want_rows[row].first));
          }
        }

        for (DType dtype : {DType::kF32, DType::kBF16}) {
          for (bool has_shared : {true, false}) {
            Owned y(dtype, {rows * kChoices + 2, cols}), shared(dtype, {rows, cols}), out(dtype, {rows, cols});
            y.FillNormal(random);
            shared.FillNormal(random);
            for (size_t row = want_rows.size(); row < static_cast<size_t>(rows * kChoices + 2); ++row) {
              for (int64_t c = 0; c < cols && dtype == DType::kF32; ++c) y->row<float>(row)[c] = NAN;  // nobody's rows
            }
            backend->communicator().Combine(out, y, weights, has_shared ? *shared : Tensor());
            std::vector<double> want = has_shared ? Values(shared) : std::vector<double>(rows * cols, 0.0);
            for (size_t row = 0; row < want_rows.size(); ++row) {
              const auto [t, k] = want_rows[row];
              for (int64_t c = 0; c < cols; ++c) want[t * cols + c] += Element(weights, t, k) * Element(y, row, c);
            }
            EXPECT_TRUE(dtype == DType::kF32 ? CloseF32(Values(out), want) : CloseBf16(Values(out), want));
          }
        }
      }
    }
  }
}

// The sum is in order of k and in fp32: exactly what a loop of fused multiply-adds gives.
TEST(LocalCommunicator, AddsInOrderOfChoice) {
  Random random(2);
  const auto backend = testing::MakeCpu(testing::CpuOptions());
  Owned x(DType::kF32, {1, 64}), grouped(DType::kF32, {4, 64}), topk_slots(DType::kI32, {1, 4}),
      offsets(DType::kI32, {5}), weights(DType::kF32, {1, 4}), shared(DType::kF32, {1, 64}), out(DType::kF32, {1, 64}),
      y(DType::kF32, {4, 64});
  x.FillNormal(random);
  weights.FillNormal(random, 1000);
  shared.FillNormal(random);
  y.FillNormal(random);
  backend->communicator().Dispatch({Activation{grouped, Tensor()}, offsets}, Activation{x, Tensor()},
                                   topk_slots.Set({3, 0, 2, 1}));
  backend->communicator().Combine(out, y, weights, shared);
  const int64_t row_of[] = {3, 0, 2, 1};
  for (int64_t c = 0; c < 64; ++c) {
    float sum = shared.data<float>()[c], plain = sum;
    for (int k = 0; k < 4; ++k) {
      sum = std::fma(weights.data<float>()[k], y->row<float>(row_of[k])[c], sum);
      plain += weights.data<float>()[k] * y->row<float>(row_of[k])[c];
    }
    EXPECT_TRUE(out.data<float>()[c] == sum || out.data<float>()[c] == plain) << c;
  }
}

}  // namespace
}  // namespace cachalot
