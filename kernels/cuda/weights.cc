// CudaOps: weights. Memory is laid out here, the bytes come by the loader or, for weights without data, by a kernel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/weights_kernels.h"
#include "kernels/half_float.h"

namespace cachalot {
namespace {

constexpr int64_t kRowAlignment = 16, kArrayAlignment = 256;
// What cudaMalloc rounds up to: from a size on the pages of the device.
constexpr int64_t kLargeAllocation = 1 << 20, kLargeAlignment = 2 << 20, kSmallAlignment = 512;

int64_t AlignUp(int64_t n, int64_t alignment) { return (n + alignment - 1) / alignment * alignment; }
int64_t NumScaleBlocks(int64_t n) { return (n + kQuantGroup - 1) / kQuantGroup; }

NumberType StoredType(DType dtype) {
  switch (dtype) {
    case DType::kF32: return NumberType::kF32;
    case DType::kBF16: return NumberType::kBF16;
    case DType::kF16: return NumberType::kF16;
    default: break;
  }
  CHECK(dtype == DType::kF8E4M3, "a weight of {}", DTypeName(dtype));
  return NumberType::kE4M3;
}

int64_t NumberBytes(NumberType type) { return type == NumberType::kF32 ? 4 : type == NumberType::kE4M3 ? 1 : 2; }

void CheckPart(const WeightPart& part, const Tensor& first) {
  CHECK_SHAPE(part.weight, -1, first.dim(1));
  CHECK(part.weight.dtype == first.dtype && part.weight.is_contiguous(), "{}", part.weight.ToString());
  if (part.weight.dtype != DType::kF8E4M3) return;
  CHECK_SHAPE(part.scale, NumScaleBlocks(part.weight.dim(0)), NumScaleBlocks(part.weight.dim(1)));
  CHECK(part.scale.dtype == DType::kF32 && part.scale.is_contiguous(), "{}", part.scale.ToString());
}

// The tiles of stacked parts; `scale_rows` is how many rows of scales they have.
std::vector<RowTile> TilesOf(const std::vector<int64_t>& part_rows, int64_t* scale_rows) {
  std::vector<RowTile> tiles;
  int32_t first_row = 0, scale_row = 0;
  for (int64_t rows : part_rows) {
    for (int64_t row = 0; row < rows; row += kQuantGroup) {
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(kQuantGroup, rows - row));
      tiles.push_back({first_row, count, scale_row++});
      first_row += count;
    }
  }
  *scale_rows = scale_row;
  return tiles;
}

// Where the arrays of a weight lie in its one allocation.
struct Layout {
  int64_t scales = 0, tiles = 0, bytes = 0;
};

// Strides of `w`, whose type, groups, rows and cols are set.
Layout LayOut(int64_t scale_rows, const std::vector<RowTile>& tiles, WeightRef* w) {
  const int64_t num_tiles = static_cast<int64_t>(tiles.size());
  w->row_bytes = AlignUp(w->cols * NumberBytes(w->type), kRowAlignment);
  w->group_bytes = w->rows * w->row_bytes;
  w->num_tiles = static_cast<int32_t>(num_tiles);
  w->has_even_tiles = tiles.back().first_row == kQuantGroup * (num_tiles - 1);
  if (w->type == NumberType::kE4M3) {
    w->scale_cols = static_cast<int32_t>(NumScaleBlocks(w->cols));
    w->group_scales = scale_rows * w->scale_cols;
  }
  Layout layout;
  layout.scales = AlignUp(w->num_groups * w->group_bytes, kArrayAlignment);
  layout.tiles = layout.scales + AlignUp(w->num_groups * w->group_scales * 4, kArrayAlignment);
  layout.bytes = layout.tiles + num_tiles * static_cast<int64_t>(sizeof(RowTile));
  return layout;
}

void Place(const Layout& layout, void* memory, WeightRef* w) {
  char* base = static_cast<char*>(memory);
  w->data = base;
  if (w->type == NumberType::kE4M3) w->scales = reinterpret_cast<const float*>(base + layout.scales);
  w->tiles = reinterpret_cast<const RowTile*>(base + layout.tiles);
}

// NOTE: file data may be unaligned, so it is read by memcpy.
float StoredFloat(const Tensor& vector, int64_t i) {
  const uint8_t* p = static_cast<const uint8_t*>(vector.data) + i * DTypeBytes(vector.dtype);
  float value = 0;
  if (vector.dtype == DType::kF32) {
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  uint16_t half = 0;
  std::memcpy(&half, p, sizeof half);
  return vector.dtype == DType::kF16 ? F16ToFloat(half) : Bf16ToFloat(half);
}

}  // namespace

int64_t CudaOps::MeasureWeights(const std::function<void()>& make) {
  int64_t bytes = 0;
  measured_ = &bytes;
  make();
  measured_ = nullptr;
  return bytes;
}

// Empty, and the reason kept, when there is no room; empty, and counted, when weights are only measured.
Buffer CudaOps::AllocateWeight(int64_t bytes) {
  if (measured_ != nullptr) {
    *measured_ += AlignUp(bytes, bytes < kLargeAllocation ? kSmallAlignment : kLargeAlignment);
    return Buffer();
  }
  if (!pending_.status.ok()) return Buffer();
  absl::StatusOr<Buffer> buffer = device_.Allocate(bytes, Device::Memory::kDevice);
  if (buffer.ok()) return *std::move(buffer);
  pending_.status = absl::Status(buffer.status().code(), absl::StrCat("weights: ", buffer.status().message()));
  return Buffer();
}

// For bytes that the caller does not keep.
void CudaOps::CopyFromHost(void* dst, const void* src, int64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(src);
  const std::vector<uint8_t>& kept = pending_.host_memory.emplace_back(begin, begin + bytes);
  loader_.Copy({.dst = dst, .src = kept.data(), .rows = 1, .row_bytes = bytes, .dst_stride = bytes});
}

std::unique_ptr<Weight> CudaOps::MakeVector(const Tensor& source) {
  CHECK_SHAPE(source, -1);
  CHECK(StoredType(source.dtype) != NumberType::kE4M3, "a vector of {}", DTypeName(source.dtype));
  const int64_t size = source.dim(0);
  Buffer memory = AllocateWeight(size * 4);
  if (memory.data() != nullptr && source.empty()) {
    LaunchFillNear(static_cast<float*>(memory.data()), size, ++pending_.num_random, 1.0f, 0.1f, stream_.get());
    stream_.Launched("random weights");
  } else if (memory.data() != nullptr) {
    std::vector<float> values(size);
    for (int64_t i = 0; i < size; ++i) values[i] = StoredFloat(source, i);
    CopyFromHost(memory.data(), values.data(), size * 4);
  }
  return std::make_unique<CudaVector>(size, std::move(memory));
}

void CudaOps::CopyPart(const WeightRef& w, const WeightPart& part, int64_t group, int64_t first_row,
                       int64_t scale_row) {
  char* data = static_cast<char*>(const_cast<void*>(w.data)) + group * w.group_bytes + first_row * w.row_bytes;
  const int64_t rows = part.weight.dim(0), cols = w.cols, num_scales = NumScaleBlocks(rows) * w.scale_cols;
  float* scales =
      const_cast<float*>(w.scales) + (w.scales == nullptr ? 0 : group * w.group_scales) + scale_row * w.scale_cols;
  if (!part.weight.empty()) {
    loader_.Copy({.dst = data,
                  .src = part.weight.data,
                  .rows = rows,
                  .row_bytes = cols * NumberBytes(w.type),
                  .dst_stride = w.row_bytes});
    if (w.type != NumberType::kE4M3) return;
    loader_.Copy(
        {.dst = scales, .src = part.scale.data, .rows = 1, .row_bytes = num_scales * 4, .dst_stride = num_scales * 4});
    return;
  }
  const float deviation = 1.0f / std::sqrt(static_cast<float>(cols));
  LaunchFillRandom({data, rows, cols, w.row_bytes, w.type}, ++pending_.num_random, deviation, stream_.get());
  if (w.type == NumberType::kE4M3) {
    LaunchFillNear(scales, num_scales, ++pending_.num_random, deviation / kRandomE4m3Deviation, 0.1f, stream_.get());
  }
  stream_.Launched("random weights");
}

std::unique_ptr<CudaLinear> CudaOps::MakeMatrices(const std::vector<std::vector<WeightPart>>& groups) {
  CHECK(!groups.empty() && !groups[0].empty());
  const Tensor& first = groups[0][0].weight;
  std::vector<int64_t> part_rows;
  WeightRef w;
  w.num_groups = static_cast<int32_t>(groups.size());
  w.cols = static_cast<int32_t>(first.dim(1));
  w.type = StoredType(first.dtype);
  for (const WeightPart& part : groups[0]) {
    part_rows.push_back(part.weight.dim(0));
    w.rows += static_cast<int32_t>(part_rows.back());
  }
  int64_t scale_rows = 0;
  const std::vector<RowTile> tiles = TilesOf(part_rows, &scale_rows);
  const Layout layout = LayOut(scale_rows, tiles, &w);
  std::vector<Buffer> memory;
  memory.push_back(AllocateWeight(layout.bytes));
  if (memory[0].data() != nullptr) {
    Place(layout, memory[0].data(), &w);
    CopyFromHost(const_cast<RowTile*>(w.tiles), tiles.data(), tiles.size() * sizeof(RowTile));
  }
  for (size_t group = 0; group < groups.size(); ++group) {
    CHECK(groups[group].size() == part_rows.size(), "experts of {} and {} parts", groups[group].size(),
          part_rows.size());
    int64_t first_row = 0, scale_row = 0;
    for (size_t i = 0; i < part_rows.size(); ++i) {
      const WeightPart& part = groups[group][i];
      CheckPart(part, first);
      CHECK(part.weight.dim(0) == part_rows[i], "experts of two shapes");
      if (w.data != nullptr) CopyPart(w, part, static_cast<int64_t>(group), first_row, scale_row);
      first_row += part_rows[i];
      scale_row += NumScaleBlocks(part_rows[i]);
    }
  }
  return std::make_unique<CudaLinear>(w, std::move(memory));
}

std::unique_ptr<Weight> CudaOps::MakeLinear(const std::vector<WeightPart>& row_stacked) {
  return MakeMatrices({row_stacked});
}

std::unique_ptr<Weight> CudaOps::MakeExperts(const std::vector<std::vector<WeightPart>>& row_stacked_per_slot) {
  return MakeMatrices(row_stacked_per_slot);
}

// The stored weight goes to the device like any other, and stays there until FinishWeights has split it.
std::unique_ptr<Weight> CudaOps::MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) {
  const int64_t rows = kv_b.weight.dim(0), cols = kv_b.weight.dim(1);
  CHECK(rows == static_cast<int64_t>(num_heads) * (nope_dim + v_dim), "kv_b of {} rows", rows);
  std::unique_ptr<CudaLinear> stored = measured_ == nullptr ? MakeMatrices({{kv_b}}) : nullptr;
  std::vector<Buffer> memory;
  WeightRef halves[2];
  for (const bool is_uv : {false, true}) {
    WeightRef& w = halves[is_uv];
    w.num_groups = num_heads;
    w.rows = static_cast<int32_t>(is_uv ? v_dim : cols);
    w.cols = static_cast<int32_t>(is_uv ? cols : nope_dim);
    w.type = NumberType::kBF16;
    int64_t scale_rows = 0;
    const std::vector<RowTile> tiles = TilesOf({w.rows}, &scale_rows);
    const Layout layout = LayOut(scale_rows, tiles, &w);
    memory.push_back(AllocateWeight(layout.bytes));
    if (memory.back().data() == nullptr) continue;
    Place(layout, memory.back().data(), &w);
    CopyFromHost(const_cast<RowTile*>(w.tiles), tiles.data(), tiles.size() * sizeof(RowTile));
  }
  if (pending_.status.ok() && stored != nullptr) {
    pending_.kv_ups.push_back({std::move(stored), halves[0], halves[1]});
  }
  return std::make_unique<CudaKvUp>(rows, cols, halves[0], halves[1], std::move(memory));
}

absl::Status CudaOps::FinishWeights() {
  PendingWeights pending = std::exchange(pending_, PendingWeights());
  pending_.num_random = pending.num_random;
  if (!pending.status.ok()) loader_.Discard();
  absl::Status status = loader_.Finish();
  if (!pending.status.ok()) return pending.status;
  if (status.ok() && buffers_.empty()) status = MakeWorkspace();
  if (!status.ok()) return status;
  for (const PendingWeights::KvUp& kv_up : pending.kv_ups) {
    LaunchSplitKvUp(kv_up.stored->ref(), kv_up.w_uk, kv_up.w_uv, stream_.get());
    stream_.Launched("splitting kv_b_proj");
  }
  return device_.Wait(device_.Record(), absl::Minutes(1));  // then what was stored is freed
}

}  // namespace cachalot
