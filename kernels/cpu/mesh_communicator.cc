// MeshCommunicator: a message for each rank: how many rows each of its slots gets, then the rows.
#include "kernels/cpu/mesh_communicator.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/cpu/combine_kernels.h"

namespace cachalot {
namespace {

int64_t RowBytes(const Tensor& x) { return x.empty() ? 0 : x.row_elements() * DTypeBytes(x.dtype); }
char* RowOf(const Tensor& x, int64_t row) {
  return static_cast<char*>(x.data) + row * x.row_stride * DTypeBytes(x.dtype);
}

}  // namespace

// -> outboxes, row_of_, num_sent_.
void MeshCommunicator::Pack(const Activation& x, const Tensor& topk_slots, int64_t num_slots) {
  const int64_t value_bytes = RowBytes(x.values), scale_bytes = RowBytes(x.scales);
  const int64_t num_all = num_slots * num_ranks(), header = num_slots * sizeof(int32_t);
  std::vector<int32_t> counts(num_all), next(num_all);
  for (int64_t t = 0; t < num_tokens_; ++t) {
    for (int64_t k = 0; k < num_choices_; ++k) {
      const int32_t slot = topk_slots.row<int32_t>(t)[k];
      CHECK(slot < num_all, "slot {} of {}", slot, num_all);
      if (slot >= 0) ++counts[slot];
    }
  }
  num_sent_.assign(num_ranks(), 0);
  std::vector<int32_t> first(num_ranks() + 1);  // row that left for a rank
  for (int r = 0; r < num_ranks(); ++r) {
    for (int64_t slot = r * num_slots; slot < (r + 1) * num_slots; ++slot) {
      next[slot] = first[r] + num_sent_[r];
      num_sent_[r] += counts[slot];
    }
    first[r + 1] = first[r] + num_sent_[r];
    mesh_.outbox(r).resize(header + num_sent_[r] * (value_bytes + scale_bytes));
    std::memcpy(mesh_.outbox(r).data(), counts.data() + r * num_slots, header);
  }
  row_of_.resize(num_tokens_ * num_choices_);
  for (int64_t t = 0; t < num_tokens_; ++t) {
    for (int64_t k = 0; k < num_choices_; ++k) {
      const int32_t slot = topk_slots.row<int32_t>(t)[k];
      const int32_t row = row_of_[t * num_choices_ + k] = slot < 0 ? -1 : next[slot]++;
      if (row < 0) continue;
      const int64_t r = slot / num_slots;
      char* packed = mesh_.outbox(static_cast<int>(r)).data() + header + (row - first[r]) * (value_bytes + scale_bytes);
      std::memcpy(packed, RowOf(x.values, t), value_bytes);
      if (scale_bytes > 0) std::memcpy(packed + value_bytes, RowOf(x.scales, t), scale_bytes);
    }
  }
}

// What came -> rows, origin_.
absl::Status MeshCommunicator::Place(const ExpertRows& rows, const std::vector<Mesh::Bytes>& came) {
  const int64_t num_slots = rows.offsets.dim(0) - 1, header = num_slots * sizeof(int32_t);
  const int64_t value_bytes = RowBytes(rows.x.values), scale_bytes = RowBytes(rows.x.scales);
  std::vector<std::vector<int32_t>> counts(num_ranks(), std::vector<int32_t>(num_slots));
  for (int r = 0; r < num_ranks(); ++r) {
    int64_t num_rows = -1;
    if (static_cast<int64_t>(came[r].size()) >= header) {
      std::memcpy(counts[r].data(), came[r].data(), header);
      num_rows = 0;
      for (int32_t count : counts[r]) num_rows += count;
    }
    if (static_cast<int64_t>(came[r].size()) != header + num_rows * (value_bytes + scale_bytes)) {
      return absl::InternalError(absl::StrFormat("rank %d sent %d bytes of rows", r, came[r].size()));
    }
  }
  int32_t* offsets = rows.offsets.as<int32_t>();
  origin_.assign(num_ranks(), {});
  int32_t row = 0;
  for (int64_t g = 0; g < num_slots; ++g) {
    offsets[g] = row;
    for (int r = 0; r < num_ranks(); ++r) {
      for (int32_t i = 0; i < counts[r][g]; ++i) origin_[r].push_back(row++);
    }
  }
  offsets[num_slots] = row;
  if (row > rows.x.rows()) {
    return absl::InternalError(absl::StrFormat("%d rows for experts, room for %d", row, rows.x.rows()));
  }
  for (int r = 0; r < num_ranks(); ++r) {
    const char* packed = came[r].data() + header;
    for (const int32_t to : origin_[r]) {
      std::memcpy(RowOf(rows.x.values, to), packed, value_bytes);
      if (scale_bytes > 0) std::memcpy(RowOf(rows.x.scales, to), packed + value_bytes, scale_bytes);
      packed += value_bytes + scale_bytes;
    }
  }
  return absl::OkStatus();
}

void MeshCommunicator::Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                                const Tensor& topk_weights) {
  CheckDispatch(rows, x, topk_slots, topk_weights);
  num_tokens_ = x.rows();
  num_choices_ = topk_slots.dim(1);
  topk_weights_ = topk_weights;
  Pack(x, topk_slots, rows.offsets.dim(0) - 1);
  const auto came = mesh_.Exchange();
  const absl::Status status = came.ok() ? Place(rows, *came) : came.status();
  if (status.ok()) return;
  device_.Fail(status);
  std::fill_n(rows.offsets.as<int32_t>(), rows.offsets.dim(0), 0);  // whatever of the step still runs has no rows
  origin_.assign(num_ranks(), {});
}

void MeshCommunicator::Combine(const Tensor& out, const Tensor& y, const Tensor& shared) {
  CheckCombine(out, y, shared, num_tokens_);
  const int64_t bytes = RowBytes(y);
  for (int r = 0; r < num_ranks(); ++r) {
    mesh_.outbox(r).resize(origin_[r].size() * bytes);
    char* packed = mesh_.outbox(r).data();
    for (const int32_t row : origin_[r]) {
      std::memcpy(packed, RowOf(y, row), bytes);
      packed += bytes;
    }
  }
  const auto came = mesh_.Exchange();
  if (!came.ok()) return device_.Fail(came.status());
  returned_.clear();
  for (int r = 0; r < num_ranks(); ++r) {
    if (static_cast<int64_t>((*came)[r].size()) != num_sent_[r] * bytes) {
      return device_.Fail(absl::InternalError(absl::StrFormat("rank %d returned %d bytes", r, (*came)[r].size())));
    }
    returned_.insert(returned_.end(), (*came)[r].begin(), (*came)[r].end());
  }
  const Tensor results(returned_.data(), y.dtype, {static_cast<int64_t>(returned_.size()) / bytes, out.dim(1)});
  CombineRows(out, results, topk_weights_, row_of_.data(), shared, &pool_);
}

}  // namespace cachalot
