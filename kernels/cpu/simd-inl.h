// SIMD building blocks shared by the kernels; compiled once a Highway target.
//
// Exactness: a kernel may tile its loops as it likes, but each output is made by the same operations in the same order
// whatever the tile: vectors over k in order, one lane reduction (ReduceLanes), chunks added in order.
#include "hwy/highway.h"

#if defined(CACHALOT_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef CACHALOT_KERNELS_CPU_SIMD_INL_H_
#undef CACHALOT_KERNELS_CPU_SIMD_INL_H_
#else
#define CACHALOT_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cmath>
#include <cstring>

#include "kernels/cpu/quantize.h"
#include "kernels/exponential.h"
#include "kernels/ops_types.h"

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DU = hn::RebindToUnsigned<DF>;
using VF = hn::Vec<DF>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));

// Registers for accumulators: 32 vector registers with AVX-512 and NEON, 16 otherwise.
#if HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM_A64
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

inline int64_t RoundUpToLanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// ---- Sources: stored types, decoded to fp32 in registers. Decoded values times kFactor are the stored ones.
struct SourceF32 {
  static constexpr int64_t kBytes = 4;
  static constexpr float kFactor = 1.0f;
  static HWY_INLINE VF Load(const uint8_t* p) { return hn::LoadU(DF(), reinterpret_cast<const float*>(p)); }
  static HWY_INLINE void LoadPair(const uint8_t* p, VF& v0, VF& v1) {
    v0 = Load(p);
    v1 = Load(p + kLanes * kBytes);
  }
};

struct SourceBF16 {
  static constexpr int64_t kBytes = 2;
  static constexpr float kFactor = 1.0f;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<uint16_t, DF> d16;
    const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
    return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), bits)));
  }
  static HWY_INLINE void LoadPair(const uint8_t* p, VF& v0, VF& v1) {
    v0 = Load(p);
    v1 = Load(p + kLanes * kBytes);
  }
};

struct SourceF16 {
  static constexpr int64_t kBytes = 2;
  static constexpr float kFactor = 1.0f;
  static HWY_INLINE VF Load(const uint8_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d16;
    return hn::PromoteTo(DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
  }
  static HWY_INLINE void LoadPair(const uint8_t* p, VF& v0, VF& v1) {
    v0 = Load(p);
    v1 = Load(p + kLanes * kBytes);
  }
};

// NOTE: sign and exponent-mantissa of an e4m3 byte, moved up by 8 and 7 bits, are an f16 of 2^-8 times the value; that
// holds for subnormals too, and f16 to f32 takes those at full speed. 0x7f and 0xff decode to 480: files that hold them
// are refused when they are opened.
struct SourceF8 {
  static constexpr int64_t kBytes = 1;
  static constexpr float kFactor = 256.0f;
  template <class D16>
  static HWY_INLINE hn::Vec<hn::Rebind<hwy::float16_t, D16>> ToF16(D16 d16, const uint8_t* p) {
    const hn::Rebind<int8_t, D16> d8;
    const auto wide = hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const int8_t*>(p)));
    const auto keep = hn::Set(d16, static_cast<int16_t>(0xBF80));
    return hn::BitCast(hn::Rebind<hwy::float16_t, D16>(), hn::And(hn::ShiftLeft<7>(wide), keep));
  }
  static HWY_INLINE VF Load(const uint8_t* p) { return hn::PromoteTo(DF(), ToF16(hn::Rebind<int16_t, DF>(), p)); }
  static HWY_INLINE void LoadPair(const uint8_t* p, VF& v0, VF& v1) {
    const hn::Repartition<int16_t, DF> d16;
    const hn::Repartition<hwy::float16_t, DF> df16;
    const auto half = ToF16(d16, p);
    const hn::Half<decltype(df16)> dh;
    v0 = hn::PromoteTo(DF(), hn::LowerHalf(dh, half));
    v1 = hn::PromoteTo(DF(), hn::UpperHalf(dh, half));
  }
};

// Calls f with the source that decodes `dtype`.
template <class F>
HWY_INLINE void WithSource(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32: return f(SourceF32());
    case DType::kBF16: return f(SourceBF16());
    case DType::kF16: return f(SourceF16());
    case DType::kF8E4M3: return f(SourceF8());
    default: CHECK(false, "{} is no stored type", DTypeName(dtype));
  }
}

