// Test helpers.
#include "tests/kernels/testing.h"

#include <cmath>
#include <cstring>

#include "kernels/cpu/quantize.h"

namespace cachalot::testing {

uint64_t Random::Next() {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

double Random::Normal() {
  double sum = 0;
  for (int i = 0; i < 12; ++i) sum += Uniform();
  return sum - 6;
}

Owned::Owned(DType dtype, std::initializer_list<int64_t> dims, int misalignment) : tensor_(nullptr, dtype, dims) {
  memory_ = std::make_shared<std::vector<uint8_t>>(tensor_.num_bytes() + 64 + misalignment, 0xff);
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory_->data());
  tensor_.data = memory_->data() + (64 - start % 64) % 64 + misalignment;
}

std::vector<uint8_t> Owned::bytes() const {
  const uint8_t* p = static_cast<const uint8_t*>(tensor_.data);
  return std::vector<uint8_t>(p, p + tensor_.num_bytes());
}

Owned& Owned::Fill(const std::vector<double>& values) {
  EXPECT_EQ(static_cast<int64_t>(values.size()), tensor_.num_elements());
  const int64_t cols = tensor_.row_elements();
  for (size_t i = 0; i < values.size(); ++i) SetElement(tensor_, i / cols, i % cols, values[i]);
  return *this;
}

Owned& Owned::FillNormal(Random& random, double scale) {
  std::vector<double> values(tensor_.num_elements());
  for (double& value : values) value = random.Normal() * scale;
  return Fill(values);
}

Owned& Owned::Set(const std::vector<int32_t>& values) {
  EXPECT_EQ(static_cast<int64_t>(values.size()), tensor_.num_elements());
  std::copy(values.begin(), values.end(), tensor_.as<int32_t>());
  return *this;
}

OwnedActivation::OwnedActivation(ActivationFormat format, int64_t rows, int64_t cols) {
  const DType dtype = format == ActivationFormat::kF32    ? DType::kF32
                      : format == ActivationFormat::kBF16 ? DType::kBF16
                                                          : DType::kF8E4M3;
  values = Owned(dtype, {rows, cols});
  if (format == ActivationFormat::kFP8) scales = Owned(DType::kF32, {rows, (cols + kQuantGroup - 1) / kQuantGroup});
}

Activation OwnedActivation::view() const { return {*values, *scales}; }

OwnedActivation RandomActivation(ActivationFormat format, int64_t rows, int64_t cols, Random& random) {
  OwnedActivation x(format, rows, cols);
  x.values.FillNormal(random, format == ActivationFormat::kFP8 ? 40 : 1);
  if (format == ActivationFormat::kFP8) {
    std::vector<double> scales(x.scales->num_elements());
    for (double& s : scales) s = 0.001 + 0.05 * random.Uniform();
    x.scales.Fill(scales);
  }
  return x;
}

OwnedWeight::OwnedWeight(DType dtype, int64_t rows, int64_t cols, Random& random) : weight(dtype, {rows, cols}, 1) {
  if (dtype != DType::kF8E4M3) {
    weight.FillNormal(random, 0.05);
    return;
  }
  // Every byte but the NaNs, subnormals included.
  for (int64_t i = 0; i < rows * cols; ++i) {
    uint8_t byte = static_cast<uint8_t>(random.Next());
    if ((byte & 0x7f) == 0x7f) byte ^= 1;
    static_cast<uint8_t*>(weight->data)[i] = byte;
  }
  scale = Owned(DType::kF32, {(rows + kQuantGroup - 1) / kQuantGroup, (cols + kQuantGroup - 1) / kQuantGroup}, 2);
  std::vector<double> scales(scale->num_elements());
  for (double& s : scales) s = 0.0002 + 0.001 * random.Uniform();
  scale.Fill(scales);
}

WeightPart OwnedWeight::part() const { return {*weight, *scale}; }

double Element(const Tensor& t, int64_t i, int64_t j) {
  const uint8_t* p = static_cast<const uint8_t*>(t.data) + (i * t.row_stride + j) * DTypeBytes(t.dtype);
  float f = 0;
  uint16_t half = 0;
  int32_t integer = 0;
  switch (t.dtype) {
    case DType::kF32: std::memcpy(&f, p, 4); return f;
    case DType::kBF16: std::memcpy(&half, p, 2); return Bf16ToFloat(half);
    case DType::kF16: std::memcpy(&half, p, 2); return F16ToFloat(half);
    case DType::kF8E4M3: return E4m3ToFloat(*p);
    default: std::memcpy(&integer, p, 4); return integer;
  }
}

void SetElement(const Tensor& t, int64_t i, int64_t j, double value) {
  uint8_t* p = static_cast<uint8_t*>(t.data) + (i * t.row_stride + j) * DTypeBytes(t.dtype);
  const float f = static_cast<float>(value);
  const uint16_t bits = FloatToBf16(f);
  const _Float16 half = static_cast<_Float16>(f);
  switch (t.dtype) {
    case DType::kF32: std::memcpy(p, &f, 4); return;
    case DType::kBF16: std::memcpy(p, &bits, 2); return;
    case DType::kF16: std::memcpy(p, &half, 2); return;
    default: *p = FloatToE4m3(f);
  }
}

std::vector<double> Values(const Tensor& t) {
  std::vector<double> values;
  values.reserve(t.num_elements());
  for (int64_t i = 0; i < t.dim(0); ++i) {
    for (int64_t j = 0; j < t.row_elements(); ++j) values.push_back(Element(t, i, j));
  }
  return values;
}

std::vector<double> Values(const Activation& x) {
  std::vector<double> values = Values(x.values);
  if (x.scales.empty()) return values;
  for (int64_t i = 0; i < x.rows(); ++i) {
    for (int64_t j = 0; j < x.cols(); ++j) values[i * x.cols() + j] *= Element(x.scales, i, j / kQuantGroup);
  }
  return values;
}

std::vector<double> Values(const WeightPart& w) {
  std::vector<double> values = Values(w.weight);
  if (w.scale.empty()) return values;
  const int64_t cols = w.weight.dim(1);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] *= Element(w.scale, i / cols / kQuantGroup, i % cols / kQuantGroup);
  }
  return values;
}

