// Weights of the CPU backend.
#include "kernels/cpu/weights.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/quantize.h"

namespace cachalot {
namespace {

int64_t NumScaleBlocks(int64_t n) { return (n + kQuantGroup - 1) / kQuantGroup; }

bool IsStoredType(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF8E4M3;
}

void CheckPart(const WeightPart& part, int64_t cols) {
  CHECK_SHAPE(part.weight, -1, cols);
  CHECK(IsStoredType(part.weight.dtype), "a weight of {}", DTypeName(part.weight.dtype));
  if (part.weight.dtype != DType::kF8E4M3) return;
  CHECK_SHAPE(part.scale, NumScaleBlocks(part.weight.dim(0)), NumScaleBlocks(cols));
  CHECK(part.scale.dtype == DType::kF32, "scales of {}", DTypeName(part.scale.dtype));
}

int64_t SumOfRows(const std::vector<WeightPart>& parts) {
  int64_t rows = 0;
  for (const WeightPart& part : parts) rows += part.weight.dim(0);
  return rows;
}

// NOTE: file data may be unaligned, so it is read by memcpy.
float LoadStored(DType dtype, const uint8_t* p) {
  uint16_t half = 0;
  float value = 0;
  switch (dtype) {
    case DType::kF32: std::memcpy(&value, p, 4); return value;
    case DType::kBF16: std::memcpy(&half, p, 2); return Bf16ToFloat(half);
    case DType::kF16: std::memcpy(&half, p, 2); return F16ToFloat(half);
    default: return E4m3ToFloat(*p);
  }
}

}  // namespace

float StoredValue(const WeightPart& part, int64_t row, int64_t col) {
  const Tensor& w = part.weight;
  const float value =
      LoadStored(w.dtype, static_cast<const uint8_t*>(w.data) + (row * w.row_stride + col) * DTypeBytes(w.dtype));
  if (w.dtype != DType::kF8E4M3) return value;
  const int64_t index = row / kQuantGroup * part.scale.row_stride + col / kQuantGroup;
  return value * LoadStored(DType::kF32, static_cast<const uint8_t*>(part.scale.data) + index * 4);
}

void AppendRowBlocks(const WeightPart& part, int64_t row_begin, int64_t num_rows, int64_t first_row,
                     std::vector<RowBlock>* blocks) {
  const Tensor& w = part.weight;
  for (int64_t row = row_begin; row < row_begin + num_rows;) {
    const int64_t end = std::min((row / kQuantGroup + 1) * kQuantGroup, row_begin + num_rows);
    RowBlock block;
    block.dtype = w.dtype;
    block.row_bytes = w.row_stride * DTypeBytes(w.dtype);
    block.data = static_cast<const uint8_t*>(w.data) + row * block.row_bytes;
    if (w.dtype == DType::kF8E4M3) {
      block.scales = static_cast<const uint8_t*>(part.scale.data) + row / kQuantGroup * part.scale.row_stride * 4;
    }
    block.first_row = first_row + row - row_begin;
    block.num_rows = static_cast<int32_t>(end - row);
    blocks->push_back(block);
    row = end;
  }
}

CpuVector::CpuVector(const Tensor& source) : Weight(1, source.dim(0)), values_(source.dim(0)) {
  CHECK_SHAPE(source, -1);
  CHECK(IsStoredType(source.dtype) && source.dtype != DType::kF8E4M3, "a vector of {}", DTypeName(source.dtype));
  const uint8_t* p = static_cast<const uint8_t*>(source.data);
  for (size_t i = 0; i < values_.size(); ++i) values_[i] = LoadStored(source.dtype, p + i * DTypeBytes(source.dtype));
}

CpuLinear::CpuLinear(const std::vector<WeightPart>& row_stacked)
    : Weight(SumOfRows(row_stacked), row_stacked.empty() ? 0 : row_stacked[0].weight.dim(1)) {
  CHECK(!row_stacked.empty());
  int64_t first_row = 0;
  for (const WeightPart& part : row_stacked) {
    CheckPart(part, cols());
    AppendRowBlocks(part, 0, part.weight.dim(0), first_row, &blocks_);
    first_row += part.weight.dim(0);
  }
}

const RowBlock& CpuLinear::BlockOf(int64_t row) const {
  CHECK(row >= 0 && row < rows(), "row {} of {}", row, rows());
  const auto after = std::upper_bound(blocks_.begin(), blocks_.end(), row,
                                      [](int64_t r, const RowBlock& block) { return r < block.first_row; });
  return *(after - 1);
}

CpuExperts::CpuExperts(std::vector<std::unique_ptr<CpuLinear>> slots)
    : Weight(slots.empty() ? 0 : slots[0]->rows(), slots.empty() ? 0 : slots[0]->cols()), slots_(std::move(slots)) {
  for (const auto& slot : slots_) CHECK(slot->rows() == rows() && slot->cols() == cols(), "experts of two shapes");
}

CpuKvUp::CpuKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim, bool round_to_bf16, bool transpose)
    : Weight(kv_b.weight.dim(0), kv_b.weight.dim(1)), num_heads_(num_heads), nope_dim_(nope_dim), v_dim_(v_dim) {
  CheckPart(kv_b, cols());
  CHECK(rows() == static_cast<int64_t>(num_heads) * (nope_dim + v_dim), "kv_b of {} rows", rows());

  WeightPart part = kv_b;
  if (round_to_bf16 && kv_b.weight.dtype != DType::kBF16) {
    bf16_.resize(rows() * cols());
    for (int64_t i = 0; i < rows() * cols(); ++i) bf16_[i] = FloatToBf16(StoredValue(kv_b, i / cols(), i % cols()));
    part = {Tensor(bf16_.data(), DType::kBF16, {rows(), cols()}), Tensor()};
  }
  w_uk_.resize(num_heads);
  w_uv_.resize(num_heads);
  for (int h = 0; h < num_heads; ++h) {
    const int64_t row = static_cast<int64_t>(h) * (nope_dim + v_dim);
    AppendRowBlocks(part, row, nope_dim, 0, &w_uk_[h]);
    AppendRowBlocks(part, row + nope_dim, v_dim, 0, &w_uv_[h]);
  }
  if (!transpose) return;
  const int64_t head_size = cols() * nope_dim;
  transposed_.resize(num_heads * head_size);
  for (int h = 0; h < num_heads; ++h) {
    const int64_t row = static_cast<int64_t>(h) * (nope_dim + v_dim);
    uint16_t* to = transposed_.data() + h * head_size;
    for (int64_t i = 0; i < head_size; ++i) to[i] = FloatToBf16(StoredValue(part, row + i % nope_dim, i / nope_dim));
    w_uk_transposed_.push_back({reinterpret_cast<const uint8_t*>(to), nullptr, nope_dim * int64_t{2}, 0,
                                static_cast<int32_t>(cols()), DType::kBF16});
  }
}

}  // namespace cachalot
