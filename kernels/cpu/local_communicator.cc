// LocalCommunicator: a counting sort, copies, and weighted sums.
#include "kernels/cpu/local_communicator.h"

#include <algorithm>

#include "kernels/cpu/combine_kernels.h"
#include "kernels/cpu/elementwise_kernels.h"

namespace cachalot {
namespace {

constexpr int64_t kTokensPerTask = 8;

}  // namespace

LocalCommunicator::LocalCommunicator(const OpLimits& limits, ThreadPool* pool)
    : pool_(*pool), row_of_(static_cast<size_t>(limits.max_tokens) * limits.num_experts_per_tok) {}

void LocalCommunicator::Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                                 const Tensor& topk_weights) {
  CheckDispatch(rows, x, topk_slots, topk_weights);
  num_tokens_ = x.rows();
  num_choices_ = topk_slots.dim(1);
  topk_weights_ = topk_weights;
  CHECK(num_tokens_ * num_choices_ <= static_cast<int64_t>(row_of_.size()), "{} tokens", num_tokens_);
  const int64_t num_slots = rows.offsets.dim(0) - 1;
  int32_t* offsets = rows.offsets.as<int32_t>();

  // offsets[g + 1] counts slot g, then where it begins, then where its next row goes: in the end, where it ends.
  std::fill_n(offsets, num_slots + 1, 0);
  for (int64_t t = 0; t < num_tokens_; ++t) {
    for (int64_t k = 0; k < num_choices_; ++k) {
      const int32_t slot = topk_slots.row<int32_t>(t)[k];
      CHECK(slot < num_slots, "slot {} of {}", slot, num_slots);
      if (slot >= 0) ++offsets[slot + 1];
    }
  }
  int32_t next = 0;
  for (int64_t g = 0; g < num_slots; ++g) {
    const int32_t count = offsets[g + 1];
    offsets[g + 1] = next;
    next += count;
  }
  CHECK(next <= rows.x.rows(), "{} rows of {}", next, rows.x.rows());
  for (int64_t t = 0; t < num_tokens_; ++t) {
    for (int64_t k = 0; k < num_choices_; ++k) {
      const int32_t slot = topk_slots.row<int32_t>(t)[k];
      row_of_[t * num_choices_ + k] = slot < 0 ? -1 : offsets[slot + 1]++;
    }
  }

  const auto copy = [&](int64_t t) {
    for (int64_t k = 0; k < num_choices_; ++k) {
      const int32_t row = row_of_[t * num_choices_ + k];
      if (row < 0) continue;
      CopyOrClearRow(rows.x.values, row, x.values, t);
      if (!x.scales.empty()) CopyOrClearRow(rows.x.scales, row, x.scales, t);
    }
  };
  pool_.Run((num_tokens_ + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task, int) {
    const int64_t begin = task * kTokensPerTask, end = std::min(num_tokens_, begin + kTokensPerTask);
    for (int64_t t = begin; t < end; ++t) copy(t);
  });
}

void LocalCommunicator::Combine(const Tensor& out, const Tensor& y, const Tensor& shared) {
  CheckCombine(out, y, shared, num_tokens_);
  CombineRows(out, y, topk_weights_, row_of_.data(), shared, &pool_);
}

}  // namespace cachalot
