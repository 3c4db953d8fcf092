// Tensor views and their checks.
#include "kernels/tensor.h"

#include <fmt/ranges.h>

#include <vector>

namespace cachalot {

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "f32";
    case DType::kBF16: return "bf16";
    case DType::kF16: return "f16";
    case DType::kF8E4M3: return "f8e4m3";
    case DType::kI32: return "i32";
    case DType::kU16: return "u16";
    case DType::kU8: return "u8";
    case DType::kU32: return "u32";
    case DType::kI64: return "i64";
  }
  return "?";
}

Tensor::Tensor(void* data, DType dtype, std::initializer_list<int64_t> dims) : data(data), dtype(dtype) {
  CHECK(dims.size() >= 1 && dims.size() <= 4, "{} dimensions", dims.size());
  for (int64_t d : dims) shape[rank++] = d;
  row_stride = row_elements();
}

int64_t Tensor::row_elements() const {
  int64_t n = 1;
  for (int i = 1; i < rank; ++i) n *= shape[i];
  return n;
}

Tensor Tensor::Rows(int64_t begin, int64_t count) const {
  CHECK(begin >= 0 && count >= 0 && begin + count <= shape[0], "rows {}+{} of {}", begin, count, ToString());
  Tensor t = *this;
  t.data = static_cast<char*>(data) + begin * row_stride * DTypeBytes(dtype);
  t.shape[0] = count;
  return t;
}

Tensor Tensor::Columns(int64_t begin, int64_t count) const {
  CHECK(rank == 2 && begin >= 0 && begin + count <= shape[1], "columns {}+{} of {}", begin, count, ToString());
  Tensor t = *this;
  t.data = static_cast<char*>(data) + begin * DTypeBytes(dtype);
  t.shape[1] = count;
  return t;
}

Tensor Tensor::Reshape(std::initializer_list<int64_t> dims) const {
  Tensor t(data, dtype, dims);
  CHECK(is_contiguous() && t.num_elements() == num_elements(), "{} to {}", ToString(), t.ToString());
  return t;
}

std::string Tensor::ToString() const {
  return fmt::format("{}[{}]", DTypeName(dtype), fmt::join(shape.begin(), shape.begin() + rank, ", "));
}

void CheckShape(const Tensor& tensor, std::initializer_list<int64_t> dims, const char* name, const char* file,
                int line) {
  bool ok = tensor.rank == static_cast<int>(dims.size());
  int i = 0;
  for (int64_t d : dims) {
    if (ok && d != -1 && tensor.shape[i] != d) ok = false;
    ++i;
  }
  if (ok) return;
  CheckFailed(name, fmt::format("shape {} where [{}] is wanted", tensor.ToString(), fmt::join(dims, ", ")), file, line);
}

}  // namespace cachalot
