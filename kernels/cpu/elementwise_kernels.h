// Row kernels: what norms, silu, embedding and the latent path do to one row.
#ifndef CACHALOT_KERNELS_CPU_ELEMENTWISE_KERNELS_H_
#define CACHALOT_KERNELS_CPU_ELEMENTWISE_KERNELS_H_

#include "kernels/ops_types.h"
#include "kernels/tensor.h"

namespace cachalot {

// Row t of `out` <- `row`, in its type.
void EmitMatrixRow(const float* row, const Tensor& out, int64_t t);
void EmitActivationRow(const float* row, const Activation& out, int64_t t, ScaleRule rule);

// Row t of `x` as fp32: in place where it is f32, else in `scratch`.
const float* WidenedRow(const Tensor& x, int64_t t, float* scratch);

// out[l] <- x[t], or zeros for t < 0. Both of one type.
void CopyOrClearRow(const Tensor& out, int64_t l, const Tensor& x, int64_t t);

struct RmsNormArgs {
  const Tensor& h;
  const Activation& x;
  const Tensor& plain;
  const Tensor& delta;
  const float* weight;
  float eps;
  ScaleRule scale_rule;
};
// NOTE: the norm is of the residual as stored, so in bf16 it is rounded before it is normed.
void AddRmsNormRow(const RmsNormArgs& args, int64_t t, float* scratch, float* scratch2);

// out[0..n) <- x * rsqrt(mean(x^2) + eps) * weight.
void RmsNorm(const float* x, const float* weight, int64_t n, float eps, float* out);

void SiluMulRow(const Activation& out, const Tensor& gate_up, ScaleRule scale_rule, int64_t t, float* scratch,
                float* scratch2);

// Rotates interleaved pairs by one row of the rope table, times `factor`: out[0..n) <- x[0..n).
void Rope(const float* x, const float* cos_sin, int64_t n, float factor, float* out);

// One entry of the latent cache in its layout, from c (normed) and k_pe (rotated); and back, as C + R values with zeros
// up to `padded`.
void WriteKvEntry(KvDType dtype, const float* c, int64_t kv_lora_rank, const float* k_pe, int64_t rope_dim,
                  uint8_t* entry);
void ReadKvEntry(KvDType dtype, const uint8_t* entry, int64_t kv_lora_rank, int64_t rope_dim, int64_t padded,
                 float* out);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_ELEMENTWISE_KERNELS_H_
