// Tensor maps: what TMA is told of a tensor in global memory. Host code.
#ifndef CACHALOT_KERNELS_CUDA_TENSOR_MAP_H_
#define CACHALOT_KERNELS_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace cachalot {

// A tensor [groups, rows, cols] whose rows and groups lie so many bytes apart, multiples of 16, from which boxes of
// `box_rows` rows of 128 bytes are copied, swizzled. num_groups 0: a matrix.
struct TensorMapShape {
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  int64_t cols = 0, rows = 0, row_bytes = 0;
  int64_t num_groups = 0, group_bytes = 0;
  int box_rows = 0;
};

// False where the driver has no such map.
inline bool MakeTensorMap(CUtensorMap* map, const void* data, const TensorMapShape& s) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = []() -> Encode {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(s.cols), static_cast<cuuint64_t>(s.rows),
                              static_cast<cuuint64_t>(s.num_groups)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(s.row_bytes), static_cast<cuuint64_t>(s.group_bytes)};
  const cuuint32_t element_bytes = s.type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  const cuuint32_t box[3] = {128 / element_bytes, static_cast<cuuint32_t>(s.box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode != nullptr &&
         encode(map, s.type, s.num_groups > 0 ? 3 : 2, const_cast<void*>(data), dims, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_TENSOR_MAP_H_
