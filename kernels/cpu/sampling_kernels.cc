// Sampling kernels with Highway.
#include "kernels/cpu/sampling_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sampling_kernels.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

#ifndef CACHALOT_SAMPLING_KERNELS_CONSTANTS
#define CACHALOT_SAMPLING_KERNELS_CONSTANTS
namespace cachalot {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// With u = (r + 0.5) * 2^-23 the noise -log(-log(u)) lies in (-2.82, 16.64).
constexpr float kNoiseSpan = 20.0f;

}  // namespace
}  // namespace cachalot
#endif

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

using VU = hn::Vec<DU>;

HWY_INLINE VF LoadOr(const float* x, int64_t n, float other) {
  if (n >= kLanes) return hn::LoadU(DF(), x);
  alignas(64) float padded[kLanes];
  std::fill_n(padded, kLanes, other);
  std::copy_n(x, n, padded);
  return hn::Load(DF(), padded);
}

inline float MaxOf(const float* x, int64_t n) {
  VF max = hn::Set(DF(), -kInfinity);
  for (int64_t i = 0; i < n; i += kLanes) max = hn::Max(LoadOr(x + i, n - i, -kInfinity), max);
  return MaxOfLanes(max);
}

float SumOfExp(const float* x, int64_t n, float max) {
  const VF m = hn::Set(DF(), max);
  VF sum = hn::Zero(DF());
  for (int64_t i = 0; i < n; i += kLanes) sum = hn::Add(sum, ExpOf(hn::Sub(LoadOr(x + i, n - i, -kInfinity), m)));
  return SumOfLanes(sum);
}

float LogSumExp(const float* x, int64_t n) {
  const float max = MaxOf(x, n);
  return max + std::log(SumOfExp(x, n, max));
}

void TopLogits(const float* x, int64_t n, int count, int32_t* ids, float* values) {
  std::fill_n(ids, count, -1);
  std::fill_n(values, count, -kInfinity);
  // NOTE: ids rise, so an equal value that comes later ranks lower.
  for (int64_t i = 0; i < n; i += kLanes) {
    const VF least = hn::Set(DF(), values[count - 1]);
    if (hn::AllFalse(DF(), hn::Gt(LoadOr(x + i, n - i, -kInfinity), least))) continue;
    for (int64_t id = i; id < std::min(n, i + kLanes); ++id) {
      if (!(x[id] > values[count - 1])) continue;
      int rank = count - 1;
      for (; rank > 0 && x[id] > values[rank - 1]; --rank) {
        values[rank] = values[rank - 1];
        ids[rank] = ids[rank - 1];
      }
      values[rank] = x[id];
      ids[rank] = static_cast<int32_t>(id);
    }
  }
}

int32_t ArgMax(const float* x, int64_t n) {
  const float max = MaxOf(x, n);
  if (max == -kInfinity) return 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == max) return static_cast<int32_t>(i);
  }
  return 0;
}

void BlockMaxima(const float* x, int64_t n, float* maxima) {
  for (int64_t b = 0; b < n / kLogitBlock; ++b) maxima[b] = MaxOf(x + b * kLogitBlock, kLogitBlock);
}

// The 64-bit products of 32-bit lanes, as low and high halves.
HWY_INLINE void MulWide(VU a, VU b, VU& low, VU& high) {
  const DU du;
  const hn::RepartitionToWide<DU> du64;
  const auto odd_a = hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(du64, a)));
  const auto even = hn::MulEven(a, b), odd = hn::MulEven(odd_a, b);
  low = hn::OddEven(hn::BitCast(du, hn::ShiftLeft<32>(odd)), hn::BitCast(du, even));
  high = hn::OddEven(hn::BitCast(du, odd), hn::BitCast(du, hn::ShiftRight<32>(even)));
}

