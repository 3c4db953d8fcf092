// What kernels take: plain structs of pointers and strides, made from Tensors by the verbs after they checked shapes.
#ifndef CACHALOT_KERNELS_CUDA_DEVICE_TENSOR_H_
#define CACHALOT_KERNELS_CUDA_DEVICE_TENSOR_H_

#include <cstdint>

namespace cachalot {

// A number's type in a kernel; the values of DType that kernels know.
enum class NumberType : uint8_t { kF32, kBF16, kF16, kE4M3 };

// A matrix whose rows are `row_stride` elements apart.
struct MatrixRef {
  void* data = nullptr;  // null: absent
  int64_t row_stride = 0;
  NumberType type = NumberType::kBF16;
};

// Activation: values, and for e4m3 the scales of their groups of 128, [rows, scale_stride] f32.
struct ActivationRef {
  MatrixRef values;
  float* scales = nullptr;
  int64_t scale_stride = 0;
  bool is_ue8m0 = false;  // the rule for scales that a kernel makes
};

// Up to 128 rows of a weight that share a row of scales.
struct RowTile {
  int32_t first_row;  // of the stacked weight, and column of the product
  int32_t num_rows;
  int32_t scale_row;
};

// A prepared weight [groups, rows, cols] on the device: rows padded with zeros to `row_bytes`, a multiple of 16.
struct WeightRef {
  const void* data = nullptr;
  const float* scales = nullptr;   // [groups, scale_rows, scale_cols] for e4m3
  const RowTile* tiles = nullptr;  // [num_tiles], on the device; the same for every group
  int64_t group_bytes = 0;         // from group to group
  int64_t group_scales = 0;
  int64_t row_bytes = 0;
  int32_t num_groups = 1;
  int32_t rows = 0, cols = 0;
  int32_t num_tiles = 0, scale_cols = 0;
  bool has_even_tiles = false;  // tile i begins at row 128 i and has row i of the scales
  NumberType type = NumberType::kBF16;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_DEVICE_TENSOR_H_