// The last, partial vector of a row, zero-padded.
template <class Src>
HWY_INLINE VF LoadTail(const uint8_t* p, int64_t n) {
  alignas(64) uint8_t padded[kLanes * Src::kBytes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n * Src::kBytes));
  return Src::Load(padded);
}

// dst[0..n) <- factor * decoded p[0..n), and zeros up to the next whole vector. dst is vector aligned or not.
template <class Src>
HWY_INLINE void Widen(const uint8_t* HWY_RESTRICT p, int64_t n, float factor, float* HWY_RESTRICT dst) {
  const VF f = hn::Set(DF(), factor);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    VF v0, v1;
    Src::LoadPair(p + i * Src::kBytes, v0, v1);
    hn::StoreU(hn::Mul(v0, f), DF(), dst + i);
    hn::StoreU(hn::Mul(v1, f), DF(), dst + i + kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) hn::StoreU(hn::Mul(Src::Load(p + i * Src::kBytes), f), DF(), dst + i);
  if (i < n) hn::StoreU(hn::Mul(LoadTail<Src>(p + i * Src::kBytes, n - i), f), DF(), dst + i);
}

inline float LoadScale(const uint8_t* scales, int64_t block) {
  float scale;
  std::memcpy(&scale, scales + block * 4, 4);
  return scale;
}

// ---- Reductions.
// Lane i of the result, i < A, is the sum of the lanes of acc[i]: neighbours first, then neighbours of those. A is a
// power of two, at most the lanes of a vector. The sum of a vector does not depend on A.
template <int A>
HWY_INLINE VF ReduceLanes(VF* acc) {
  const DF d;
  int count = A;
  for (int64_t width = kLanes; width > 1; width /= 2) {
    if (count == 1) {
      acc[0] = hn::Add(hn::ConcatEven(d, acc[0], acc[0]), hn::ConcatOdd(d, acc[0], acc[0]));
      continue;
    }
    for (int i = 0; i < count / 2; ++i) {
      const VF lo = acc[2 * i], hi = acc[2 * i + 1];
      acc[i] = hn::Add(hn::ConcatEven(d, hi, lo), hn::ConcatOdd(d, hi, lo));
    }
    count /= 2;
  }
  return acc[0];
}

// sums[i] <- sum of the lanes of acc[i], for any power of two A. `sums` holds at least a vector.
template <int A>
HWY_INLINE void ReduceAll(VF* acc, float* sums) {
  if constexpr (A <= kLanes) {
    hn::StoreU(ReduceLanes<A>(acc), DF(), sums);
  } else {
    for (int i = 0; i < A; i += static_cast<int>(kLanes)) {
      hn::StoreU(ReduceLanes<static_cast<int>(kLanes)>(acc + i), DF(), sums + i);
    }
  }
}

// Exp of exponential.h, bit for bit where the target has fused multiply-adds.
HWY_INLINE VF ExpOf(VF x) {
  const DF d;
  const VF to_integer = hn::Set(d, kToInteger), log2e = hn::Set(d, kLog2E);
  const VF shifted = hn::MulAdd(x, log2e, to_integer);
  const VF r = hn::MulAdd(x, hn::Set(d, kLog2ERest), hn::MulAdd(x, log2e, hn::Sub(to_integer, shifted)));
  VF p = hn::MulAdd(hn::Set(d, kExp2C5), r, hn::Set(d, kExp2C4));
  for (float c : {kExp2C3, kExp2C2, kExp2C1, 1.0f}) p = hn::MulAdd(p, r, hn::Set(d, c));
  const DU du;
  const auto scale = hn::Add(hn::ShiftLeft<23>(hn::BitCast(du, shifted)), hn::Set(du, 0x3f800000u));
  const VF result = hn::Mul(p, hn::BitCast(d, scale));
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, kLeastExp)), hn::Zero(d),
                        hn::IfThenElse(hn::Gt(x, hn::Set(d, kMostExp)), hn::Inf(d), result));
}

HWY_INLINE float SumOfLanes(VF v) { return hn::GetLane(ReduceLanes<1>(&v)); }
HWY_INLINE float MaxOfLanes(VF v) { return hn::GetLane(hn::MaxOfLanes(DF(), v)); }

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#endif  // CACHALOT_KERNELS_CPU_SIMD_INL_H_