// Philox4x32-10 (Salmon et al., SC'11) of the counters {c0, c1, c2, 0}.
HWY_INLINE void Philox(VU c0, uint32_t c1, uint32_t c2, uint64_t seed, VU out[4]) {
  const DU du;
  VU x0 = c0, x1 = hn::Set(du, c1), x2 = hn::Set(du, c2), x3 = hn::Zero(du);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    VU low0, high0, low1, high1;
    MulWide(x0, hn::Set(du, 0xD2511F53u), low0, high0);
    MulWide(x2, hn::Set(du, 0xCD9E8D57u), low1, high1);
    x0 = hn::Xor(hn::Xor(high1, x1), hn::Set(du, key0));
    x1 = low1;
    x2 = hn::Xor(hn::Xor(high0, x3), hn::Set(du, key1));
    x3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  out[0] = x0;
  out[1] = x1;
  out[2] = x2;
  out[3] = x3;
}

// Gumbel noise from 23 random bits: u is exact in fp32 and never 0 or 1.
HWY_INLINE VF Gumbel(VU bits) {
  const DF d;
  const hn::RebindToSigned<DF> di;
  const VF r = hn::ConvertTo(d, hn::BitCast(di, hn::ShiftRight<9>(bits)));
  const VF u = hn::Mul(hn::Add(r, hn::Set(d, 0.5f)), hn::Set(d, 0x1p-23f));
  return hn::Neg(hn::Log(d, hn::Neg(hn::Log(d, u))));
}

int32_t GumbelArgMax(const float* x, int64_t n, float max, const NoiseKey& key) {
  const DF d;
  const DU du;
  VF best = hn::Set(d, -kInfinity);
  VU best_id = hn::Zero(du);
  const float floor = max - kNoiseSpan;
  alignas(64) uint32_t words[kLogitBlock];
  for (int64_t block = 0; block < n; block += kLogitBlock) {
    if (!(MaxOf(x + block, kLogitBlock) >= floor)) continue;
    for (int64_t i = 0; i < kLogitBlock / 4; i += kLanes) {
      VU out[4];
      Philox(hn::Iota(du, static_cast<uint32_t>(block / 4 + i)), key.position, key.choice, key.seed, out);
      hn::StoreInterleaved4(out[0], out[1], out[2], out[3], du, words + 4 * i);
    }
    for (int64_t i = 0; i < kLogitBlock; i += kLanes) {
      const VF value = hn::Add(hn::LoadU(d, x + block + i), Gumbel(hn::Load(du, words + i)));
      const auto better = hn::Gt(value, best);
      best = hn::IfThenElse(better, value, best);
      best_id = hn::IfThenElse(hn::RebindMask(du, better), hn::Iota(du, static_cast<uint32_t>(block + i)), best_id);
    }
  }
  // Across lanes: the largest, the lowest id among equals.
  alignas(64) float values[kLanes];
  alignas(64) uint32_t ids[kLanes];
  hn::Store(best, d, values);
  hn::Store(best_id, du, ids);
  int winner = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (values[i] > values[winner] || (values[i] == values[winner] && ids[i] < ids[winner])) winner = i;
  }
  return static_cast<int32_t>(ids[winner]);
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(LogSumExp);
HWY_EXPORT(TopLogits);
HWY_EXPORT(ArgMax);
HWY_EXPORT(BlockMaxima);
HWY_EXPORT(SumOfExp);
HWY_EXPORT(GumbelArgMax);

float LogSumExp(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(LogSumExp)(x, n); }
void TopLogits(const float* x, int64_t n, int count, int32_t* ids, float* values) {
  HWY_DYNAMIC_DISPATCH(TopLogits)(x, n, count, ids, values);
}
int32_t ArgMax(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(ArgMax)(x, n); }
void BlockMaxima(const float* x, int64_t n, float* maxima) { HWY_DYNAMIC_DISPATCH(BlockMaxima)(x, n, maxima); }
float SumOfExp(const float* x, int64_t n, float max) { return HWY_DYNAMIC_DISPATCH(SumOfExp)(x, n, max); }
int32_t GumbelArgMax(const float* x, int64_t n, float max, const NoiseKey& key) {
  return HWY_DYNAMIC_DISPATCH(GumbelArgMax)(x, n, max, key);
}

}  // namespace cachalot
#endif  // HWY_ONCE
