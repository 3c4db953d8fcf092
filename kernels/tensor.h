// Tensor views memory, Buffer owns it, Activation is what travels between operations.
#ifndef CACHALOT_KERNELS_TENSOR_H_
#define CACHALOT_KERNELS_TENSOR_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <utility>

#include "kernels/check.h"

namespace cachalot {

enum class DType : uint8_t { kF32, kBF16, kF16, kF8E4M3, kI32, kU16, kU8, kU32, kI64 };

constexpr int64_t DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
    case DType::kU32: return 4;
    case DType::kI64: return 8;
    case DType::kBF16:
    case DType::kF16:
    case DType::kU16: return 2;
    default: return 1;
  }
}

const char* DTypeName(DType dtype);

template <typename T>
constexpr bool HoldsType(DType dtype) {
  if constexpr (std::is_same_v<T, float>) return dtype == DType::kF32;
  if constexpr (std::is_same_v<T, int32_t>) return dtype == DType::kI32;
  if constexpr (std::is_same_v<T, uint32_t>) return dtype == DType::kU32;
  if constexpr (std::is_same_v<T, int64_t>) return dtype == DType::kI64;
  if constexpr (std::is_same_v<T, uint8_t>) return DTypeBytes(dtype) == 1;
  if constexpr (std::is_same_v<T, uint16_t>) return DTypeBytes(dtype) == 2;
  return false;
}

// A typed view of device (or host) memory: up to four dimensions, row-major, elements of one row of dimension 0
// contiguous. `row_stride` is the distance between consecutive indices of dimension 0, in elements: a column slice of
// a matrix is a Tensor too. Copies are cheap and own nothing.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<int64_t, 4> shape = {};
  int64_t row_stride = 0;

  Tensor() = default;
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> dims);

  bool empty() const { return data == nullptr; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t row_elements() const;  // elements in one index of dimension 0
  int64_t num_elements() const { return rank == 0 ? 0 : shape[0] * row_elements(); }
  int64_t num_bytes() const { return num_elements() * DTypeBytes(dtype); }
  bool is_contiguous() const { return row_stride == row_elements(); }

  // The elements as T; the dtype must be the one T stands for.
  template <typename T>
  T* as() const {
    CHECK(HoldsType<T>(dtype), "tensor holds {}", DTypeName(dtype));
    return static_cast<T*>(data);
  }
  template <typename T>
  T* row(int64_t i) const {
    return as<T>() + i * row_stride;
  }

  Tensor Rows(int64_t begin, int64_t count) const;            // [begin, begin + count) of dimension 0
  Tensor Columns(int64_t begin, int64_t count) const;         // of a matrix
  Tensor Reshape(std::initializer_list<int64_t> dims) const;  // the same elements; contiguous tensors only
  std::string ToString() const;                               // "bf16[4, 128]"
};

// CHECKs that `tensor` has exactly these dimensions; a dimension of -1 matches any.
void CheckShape(const Tensor& tensor, std::initializer_list<int64_t> dims, const char* name, const char* file,
                int line);
#define CHECK_SHAPE(tensor, ...) ::cachalot::CheckShape((tensor), {__VA_ARGS__}, #tensor, __FILE__, __LINE__)

// Owns one allocation of a Device; frees it at destruction.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, size_t bytes, std::function<void(void*)> free)
      : data_(data), bytes_(bytes), free_(std::move(free)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(data_);
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  std::function<void(void*)> free_;
};

// How values of an Activation are stored. FP8 is quantised in groups of 128 along a row (DeepSeek-V3 report, 3.3.2):
// scale = max(amax, 1e-4) / 448, or 2^ceil(log2(max(amax, 1e-4) / 448)) under UE8M0 (V3.1).
enum class ActivationFormat : uint8_t { kF32, kBF16, kFP8 };
enum class ScaleRule : uint8_t { kFP32, kUE8M0 };

// Rows that norms, silu and attention emit and that products and dispatch take.
struct Activation {
  Tensor values;  // [T, D] f32 | bf16 | f8e4m3
  Tensor scales;  // [T, ceil(D/128)] f32; empty unless values are f8e4m3: x = values * scale
  int64_t rows() const { return values.dim(0); }
  int64_t cols() const { return values.dim(1); }
  Activation Rows(int64_t begin, int64_t count) const {
    return {values.Rows(begin, count), scales.empty() ? scales : scales.Rows(begin, count)};
  }
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_TENSOR_H_
