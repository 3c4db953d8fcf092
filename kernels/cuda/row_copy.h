// RowCopy: rows of one matrix to rows of another of the same type and width, byte for byte.
#ifndef CACHALOT_KERNELS_CUDA_ROW_COPY_H_
#define CACHALOT_KERNELS_CUDA_ROW_COPY_H_

#include <cstdint>

namespace cachalot {

struct RowCopy {
  char* dst = nullptr;
  const char* src = nullptr;
  int64_t dst_stride = 0, src_stride = 0;  // bytes from row to row
  int32_t bytes = 0;                       // of a row; 0: nothing to copy
  int32_t word = 1;                        // bytes that can be moved at once: 16, 4 or 1
};

// Of two Tensors.
template <typename Matrix>
RowCopy RowCopyOf(const Matrix& dst, const Matrix& src, int64_t element_bytes) {
  RowCopy copy = {static_cast<char*>(dst.data), static_cast<const char*>(src.data), dst.row_stride * element_bytes,
                  src.row_stride * element_bytes, static_cast<int32_t>(dst.dim(1) * element_bytes)};
  const int64_t all =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(copy.dst) | reinterpret_cast<uintptr_t>(copy.src)) |
      copy.dst_stride | copy.src_stride | copy.bytes;
  copy.word = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
  return copy;
}

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_ROW_COPY_H_
