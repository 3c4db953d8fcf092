// What the kernel tests share: owned tensors that start as NaN, random data, references in double, comparison.
#ifndef CACHALOT_TESTS_KERNELS_TESTING_H_
#define CACHALOT_TESTS_KERNELS_TESTING_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/tensor.h"

namespace cachalot::testing {

// SplitMix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }  // [0, 1)
  double Normal();                                                          // mean 0, variance 1
  int Below(int n) { return static_cast<int>(Next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

// Memory behind a Tensor, every byte 0xff at first: NaN in all float types, -1 in integers.
class Owned {
 public:
  Owned() = default;
  Owned(DType dtype, std::initializer_list<int64_t> dims, int misalignment = 0);
  operator const Tensor&() const { return tensor_; }  // NOLINT: it stands for the tensor
  const Tensor& operator*() const { return tensor_; }
  const Tensor* operator->() const { return &tensor_; }
  template <typename T>
  T* data() const {
    return tensor_.as<T>();
  }
  std::vector<uint8_t> bytes() const;

  Owned& Fill(const std::vector<double>& values);  // rounded to the type
  Owned& FillNormal(Random& random, double scale = 1.0);
  Owned& Set(const std::vector<int32_t>& values);  // of an i32 tensor

 private:
  std::shared_ptr<std::vector<uint8_t>> memory_;
  Tensor tensor_;
};

// An activation and its memory.
struct OwnedActivation {
  Owned values, scales;
  OwnedActivation(ActivationFormat format, int64_t rows, int64_t cols);
  Activation view() const;
};

// Random values; FP8 with random scales.
OwnedActivation RandomActivation(ActivationFormat format, int64_t rows, int64_t cols, Random& random);

// A weight of a stored type with random values, at an odd address; FP8 with scales.
struct OwnedWeight {
  Owned weight, scale;
  OwnedWeight(DType dtype, int64_t rows, int64_t cols, Random& random);
  WeightPart part() const;
};

// Elements as doubles, decoded by the scalar rules of quantize.h.
double Element(const Tensor& t, int64_t i, int64_t j);
void SetElement(const Tensor& t, int64_t i, int64_t j, double value);  // rounded to the type
std::vector<double> Values(const Tensor& t);
std::vector<double> Values(const Activation& x);  // values * scale
std::vector<double> Values(const WeightPart& w);

// What a value becomes when it is stored as `dtype`.
double Rounded(double value, DType dtype);
// A row through FP8 in groups of 128, and back.
std::vector<double> ThroughFp8(const std::vector<double>& row, ScaleRule rule);

// y[t][n] = sum over k of x[t][k] * w[n][k].
std::vector<double> MatMul(const std::vector<double>& x, const std::vector<double>& w, int64_t rows, int64_t out,
                           int64_t in);

// NaN and Inf where the reference has them; 1 - 2 sum(xy) / sum(x^2 + y^2) at most `difference`; every element within
// `tolerance` of the reference, relative to it and to the root mean square.
::testing::AssertionResult Close(const std::vector<double>& got, const std::vector<double>& want, double difference,
                                 double tolerance);
// What was computed and stored in fp32; on a GPU, where sums are taken in other orders, a little less exact.
::testing::AssertionResult CloseF32(const std::vector<double>& got, const std::vector<double>& want);
inline ::testing::AssertionResult CloseBf16(const std::vector<double>& got, const std::vector<double>& want) {
  return Close(got, want, 1e-5, 6e-3);
}
// A product in fp32. On a GPU one with an fp8 operand may pass through bf16.
::testing::AssertionResult CloseProduct(const std::vector<double>& got, const std::vector<double>& want, bool has_fp8);

// The bytes of a row of each.
::testing::AssertionResult SameRow(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b);
// The same product of a row in other company: the bytes on the CPU; close on a GPU, where company may change sums.
::testing::AssertionResult SameProduct(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b);

BackendOptions CpuOptions(int num_threads = 2);
std::unique_ptr<Backend> MakeCpu(const BackendOptions& options);

// The backend that this program tests, which takes host tensors: the CPU's as it is (cpu_backend_under_test.cc), or
// the GPU's behind MakeOnDevice (cuda_backend_under_test.cc).
std::unique_ptr<Backend> MakeTestBackend(const BackendOptions& options);
bool TestsOnGpu();
// The ways it can compute, each of which a test goes through: SIMD targets, or "cuda" alone; "" is the usual one.
std::vector<std::string> TestTargets();
void UseTarget(const std::string& target);

// cos and sin for `positions` positions at dimension `rope_dim`.
Owned MakeRopeTable(int64_t positions, int64_t rope_dim);

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_TESTING_H_