double Rounded(double value, DType dtype) {
  if (dtype == DType::kBF16) return Bf16ToFloat(FloatToBf16(static_cast<float>(value)));
  if (dtype == DType::kF8E4M3) return E4m3ToFloat(FloatToE4m3(static_cast<float>(value)));
  return static_cast<float>(value);
}

std::vector<double> ThroughFp8(const std::vector<double>& row, ScaleRule rule) {
  std::vector<double> result(row.size());
  for (size_t begin = 0; begin < row.size(); begin += kQuantGroup) {
    const size_t end = std::min(row.size(), begin + kQuantGroup);
    double amax = 1e-4;
    for (size_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(row[i]));
    double scale = static_cast<float>(amax) / 448.0f;
    if (rule == ScaleRule::kUE8M0) scale = std::exp2(std::ceil(std::log2(scale)));
    for (size_t i = begin; i < end; ++i) {
      result[i] = scale * E4m3ToFloat(FloatToE4m3(static_cast<float>(row[i]) / static_cast<float>(scale)));
    }
  }
  return result;
}

std::vector<double> MatMul(const std::vector<double>& x, const std::vector<double>& w, int64_t rows, int64_t out,
                           int64_t in) {
  std::vector<double> y(rows * out);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t n = 0; n < out; ++n) {
      const double* a = x.data() + t * in;
      const double* b = w.data() + n * in;
      double sum = 0;
      for (int64_t k = 0; k < in; ++k) sum += a[k] * b[k];
      y[t * out + n] = sum;
    }
  }
  return y;
}

