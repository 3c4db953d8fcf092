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

void CudaOps::Multiply(const Tensor& y, int64_t y_group_stride, const Activation& x, int64_t x_group_stride,
                       const WeightRef& w, const int32_t* offsets) {
  if (x.rows() == 0) return;
  GemmArguments arguments;
  arguments.y = RefOf(y);
  arguments.x = RefOf(x, options_.scale_rule);
  arguments.w = w;
  arguments.offsets = offsets;
  arguments.are_offsets_old = offsets != nullptr && offsets == old_offsets_;
  old_offsets_ = nullptr;
  arguments.num_rows = x.rows();
  arguments.x_group_stride = x_group_stride;
  arguments.y_group_stride = y_group_stride;
  arguments.num_sms = num_sms_;
  CHECK(LaunchGemm(stream_.get(), arguments, ChooseGemm(arguments)), "no tensor map of {} rows of {} by {}", x.rows(),
        w.cols, w.rows);
  stream_.Launched("gemm");
}

bool CudaOps::MultiplyQuantised(const Activation& y, int64_t y_group_stride, const Activation& x,
                                int64_t x_group_stride, const WeightRef& w) {
  const ActivationRef out = RefOf(y, options_.scale_rule);
  GemmArguments arguments;
  arguments.y = out.values;
  arguments.y_scales = out.scales;
  arguments.y_scale_stride = out.scale_stride;
  arguments.is_y_ue8m0 = out.is_ue8m0;
  arguments.x = RefOf(x, options_.scale_rule);
  arguments.w = w;
  arguments.num_rows = x.rows();
  arguments.x_group_stride = x_group_stride;
  arguments.y_group_stride = y_group_stride;
  arguments.num_sms = num_sms_;
  if (!QuantisesProduct(arguments)) return false;
  CHECK(LaunchGemm(stream_.get(), arguments, ChooseGemm(arguments)), "no tensor map of {} rows of {} by {}", x.rows(),
        w.cols, w.rows);
  stream_.Launched("gemm");
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
