// Linear and GroupedLinear.
#include "kernels/cuda/gemm/gemm.h"

#include "kernels/cuda/cuda_ops.h"

namespace cachalot {
namespace {

void CheckProduct(const Tensor& y, const Activation& x, const Weight& w) {
  CHECK_SHAPE(x.values, -1, w.cols());
  CHECK_SHAPE(y, x.rows(), w.rows());
  CHECK(y.dtype == DType::kF32 || y.dtype == DType::kBF16, "a product in {}", DTypeName(y.dtype));
  CheckActivation(x, x.rows(), w.cols());
}

}  // namespace

GemmArguments CudaOps::ProductOf(const ActivationRef& y, int64_t y_group_stride, const Activation& x,
                                 int64_t x_group_stride, const WeightRef& w) const {
  GemmArguments arguments;
  arguments.y = y;
  arguments.x = RefOf(x, options_.scale_rule);
  arguments.w = w;
  arguments.num_rows = x.rows();
  arguments.x_group_stride = x_group_stride;
  arguments.y_group_stride = y_group_stride;
  arguments.num_sms = num_sms_;
  return arguments;
}

void CudaOps::Launch(const GemmArguments& product) {
  CHECK(LaunchGemm(stream_.get(), product, ChooseGemm(product)), "no tensor map of {} rows of {} by {}",
        product.num_rows, product.w.cols, product.w.rows);
  stream_.Launched("gemm");
}

void CudaOps::Multiply(const Tensor& y, int64_t y_group_stride, const Activation& x, int64_t x_group_stride,
                       const WeightRef& w, const int32_t* offsets) {
  if (x.rows() == 0) return;
  GemmArguments product = ProductOf({.values = RefOf(y)}, y_group_stride, x, x_group_stride, w);
  product.offsets = offsets;
  // NOTE: all ranks may send all they have to one; on average each sends this one its share.
  product.expected_rows = x.rows() / options_.limits.num_ranks;
  product.are_offsets_old = offsets != nullptr && offsets == old_offsets_;
  old_offsets_ = nullptr;
  Launch(product);
}

bool CudaOps::MultiplyQuantised(const Activation& y, int64_t y_group_stride, const Activation& x,
                                int64_t x_group_stride, const WeightRef& w) {
  const GemmArguments product = ProductOf(RefOf(y, options_.scale_rule), y_group_stride, x, x_group_stride, w);
  if (!QuantisesProduct(product)) return false;
  Launch(product);
  return true;
}

void CudaOps::Linear(const Tensor& y, const Activation& x, const Weight& w) {
  CheckProduct(y, x, w);
  Multiply(y, 0, x, 0, LinearRef(w), nullptr);
}

void CudaOps::GroupedLinear(const Tensor& y, const Activation& x, const Weight& experts, const Tensor& offsets) {
  const WeightRef& w = LinearRef(experts);
  CHECK_SHAPE(offsets, w.num_groups + 1);
  CheckProduct(y, x, experts);
  Multiply(y, 0, x, 0, w, offsets.as<int32_t>());
}

}  // namespace cachalot