::testing::AssertionResult Close(const std::vector<double>& got, const std::vector<double>& want, double difference,
                                 double tolerance) {
  if (got.size() != want.size()) return ::testing::AssertionFailure() << got.size() << " values, not " << want.size();
  double cross = 0, squares = 0, want_squares = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isnan(got[i]) != std::isnan(want[i]) || std::isinf(got[i]) != std::isinf(want[i])) {
      return ::testing::AssertionFailure() << "[" << i << "] is " << got[i] << ", not " << want[i];
    }
    if (!std::isfinite(want[i])) continue;
    cross += got[i] * want[i];
    squares += got[i] * got[i] + want[i] * want[i];
    want_squares += want[i] * want[i];
  }
  if (squares == 0) return ::testing::AssertionSuccess();
  const double found = 1 - 2 * cross / squares;
  if (!(found <= difference)) return ::testing::AssertionFailure() << "difference " << found << " > " << difference;
  const double rms = std::sqrt(want_squares / static_cast<double>(want.size()));
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(want[i])) continue;
    if (!(std::fabs(got[i] - want[i]) <= tolerance * (std::fabs(want[i]) + rms))) {
      return ::testing::AssertionFailure() << "[" << i << "] is " << got[i] << ", not " << want[i] << ", rms " << rms;
    }
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult CloseF32(const std::vector<double>& got, const std::vector<double>& want) {
  return TestsOnGpu() ? Close(got, want, 1e-9, 1e-4) : Close(got, want, 1e-11, 2e-5);
}

::testing::AssertionResult CloseProduct(const std::vector<double>& got, const std::vector<double>& want, bool has_fp8) {
  return TestsOnGpu() && has_fp8 ? Close(got, want, 1e-6, 2e-3) : CloseF32(got, want);
}

::testing::AssertionResult SameRow(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b) {
  const int64_t element = DTypeBytes(a.dtype);
  const char* pa = static_cast<const char*>(a.data) + row_a * a.row_stride * element;
  const char* pb = static_cast<const char*>(b.data) + row_b * b.row_stride * element;
  for (int64_t i = 0; i < a.row_elements(); ++i) {
    if (std::memcmp(pa + i * element, pb + i * element, element) == 0) continue;
    return ::testing::AssertionFailure() << "rows " << row_a << " and " << row_b << " differ at " << i;
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult SameProduct(const Tensor& a, int64_t row_a, const Tensor& b, int64_t row_b) {
  if (!TestsOnGpu()) return SameRow(a, row_a, b, row_b);
  const std::vector<double> got = Values(a.Rows(row_a, 1)), want = Values(b.Rows(row_b, 1));
  return a.dtype == DType::kF32 ? CloseProduct(got, want, true) : CloseBf16(got, want);
}

BackendOptions CpuOptions(int num_threads) {
  BackendOptions options;
  options.device = "cpu";
  options.num_threads = num_threads;
  OpLimits& l = options.limits;
  l.max_tokens = 512;
  l.max_sequences = 16;
  l.max_rows = 64;
  l.max_context = 1024;
  l.max_drafts = 3;
  l.hidden_size = 7168;
  l.num_heads = 128;
  l.q_lora_rank = 1536;
  l.kv_lora_rank = 512;
  l.qk_rope_head_dim = 64;
  l.qk_nope_head_dim = 128;
  l.v_head_dim = 128;
  l.num_experts = 256;
  l.num_experts_per_tok = 8;
  l.num_local_experts = 256;
  l.max_ffn_width = 18432;
  l.vocab_size = 129280;
  return options;
}

std::unique_ptr<Backend> MakeCpu(const BackendOptions& options) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend(options);
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

Owned MakeRopeTable(int64_t positions, int64_t rope_dim) {
  Owned table(DType::kF32, {positions, rope_dim});
  for (int64_t p = 0; p < positions; ++p) {
    for (int64_t i = 0; i < rope_dim / 2; ++i) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(i) / rope_dim);
      table->row<float>(p)[i] = static_cast<float>(std::cos(angle));
      table->row<float>(p)[rope_dim / 2 + i] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

}  // namespace cachalot::testing
