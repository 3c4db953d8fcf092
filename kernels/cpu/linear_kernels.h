// The product of rows with a block of weight rows: y = x * w^T in fp32, bit-identical for every set of rows.
#ifndef CACHALOT_KERNELS_CPU_LINEAR_KERNELS_H_
#define CACHALOT_KERNELS_CPU_LINEAR_KERNELS_H_

#include "kernels/cpu/arena.h"
#include "kernels/cpu/weights.h"
#include "kernels/tensor.h"

namespace cachalot {

// At most this many rows of x a call of LinearBlock: a bigger product is cut.
inline constexpr int64_t kLinearRows = 256;
size_t LinearArenaBytes();

// y[:, block.first_row .. + block.num_rows) = x * rows^T. Scales of FP8 weights and activations multiply x: x' =
// x * (s_x * s_w), then the sum over k of x' * w in the stored, unscaled w.
void LinearBlock(const RowBlock& block,
                 const Activation& x,  // [T,cols] f32 | bf16 | f8e4m3, T <= kLinearRows
                 const Tensor& y,      // [T,out] f32 | bf16
                 Arena arena);

// dst[0..cols) = one row of a block, dequantised.
void DequantizeRow(const RowBlock& block, int64_t row, int64_t cols, float* dst);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_LINEAR_KERNELS_H_
