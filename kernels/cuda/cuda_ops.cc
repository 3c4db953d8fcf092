// CudaOps: its making, and the conversions that every verb needs.
#include "kernels/cuda/cuda_ops.h"

#include <cuda_runtime_api.h>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/gemm/gemm.h"
#include "kernels/cuda/prefill_attention_kernels.h"
#include "kernels/cuda/sampling_kernels.h"

namespace cachalot {
namespace {

NumberType NumberTypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF32: return NumberType::kF32;
    case DType::kBF16: return NumberType::kBF16;
    case DType::kF16: return NumberType::kF16;
    default: break;
  }
  CHECK(dtype == DType::kF8E4M3, "no kernel computes with {}", DTypeName(dtype));
  return NumberType::kE4M3;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaOps>> CudaOps::Make(const BackendOptions& options, Device* device,
                                                       CudaStream* stream, WeightLoader* loader) {
  const OpLimits& limits = options.limits;
  const int latent_dim = limits.kv_lora_rank, rope_dim = limits.qk_rope_head_dim;
  if (latent_dim % 4 != 0 || latent_dim > kMaxLatentDim || rope_dim % 2 != 0 || rope_dim > kMaxRopeDim) {
    return absl::UnimplementedError(absl::StrCat("kv_lora_rank and qk_rope_head_dim: found ", latent_dim, " and ",
                                                 rope_dim, ", the CUDA backend takes multiples of 4 and 2 up to ",
                                                 kMaxLatentDim, " and ", kMaxRopeDim));
  }
  std::unique_ptr<CudaOps> ops(new CudaOps(options, device, stream, loader));
  if (options.planned_memory > 0) {
    ops->num_sms_ = kHopperSms;
    return ops;
  }
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&ops->num_sms_, cudaDevAttrMultiProcessorCount, ordinal);
  }
  for (const auto prepare : {PrepareGemm, PrepareAttention, PreparePrefillAttention, PrepareSampling}) {
    if (error == cudaSuccess) error = prepare();
  }
  if (error != cudaSuccess) {
    return absl::InternalError(
        absl::StrCat("the GPU does not say what it has, or not give it: ", cudaGetErrorString(error)));
  }
  return ops;
}

MatrixRef RefOf(const Tensor& tensor) {
  if (tensor.empty()) return {};
  return {tensor.data, tensor.row_stride, NumberTypeOf(tensor.dtype)};
}

ActivationRef RefOf(const Activation& activation, ScaleRule rule) {
  ActivationRef ref = {.values = RefOf(activation.values), .is_ue8m0 = rule == ScaleRule::kUE8M0};
  if (activation.scales.empty()) return ref;
  ref.scales = activation.scales.as<float>();
  ref.scale_stride = activation.scales.row_stride;
  return ref;
}

void CheckActivation(const Activation& x, int64_t rows, int64_t cols) {
  CHECK_SHAPE(x.values, rows, cols);
  if (x.values.dtype == DType::kF8E4M3) CHECK_SHAPE(x.scales, rows, (cols + kQuantGroup - 1) / kQuantGroup);
}

const float* VectorValues(const Weight& w, int64_t size) {
  const auto* vector = dynamic_cast<const CudaVector*>(&w);
  CHECK(vector != nullptr && vector->cols() == size, "not a vector of {}", size);
  return vector->values();
}

const WeightRef& LinearRef(const Weight& w) {
  const auto* linear = dynamic_cast<const CudaLinear*>(&w);
  CHECK(linear != nullptr, "this weight was not made by MakeLinear or MakeExperts");
  return linear->ref();
}

void CudaOps::Beside(absl::FunctionRef<void()> work) {
  stream_.Fork();
  work();
  stream_.EndFork();
}

}  // namespace cachalot
