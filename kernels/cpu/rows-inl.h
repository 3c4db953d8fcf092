// Rows in and out of fp32: widened from their type, rounded or quantised into it. Compiled once a Highway target.
#include "kernels/cpu/simd-inl.h"

#if defined(CACHALOT_KERNELS_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CACHALOT_KERNELS_CPU_ROWS_INL_H_
#undef CACHALOT_KERNELS_CPU_ROWS_INL_H_
#else
#define CACHALOT_KERNELS_CPU_ROWS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

// Row t of a matrix as fp32: in place when it is f32, else widened into `scratch`.
inline const float* RowAsF32(const Tensor& x, int64_t t, float* scratch) {
  const uint8_t* p = static_cast<const uint8_t*>(x.data) + t * x.row_stride * DTypeBytes(x.dtype);
  if (x.dtype == DType::kF32) return reinterpret_cast<const float*>(p);
  WithSource(x.dtype, [&](auto src) { Widen<decltype(src)>(p, x.dim(1), decltype(src)::kFactor, scratch); });
  return scratch;
}

HWY_INLINE hn::Vec<hn::Rebind<uint16_t, DF>> ToBf16(VF v) {
  const DU du;
  const auto bits = hn::BitCast(du, v);
  const auto lsb = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(hn::Set(du, 0x7fff), lsb)));
  const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40));
  const auto is_nan = hn::RebindMask(du, hn::IsNaN(v));
  return hn::TruncateTo(hn::Rebind<uint16_t, DF>(), hn::IfThenElse(is_nan, quiet, rounded));
}

// e4m3, round to nearest even, saturating (quantize.h: FloatToE4m3).
HWY_INLINE hn::Vec<hn::Rebind<uint8_t, DF>> ToE4m3(VF v) {
  const DF d;
  const DU du;
  const VF magnitude = hn::Min(hn::Abs(v), hn::Set(d, kE4m3Max));
  const auto m = hn::BitCast(du, magnitude);
  const auto lsb = hn::And(hn::ShiftRight<20>(m), hn::Set(du, 1));
  const auto normal =
      hn::Sub(hn::ShiftRight<20>(hn::Add(m, hn::Add(hn::Set(du, 0x7ffff), lsb))), hn::Set(du, 120 << 3));
  const auto subnormal = hn::And(hn::BitCast(du, hn::Add(magnitude, hn::Set(d, 0x1p14f))), hn::Set(du, 0xf));
  const auto is_small = hn::RebindMask(du, hn::Lt(magnitude, hn::Set(d, 0x1p-6f)));
  auto code = hn::IfThenElse(is_small, subnormal, normal);
  code = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Set(du, 0x7f), code);
  const auto sign = hn::And(hn::ShiftRight<24>(hn::BitCast(du, v)), hn::Set(du, 0x80));
  return hn::TruncateTo(hn::Rebind<uint8_t, DF>(), hn::Or(code, sign));
}

inline void StoreBf16(const float* HWY_RESTRICT row, int64_t n, uint16_t* HWY_RESTRICT out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    hn::StoreU(ToBf16(hn::LoadU(DF(), row + i)), hn::Rebind<uint16_t, DF>(), out + i);
  }
  for (; i < n; ++i) out[i] = FloatToBf16(row[i]);
}

// One group: values / scale as e4m3; returns the scale.
inline float QuantizeGroup(const float* HWY_RESTRICT row, int64_t n, ScaleRule rule, uint8_t* HWY_RESTRICT out) {
  const DF d;
  VF max = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) max = hn::Max(max, hn::Abs(hn::LoadU(d, row + i)));
  float amax = MaxOfLanes(max);
  for (; i < n; ++i) amax = std::max(amax, std::fabs(row[i]));
  const float scale = QuantScale(amax, rule);
  const VF divisor = hn::Set(d, scale);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    hn::StoreU(ToE4m3(hn::Div(hn::LoadU(d, row + i), divisor)), hn::Rebind<uint8_t, DF>(), out + i);
  }
  for (; i < n; ++i) out[i] = FloatToE4m3(row[i] / scale);
  return scale;
}

// Row t of a matrix or an activation <- `row`, in its type. NOTE: `row` may be that very memory when it is f32.
inline void EmitRow(const float* row, const Tensor& out, int64_t t) {
  if (out.dtype == DType::kBF16) return StoreBf16(row, out.dim(1), out.row<uint16_t>(t));
  float* dst = out.row<float>(t);
  if (dst != row) std::memcpy(dst, row, static_cast<size_t>(out.dim(1)) * sizeof(float));
}

inline void EmitRow(const float* row, const Activation& out, int64_t t, ScaleRule rule) {
  if (out.values.dtype != DType::kF8E4M3) return EmitRow(row, out.values, t);
  uint8_t* values = out.values.row<uint8_t>(t);
  float* scales = out.scales.row<float>(t);
  const int64_t n = out.cols();
  for (int64_t i = 0; i < n; i += int64_t{kQuantGroup}) {
    scales[i / int64_t{kQuantGroup}] = QuantizeGroup(row + i, std::min(int64_t{kQuantGroup}, n - i), rule, values + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#endif  // CACHALOT_KERNELS_CPU_ROWS_INL_H_
