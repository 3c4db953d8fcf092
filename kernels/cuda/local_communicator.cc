// CudaLocalCommunicator: a stable grouping, copies, and weighted sums.
#include "kernels/cuda/local_communicator.h"

#include <algorithm>

#include "kernels/cuda/communicator_kernels.h"
#include "kernels/cuda/cuda_ops.h"

namespace cachalot {

void GroupAndScatter(CudaStream* stream, const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                     int32_t first_slot, int32_t* row_of) {
  const int64_t num_slots = rows.offsets.dim(0) - 1;
  CHECK(num_slots > 0, "offsets of no slot");
  const GroupRowsArgs group = {.topk_slots = topk_slots.as<int32_t>(),
                               .topk_slots_stride = topk_slots.row_stride,
                               .row_of = row_of,
                               .offsets = rows.offsets.as<int32_t>(),
                               .num_tokens = static_cast<int32_t>(topk_slots.dim(0)),
                               .num_choices = static_cast<int32_t>(topk_slots.dim(1)),
                               .first_slot = first_slot,
                               .num_slots = static_cast<int32_t>(num_slots),
                               .capacity = static_cast<int32_t>(rows.x.rows())};
  ScatterRowsArgs scatter = {.values = RowCopyOf(rows.x.values, x.values, DTypeBytes(x.values.dtype)),
                             .scales = {},
                             .row_of = row_of,
                             .num_choices = static_cast<int32_t>(topk_slots.dim(1))};
  if (!x.scales.empty()) scatter.scales = RowCopyOf(rows.x.scales, x.scales, sizeof(float));
  LaunchDispatch(stream->get(), group, scatter);
  stream->Launched("Dispatch");
}

absl::StatusOr<std::unique_ptr<CudaLocalCommunicator>> CudaLocalCommunicator::Make(const OpLimits& limits,
                                                                                   Device* device, CudaStream* stream) {
  const size_t choices = static_cast<size_t>(limits.max_tokens) * limits.num_experts_per_tok;
  absl::StatusOr<Buffer> row_of =
      device->Allocate(std::max<size_t>(choices, 1) * sizeof(int32_t), Device::Memory::kDevice);
  if (!row_of.ok()) return row_of.status();
  return std::unique_ptr<CudaLocalCommunicator>(new CudaLocalCommunicator(stream, *std::move(row_of)));
}

void CudaLocalCommunicator::Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                                     const Tensor& topk_weights) {
  CheckDispatch(rows, x, topk_slots, topk_weights);
  num_tokens_ = x.rows();
  num_choices_ = topk_slots.dim(1);
  topk_weights_ = topk_weights;
  if (!x.scales.empty()) CheckActivation(rows.x, rows.x.rows(), x.cols());
  CHECK(static_cast<size_t>(num_tokens_ * num_choices_) * sizeof(int32_t) <= row_of_.bytes(), "{} tokens", num_tokens_);
  GroupAndScatter(&stream_, rows, x, topk_slots, 0, static_cast<int32_t*>(row_of_.data()));
}

void CudaLocalCommunicator::Combine(const Tensor& out, const Tensor& y, const Tensor& shared) {
  CheckCombine(out, y, shared, num_tokens_);
  const int64_t cols = out.dim(1);
  CHECK(out.dtype == DType::kF32 || out.dtype == DType::kBF16, "sums are {}", DTypeName(out.dtype));
  if (num_tokens_ == 0) return;
  LaunchCombine(stream_.get(),
                {.out = RefOf(out),
                 .y = RefOf(y),
                 .shared = RefOf(shared),
                 .weights = topk_weights_.as<float>(),
                 .weights_stride = topk_weights_.row_stride,
                 .row_of = static_cast<const int32_t*>(row_of_.data()),
                 .num_choices = static_cast<int32_t>(num_choices_),
                 .cols = static_cast<int32_t>(cols)},
                num_tokens_);
  stream_.Launched("Combine");
}

}  // namespace cachalot
