// Row kernels with Highway.
#include "kernels/cpu/elementwise_kernels.h"

#include <cstring>
#include <numeric>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise_kernels.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"
#include "kernels/cpu/rows-inl.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

void EmitMatrixRow(const float* row, const Tensor& out, int64_t t) { EmitRow(row, out, t); }
void EmitActivationRow(const float* row, const Activation& out, int64_t t, ScaleRule rule) {
  EmitRow(row, out, t, rule);
}
const float* WidenedRow(const Tensor& x, int64_t t, float* scratch) { return RowAsF32(x, t, scratch); }

// In double, so that the sum does not depend on its order: one off in its last place scales the whole row.
double SumOfSquares(const float* x, int64_t n) {
  constexpr int kChains = 16;
  double sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (int j = 0; j < kChains; ++j) sums[j] += static_cast<double>(x[i + j]) * x[i + j];
  }
  for (; i < n; ++i) sums[0] += static_cast<double>(x[i]) * x[i];
  return std::accumulate(sums, sums + kChains, 0.0);
}

void RmsNorm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const DF d;
  const float squares = static_cast<float>(SumOfSquares(x, n));
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  int64_t i;
  const VF f = hn::Set(d, factor);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), f), hn::LoadU(d, weight + i)), d, out + i);
  }
  for (; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void AddRmsNormRow(const RmsNormArgs& args, int64_t t, float* scratch, float* scratch2) {
  const int64_t n = args.h.dim(1);
  const float* h = RowAsF32(args.h, t, scratch);
  if (!args.delta.empty()) {
    const float* delta = RowAsF32(args.delta, t, scratch2);
    float* sum = args.h.dtype == DType::kF32 ? args.h.row<float>(t) : scratch;
    for (int64_t i = 0; i < n; ++i) sum[i] = h[i] + delta[i];
    EmitRow(sum, args.h, t);
    h = RowAsF32(args.h, t, scratch);
  }
  RmsNorm(h, args.weight, n, args.eps, scratch2);
  EmitRow(scratch2, args.x, t, args.scale_rule);
  if (!args.plain.empty()) EmitRow(scratch2, args.plain, t);
}

// silu(g) = g / (1 + exp(-g)).
void SiluMulRow(const Activation& out, const Tensor& gate_up, ScaleRule scale_rule, int64_t t, float* scratch,
                float* scratch2) {
  const DF d;
  const int64_t n = out.cols();
  const float* gate = RowAsF32(gate_up, t, scratch);
  const float* up = gate + n;
  const VF one = hn::Set(d, 1.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    VF g, u;
    if (left >= kLanes) {
      g = hn::LoadU(d, gate + i);
      u = hn::LoadU(d, up + i);
    } else {
      g = LoadTail<SourceF32>(reinterpret_cast<const uint8_t*>(gate + i), left);
      u = LoadTail<SourceF32>(reinterpret_cast<const uint8_t*>(up + i), left);
    }
    const VF silu = hn::Div(g, hn::Add(one, ExpOf(hn::Neg(g))));
    hn::StoreU(hn::Mul(silu, u), d, scratch2 + i);
  }
  EmitRow(scratch2, out, t, scale_rule);
}

void WriteKvEntry(KvDType dtype, const float* c, int64_t kv_lora_rank, const float* k_pe, int64_t rope_dim,
                  uint8_t* entry) {
  if (dtype == KvDType::kF32) {
    std::memcpy(entry, c, kv_lora_rank * 4);
    std::memcpy(entry + kv_lora_rank * 4, k_pe, rope_dim * 4);
    return;
  }
  if (dtype == KvDType::kBF16) {
    uint16_t* values = reinterpret_cast<uint16_t*>(entry);
    StoreBf16(c, kv_lora_rank, values);
    StoreBf16(k_pe, rope_dim, values + kv_lora_rank);
    return;
  }
  const int64_t num_groups = (kv_lora_rank + kQuantGroup - 1) / kQuantGroup;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t begin = g * kQuantGroup;
    const float scale =
        QuantizeGroup(c + begin, std::min<int64_t>(kQuantGroup, kv_lora_rank - begin), ScaleRule::kFP32, entry + begin);
    std::memcpy(entry + kv_lora_rank + g * 4, &scale, 4);
  }
  uint8_t* rope = entry + kv_lora_rank + num_groups * 4;
  for (int64_t i = 0; i < rope_dim; ++i) {
    const uint16_t bits = FloatToBf16(k_pe[i]);
    std::memcpy(rope + i * 2, &bits, 2);
  }
}

