// Hopper's arithmetic, for the CPU backend as the GPU's oracle: products and attention bit for bit.
//
// One wgmma adds 32 products of e4m3 or 16 of bf16 and the accumulator at once. All are cut, towards zero, to multiples
// of 2^(E - F): E is the largest of their exponents, a product's being the sum of its factors', and F is 13 for e4m3
// and 25 for bf16. Their sum is exact, and cut to 13 or 23 bits behind its leading one. Measured on an H200: random
// products of both types, with and without an accumulator, one instruction and four, were all equal.
#ifndef CACHALOT_KERNELS_CPU_HOPPER_H_
#define CACHALOT_KERNELS_CPU_HOPPER_H_

#include "absl/functional/function_ref.h"
#include "kernels/cpu/weights.h"
#include "kernels/ops_types.h"
#include "kernels/tensor.h"

namespace cachalot {

// Whether the GPU makes the product of such rows on tensor cores (kernels/cuda/gemm/gemm.h).
bool TensorCoresTake(const RowBlock& block, const Activation& x);

// As LinearBlock, for rows of e4m3 or bf16 and x of the same type, or f32 that holds bf16 values. FP8 sums are promoted
// every 128 values, times the scales. The inner dimension is cut into `num_splits` parts, added in order.
void TensorCoreBlock(const RowBlock& block, const Activation& x, const Tensor& y, int64_t num_splits);

// How the keys that a tile of queries sees are cut (splits.h).
struct KeySplits {
  int32_t num_pages = 0, num_splits = 1;
};

// The heads of one row over its keys, page after page, and the results of splits joined (attention_kernels.cu); in
// other dimensions than kLatentDim and kRopeDim key after key (plain_attention_kernels.cu).
struct RowAttention {
  const float* queries = nullptr;     // [H][query_stride], of which C+R hold bf16 values, not scaled
  float* out = nullptr;               // [H][out_stride], of which C become means of latents, in bf16
  const KeySplits* splits = nullptr;  // [H], of each head's tile
  int64_t query_stride = 0, out_stride = 0;
  int64_t num_heads = 0, kv_lora_rank = 0, rope_dim = 0, first_key = 0, num_keys = 0;
  KvDType dtype = KvDType::kBF16;
  float softmax_scale = 0;
};
void AttendAsGpu(const RowAttention& row, absl::FunctionRef<const uint8_t*(int64_t)> page_at);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_HOPPER_H_
