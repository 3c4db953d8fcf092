// Products y = x * w^T on tensor cores, alone, for many groups with one activation each, or for rows grouped by expert.
#ifndef CACHALOT_KERNELS_CUDA_GEMM_GEMM_H_
#define CACHALOT_KERNELS_CUDA_GEMM_GEMM_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_tensor.h"
#include "kernels/gemm_plan.h"

namespace cachalot {

// For every group g of w: rows offsets[g] .. offsets[g+1] of x and y when there are offsets, else all rows of x + g *
// x_group_stride and y + g * y_group_stride (in elements).
struct GemmArguments {
  ActivationRef y;  // [rows, w.rows] f32 | bf16 | e4m3 of bf16, where QuantisesProduct
  ActivationRef x;  // [rows, w.cols]
  WeightRef w;
  const int32_t* offsets = nullptr;  // [num_groups + 1] on the device
  bool are_offsets_old = false;      // they were there before the kernel before began
  int64_t num_rows = 0;              // of x; with offsets: of all groups together at most
  int64_t expected_rows = 0;         // with offsets: on average
  int64_t x_group_stride = 0, y_group_stride = 0;
  int num_sms = 0;
};

// Once a device, before its first product.
cudaError_t PrepareGemm();

// The kernel that the measured rules of gemm_plan.h choose: e4m3 with e4m3 and bf16 with bf16, on 16-byte boundaries,
// run on tensor cores; everything else on a plain kernel.
GemmPlan ChooseGemm(const GemmArguments& arguments);

// Whether the kernel that a product takes can write its rows as e4m3 in groups of 128: that of few rows, where a kernel
// less is worth it.
bool QuantisesProduct(const GemmArguments& arguments);

// A row's result does not depend on the other rows, but for the split of the inner dimension. False where the driver
// has no words for the operands' shapes, or the plan does not fit them.
bool LaunchGemm(cudaStream_t stream, const GemmArguments& arguments, const GemmPlan& plan);

namespace gemm {

constexpr int kQuantisedRows = 128;  // of the weight, that make a group of the product's e4m3
constexpr int kMaxGroups = 512;      // of the tensor core kernels, which list them in shared memory

// One kernel each (few_rows.cu, many_rows.cu, plain.cu).
cudaError_t PrepareFewRows();
cudaError_t PrepareManyRows();
bool LaunchFewRows(cudaStream_t stream, const GemmArguments& arguments, const GemmPlan& plan);
bool LaunchManyRows(cudaStream_t stream, const GemmArguments& arguments, const GemmPlan& plan);
void LaunchPlain(cudaStream_t stream, const GemmArguments& arguments);

}  // namespace gemm
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_GEMM_GEMM_H_