void ReadKvEntry(KvDType dtype, const uint8_t* entry, int64_t kv_lora_rank, int64_t rope_dim, int64_t padded,
                 float* out) {
  const int64_t size = kv_lora_rank + rope_dim;
  if (dtype == KvDType::kF32) {
    Widen<SourceF32>(entry, size, 1.0f, out);
  } else if (dtype == KvDType::kBF16) {
    Widen<SourceBF16>(entry, size, 1.0f, out);
  } else {
    const int64_t num_groups = (kv_lora_rank + kQuantGroup - 1) / kQuantGroup;
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t begin = g * kQuantGroup;
      Widen<SourceF8>(entry + begin, std::min<int64_t>(kQuantGroup, kv_lora_rank - begin),
                      SourceF8::kFactor * LoadScale(entry + kv_lora_rank, g), out + begin);
    }
    Widen<SourceBF16>(entry + kv_lora_rank + num_groups * 4, rope_dim, 1.0f, out + kv_lora_rank);
  }
  std::fill(out + size, out + padded, 0.0f);
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(EmitMatrixRow);
HWY_EXPORT(EmitActivationRow);
HWY_EXPORT(WidenedRow);
HWY_EXPORT(RmsNorm);
HWY_EXPORT(AddRmsNormRow);
HWY_EXPORT(SiluMulRow);
HWY_EXPORT(WriteKvEntry);
HWY_EXPORT(ReadKvEntry);

void EmitMatrixRow(const float* row, const Tensor& out, int64_t t) { HWY_DYNAMIC_DISPATCH(EmitMatrixRow)(row, out, t); }
void EmitActivationRow(const float* row, const Activation& out, int64_t t, ScaleRule rule) {
  HWY_DYNAMIC_DISPATCH(EmitActivationRow)(row, out, t, rule);
}
const float* WidenedRow(const Tensor& x, int64_t t, float* scratch) {
  return HWY_DYNAMIC_DISPATCH(WidenedRow)(x, t, scratch);
}
void RmsNorm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, weight, n, eps, out);
}
void AddRmsNormRow(const RmsNormArgs& args, int64_t t, float* scratch, float* scratch2) {
  HWY_DYNAMIC_DISPATCH(AddRmsNormRow)(args, t, scratch, scratch2);
}
void SiluMulRow(const Activation& out, const Tensor& gate_up, ScaleRule scale_rule, int64_t t, float* scratch,
                float* scratch2) {
  HWY_DYNAMIC_DISPATCH(SiluMulRow)(out, gate_up, scale_rule, t, scratch, scratch2);
}
void WriteKvEntry(KvDType dtype, const float* c, int64_t kv_lora_rank, const float* k_pe, int64_t rope_dim,
                  uint8_t* entry) {
  HWY_DYNAMIC_DISPATCH(WriteKvEntry)(dtype, c, kv_lora_rank, k_pe, rope_dim, entry);
}
void ReadKvEntry(KvDType dtype, const uint8_t* entry, int64_t kv_lora_rank, int64_t rope_dim, int64_t padded,
                 float* out) {
  HWY_DYNAMIC_DISPATCH(ReadKvEntry)(dtype, entry, kv_lora_rank, rope_dim, padded, out);
}

// Scalar on every target.
void CopyOrClearRow(const Tensor& out, int64_t l, const Tensor& x, int64_t t) {
  const int64_t element = DTypeBytes(out.dtype);
  char* dst = static_cast<char*>(out.data) + l * out.row_stride * element;
  const size_t bytes = static_cast<size_t>(out.dim(1) * element);
  if (t < 0) {
    std::memset(dst, 0, bytes);
  } else {
    std::memcpy(dst, static_cast<const char*>(x.data) + t * x.row_stride * element, bytes);
  }
}

void Rope(const float* x, const float* cos_sin, int64_t n, float factor, float* out) {
  const float* cos = cos_sin;
  const float* sin = cos_sin + n / 2;
  for (int64_t i = 0; i < n / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    out[2 * i] = (even * cos[i] - odd * sin[i]) * factor;
    out[2 * i + 1] = (even * sin[i] + odd * cos[i]) * factor;
  }
}

}  // namespace cachalot
#endif  // HWY_ONCE
