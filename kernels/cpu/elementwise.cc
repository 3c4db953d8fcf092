// Embedding, norms, silu, and rows gathered: verbs whose rows are independent and read once.
#include <cstring>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/elementwise_kernels.h"
#include "kernels/cpu/linear_kernels.h"

namespace cachalot {
namespace {

void CheckActivation(const Activation& x, int64_t rows, int64_t cols) {
  CHECK_SHAPE(x.values, rows, cols);
  if (x.values.dtype == DType::kF8E4M3) CHECK_SHAPE(x.scales, rows, (cols + kQuantGroup - 1) / kQuantGroup);
}

const CpuVector& AsVector(const Weight& w, int64_t size) {
  const auto* vector = dynamic_cast<const CpuVector*>(&w);
  CHECK(vector != nullptr && vector->cols() == size, "not a vector of {}", size);
  return *vector;
}

}  // namespace

void CpuOps::Embed(const Tensor& h, const Weight& embed_tokens, const StepRows& rows) {
  const auto* table = dynamic_cast<const CpuLinear*>(&embed_tokens);
  CHECK(table != nullptr, "this weight was not made by MakeLinear");
  const int64_t num_rows = h.dim(0), cols = table->cols();
  CHECK_SHAPE(h, num_rows, cols);
  CHECK_SHAPE(rows.tokens, num_rows);
  CHECK_SHAPE(rows.slots, num_rows);
  const int32_t* tokens = rows.tokens.as<int32_t>();
  const int32_t* slots = rows.slots.as<int32_t>();
  ForRows(num_rows, cols, [&](int64_t begin, int64_t end, int worker) {
    float* row = WorkerArena(worker).Take<float>(RowCapacity());
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) {
        std::memset(static_cast<char*>(h.data) + t * h.row_stride * DTypeBytes(h.dtype), 0,
                    static_cast<size_t>(cols * DTypeBytes(h.dtype)));
        continue;
      }
      const RowBlock& block = table->BlockOf(tokens[t]);
      DequantizeRow(block, tokens[t] - block.first_row, cols, row);
      EmitMatrixRow(row, h, t);
    }
  });
}

void CpuOps::AddRmsNorm(const Tensor& h, const Activation& x, const Tensor& plain, const Tensor& delta,
                        const Weight& weight, float eps) {
  const int64_t num_rows = h.dim(0), cols = weight.cols();
  CHECK_SHAPE(h, num_rows, cols);
  CheckActivation(x, num_rows, cols);
  if (!plain.empty()) CHECK_SHAPE(plain, num_rows, cols);
  if (!delta.empty()) CHECK_SHAPE(delta, num_rows, cols);
  const float* w = AsVector(weight, cols).values();
  ForRows(num_rows, 4 * cols, [&](int64_t begin, int64_t end, int worker) {
    Arena arena = WorkerArena(worker);
    float* scratch = arena.Take<float>(RowCapacity());
    float* scratch2 = arena.Take<float>(RowCapacity());
    for (int64_t t = begin; t < end; ++t)
      AddRmsNormRow({h, x, plain, delta, w, eps, options_.scale_rule}, t, scratch, scratch2);
  });
}

void CpuOps::SiluMulRows(const Activation& out, const Tensor& gate_up, int64_t num_rows) {
  const int64_t cols = out.cols();
  CheckActivation(out, -1, cols);
  CHECK_SHAPE(gate_up, out.rows(), 2 * cols);
  ForRows(num_rows, 16 * cols, [&](int64_t begin, int64_t end, int worker) {
    Arena arena = WorkerArena(worker);
    float* scratch = arena.Take<float>(RowCapacity());
    float* scratch2 = arena.Take<float>(RowCapacity());
    for (int64_t t = begin; t < end; ++t) SiluMulRow(out, gate_up, options_.scale_rule, t, scratch, scratch2);
  });
}

void CpuOps::SiluMul(const Activation& out, const Tensor& gate_up) { SiluMulRows(out, gate_up, out.rows()); }

void CpuOps::GroupedSiluMul(const Activation& out, const Tensor& gate_up, const Tensor& offsets) {
  CHECK_SHAPE(offsets, -1);
  const int32_t num_rows = offsets.as<int32_t>()[offsets.dim(0) - 1];
  CHECK(num_rows <= out.rows(), "{} rows of {}", num_rows, out.rows());
  SiluMulRows(out, gate_up, num_rows);
}

void CpuOps::GatherRows(const Activation& out, const Activation& x, const Tensor& row_token) {
  const int64_t num_rows = out.rows();
  CheckActivation(out, num_rows, x.cols());
  CHECK(out.values.dtype == x.values.dtype, "rows change type");
  CHECK_SHAPE(row_token, num_rows);
  const int32_t* tokens = row_token.as<int32_t>();
  for (int64_t l = 0; l < num_rows; ++l) {
    CHECK(tokens[l] < x.rows(), "row {} of {}", tokens[l], x.rows());
    CopyOrClearRow(out.values, l, x.values, tokens[l]);
    if (!x.scales.empty()) CopyOrClearRow(out.scales, l, x.scales, tokens[l]);
  }
}

}  // namespace cachalot
