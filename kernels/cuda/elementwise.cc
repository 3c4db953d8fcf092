// Embedding, norms, silu, and rows gathered: verbs whose rows are independent and read once.
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/elementwise_kernels.h"

namespace cachalot {
namespace {

// What a kernel may write values to.
bool IsPlain(const Tensor& t) { return t.dtype == DType::kF32 || t.dtype == DType::kBF16; }

}  // namespace

void CudaOps::Embed(const Tensor& h, const Weight& embed_tokens, const StepRows& rows) {
  const int64_t num_rows = h.dim(0);
  const WeightRef& table = LinearRef(embed_tokens);
  CHECK_SHAPE(h, num_rows, table.cols);
  CHECK_SHAPE(rows.tokens, num_rows);
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK(IsPlain(h), "the residual is {}", DTypeName(h.dtype));
  if (num_rows == 0) return;
  LaunchEmbed(stream_.get(), {RefOf(h), table, rows.tokens.as<int32_t>(), rows.slots.as<int32_t>()}, num_rows);
  stream_.Launched("Embed");
}

void CudaOps::AddRmsNorm(const Tensor& h, const Activation& x, const Tensor& plain, const Tensor& delta,
                         const Weight& weight, float eps) {
  const int64_t num_rows = h.dim(0), cols = weight.cols();
  CHECK_SHAPE(h, num_rows, cols);
  CheckActivation(x, num_rows, cols);
  if (!plain.empty()) CHECK_SHAPE(plain, num_rows, cols);
  if (!delta.empty()) CHECK_SHAPE(delta, num_rows, cols);
  CHECK(IsPlain(h) && (plain.empty() || IsPlain(plain)), "h is {}, plain {}", DTypeName(h.dtype),
        DTypeName(plain.dtype));
  CHECK(x.values.dtype != DType::kF16, "no verb emits f16");
  const float* w = VectorValues(weight, cols);
  if (num_rows == 0) return;
  LaunchAddRmsNorm(
      stream_.get(),
      {RefOf(h), RefOf(x, options_.scale_rule), RefOf(plain), RefOf(delta), w, eps, static_cast<int32_t>(cols)},
      num_rows);
  stream_.Launched("AddRmsNorm");
}

void CudaOps::SiluMul(const Activation& out, const Tensor& gate_up) {
  const int64_t num_rows = out.rows(), cols = out.cols();
  CheckActivation(out, num_rows, cols);
  CHECK_SHAPE(gate_up, num_rows, 2 * cols);
  CHECK(out.values.dtype != DType::kF16, "no verb emits f16");
  if (num_rows == 0) return;
  LaunchSiluMul(stream_.get(),
                {RefOf(out, options_.scale_rule), RefOf(gate_up), nullptr, num_rows, static_cast<int32_t>(cols)});
  stream_.Launched("SiluMul");
}

void CudaOps::GroupedSiluMul(const Activation& out, const Tensor& gate_up, const Tensor& offsets) {
  const int64_t num_rows = out.rows(), cols = out.cols();
  CHECK_SHAPE(offsets, -1);
  CheckActivation(out, num_rows, cols);
  CHECK_SHAPE(gate_up, num_rows, 2 * cols);
  CHECK(out.values.dtype != DType::kF16, "no verb emits f16");
  if (num_rows == 0) return;
  const int32_t* end = offsets.as<int32_t>() + offsets.dim(0) - 1;
  LaunchSiluMul(stream_.get(),
                {RefOf(out, options_.scale_rule), RefOf(gate_up), end, num_rows, static_cast<int32_t>(cols)});
  stream_.Launched("GroupedSiluMul");
  old_offsets_ = offsets.as<int32_t>();
}

void CudaOps::GatherRows(const Activation& out, const Activation& x, const Tensor& row_token) {
  const int64_t num_rows = out.rows();
  CheckActivation(out, num_rows, x.cols());
  CHECK(out.values.dtype == x.values.dtype, "rows change type");
  CHECK_SHAPE(row_token, num_rows);
  if (num_rows == 0) return;
  GatherRowsArgs args = {.values = RowCopyOf(out.values, x.values, DTypeBytes(x.values.dtype)),
                         .scales = {},
                         .row_token = row_token.as<int32_t>(),
                         .num_src_rows = x.rows()};
  if (!x.scales.empty()) args.scales = RowCopyOf(out.scales, x.scales, sizeof(float));
  LaunchGatherRows(stream_.get(), args, num_rows);
  stream_.Launched("GatherRows");
}

}  // namespace cachalot
