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
using testing::SetElement;
using testing::Values;

constexpr int32_t kSlots = 9;
constexpr int64_t kChoices = 3;

// Slot 4 gets nothing, slot 2 a row of every token; every fifth token is padding.
std::vector<int32_t> RandomSlots(int64_t rows, Random& random) {
  std::vector<int32_t> slots(rows * kChoices);
  for (int64_t i = 0; i < rows * kChoices; ++i) {
    const int64_t t = i / kChoices, k = i % kChoices;
    const int32_t slot = random.Below(3) + (k == 2 ? 5 : 0);
    slots[i] = t % 5 == 4 ? -1 : k == 1 ? 2 : slot;
  }
  return slots;
}

// (token, choice) of every row: by slot, then in order of tokens, then of choices.
std::vector<std::pair<int64_t, int64_t>> RowsBySlot(const std::vector<int32_t>& slots, std::vector<int32_t>* offsets) {
  std::vector<std::pair<int64_t, int64_t>> rows;
  *offsets = {0};
  for (int32_t g = 0; g < kSlots; ++g) {
    for (int64_t i = 0; i < static_cast<int64_t>(slots.size()); ++i) {
      if (slots[i] == g) rows.push_back({i / kChoices, i % kChoices});
    }
    offsets->push_back(static_cast<int32_t>(rows.size()));
  }
  return rows;
}

TEST(LocalCommunicator, GroupsRowsAndCombinesThem) {
  Random random(1);
  const auto backend = testing::MakeTestBackend(testing::CpuOptions());
  for (int64_t rows : {0, 1, 7, 129, 300}) {
    for (int64_t cols : {320, 77}) {
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        const std::vector<int32_t> slots = RandomSlots(rows, random);
        std::vector<int32_t> ends;
        const auto want_rows = RowsBySlot(slots, &ends);
        const int64_t capacity = rows * kChoices + 2;
        Owned x(dtype, {rows, cols}), grouped(dtype, {capacity, cols}), topk_slots(DType::kI32, {rows, kChoices}),
            weights(DType::kF32, {rows, kChoices}), offsets(DType::kI32, {kSlots + 1});
        x.FillNormal(random);
        weights.FillNormal(random);
        backend->communicator().Dispatch({Activation{grouped, Tensor()}, offsets}, Activation{x, Tensor()},
                                         topk_slots.Set(slots), weights);
        EXPECT_EQ(std::vector<int32_t>(offsets.data<int32_t>(), offsets.data<int32_t>() + kSlots + 1), ends);
        for (size_t row = 0; row < want_rows.size(); ++row) {
          EXPECT_TRUE(SameRow(grouped, row, x, want_rows[row].first));
        }

        // NOTE: rows of y that belong to nobody stay NaN.
        for (bool has_shared : {true, false}) {
          Owned y(dtype, {capacity, cols}), shared(dtype, {rows, cols}), out(dtype, {rows, cols});
          for (size_t row = 0; row < want_rows.size(); ++row) {
            for (int64_t c = 0; c < cols; ++c) SetElement(y, row, c, random.Normal());
          }
          shared.FillNormal(random);
          backend->communicator().Combine(out, y, has_shared ? *shared : Tensor());
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

TEST(LocalCommunicator, QuantisedRowsTravelWithTheirScales) {
  Random random(3);
  const auto backend = testing::MakeTestBackend(testing::CpuOptions());
  const int64_t rows = 11, cols = 300;
  OwnedActivation x(ActivationFormat::kFP8, rows, cols), grouped(ActivationFormat::kFP8, rows * kChoices, cols);
  x.values.FillNormal(random);
  x.scales.FillNormal(random);
  const std::vector<int32_t> slots = RandomSlots(rows, random);
  std::vector<int32_t> ends;
  const auto want_rows = RowsBySlot(slots, &ends);
  Owned topk_slots(DType::kI32, {rows, kChoices}), weights(DType::kF32, {rows, kChoices}),
      offsets(DType::kI32, {kSlots + 1});
  backend->communicator().Dispatch({grouped.view(), offsets}, x.view(), topk_slots.Set(slots), weights);
  for (size_t row = 0; row < want_rows.size(); ++row) {
    EXPECT_TRUE(SameRow(grouped.values, row, x.values, want_rows[row].first));
    EXPECT_TRUE(SameRow(grouped.scales, row, x.scales, want_rows[row].first));
  }
}

// The sum is in order of k and in fp32: exactly what a loop of fused multiply-adds gives.
TEST(LocalCommunicator, AddsInOrderOfChoice) {
  Random random(2);
  const auto backend = testing::MakeTestBackend(testing::CpuOptions());
  Owned x(DType::kF32, {1, 64}), grouped(DType::kF32, {4, 64}), topk_slots(DType::kI32, {1, 4}),
      offsets(DType::kI32, {5}), weights(DType::kF32, {1, 4}), shared(DType::kF32, {1, 64}), out(DType::kF32, {1, 64}),
      y(DType::kF32, {4, 64});
  x.FillNormal(random);
  weights.FillNormal(random, 1000);
  shared.FillNormal(random);
  y.FillNormal(random);
  backend->communicator().Dispatch({Activation{grouped, Tensor()}, offsets}, Activation{x, Tensor()},
                                   topk_slots.Set({3, 0, 2, 1}), weights);
  backend->communicator().Combine(out, y, shared);
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
