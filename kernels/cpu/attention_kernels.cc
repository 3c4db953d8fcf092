// Attention kernels with Highway.
#include "kernels/cpu/attention_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/elementwise_kernels.h"
#include "kernels/cpu/quantize.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_kernels.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"
#include "kernels/cpu/dot_tile-inl.h"
#include "kernels/cpu/simd-inl.h"

#ifndef CACHALOT_ATTENTION_KERNELS_CONSTANTS
#define CACHALOT_ATTENTION_KERNELS_CONSTANTS
namespace cachalot {
namespace {

constexpr int64_t kAbsorbRows = 64;  // rows of W_UK decoded at a time, into the first-level cache
constexpr int64_t kAbsorbStride = kQuantGroup + 16;
constexpr int kKeyBlock = 8;  // keys that stay in the first-level cache for all queries

}  // namespace
}  // namespace cachalot
#endif

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

constexpr int kWideVectors = kManyRegisters ? 4 : 2;

// AddWeighted for any number of rows and any whole number of vectors.
inline void AddWeightedRows(const float* p, int64_t p_stride, int num_rows, const float* v, int64_t v_stride, int64_t n,
                            float* o, int64_t o_stride, int64_t width) {
  for (int64_t c = 0; c < width;) {
    const bool wide = c + kWideVectors * kLanes <= width;
    int i = 0;
    for (; i + 4 <= num_rows; i += 4) {
      const float* weights = p + i * p_stride;
      float* out = o + i * o_stride + c;
      if (wide) {
        AddWeighted<4, kWideVectors>(weights, p_stride, v + c, v_stride, n, out, o_stride);
      } else {
        AddWeighted<4, 1>(weights, p_stride, v + c, v_stride, n, out, o_stride);
      }
    }
    for (; i < num_rows; ++i) {
      const float* weights = p + i * p_stride;
      float* out = o + i * o_stride + c;
      if (wide) {
        AddWeighted<1, kWideVectors>(weights, p_stride, v + c, v_stride, n, out, o_stride);
      } else {
        AddWeighted<1, 1>(weights, p_stride, v + c, v_stride, n, out, o_stride);
      }
    }
    c += wide ? kWideVectors * kLanes : kLanes;
  }
}

void AbsorbHead(const std::vector<RowBlock>& w_uk, const Tensor& q, int64_t c_begin, int64_t c_count, float factor,
                float* out, int64_t out_stride, Arena arena) {
  float* tile = arena.Take<float>(kAbsorbRows * kAbsorbStride);
  const int64_t width = RoundUpToLanes(c_count), num_rows = q.dim(0);
  for (int64_t t = 0; t < num_rows; ++t) std::fill_n(out + t * out_stride + c_begin, width, 0.0f);
  for (const RowBlock& block : w_uk) {
    for (int64_t begin = 0; begin < block.num_rows; begin += kAbsorbRows) {
      const int64_t n = std::min(kAbsorbRows, block.num_rows - begin);
      WithSource(block.dtype, [&](auto source) {
        using Source = decltype(source);
        const float scale = block.scales == nullptr ? 1.0f : LoadScale(block.scales, c_begin / kQuantGroup);
        for (int64_t i = 0; i < n; ++i) {
          Widen<Source>(block.data + (begin + i) * block.row_bytes + c_begin * Source::kBytes, c_count,
                        Source::kFactor * scale * factor, tile + i * kAbsorbStride);
        }
      });
      const float* weights = static_cast<const float*>(q.data) + block.first_row + begin;
      AddWeightedRows(weights, q.row_stride, static_cast<int>(num_rows), tile, kAbsorbStride, n, out + c_begin,
                      out_stride, width);
    }
  }
}

// scores[q][key] for the keys [0, num_keys) of a page.
template <int A>
void ScorePage(const float* queries, int64_t query_stride, const float* keys, int64_t key_stride, int64_t length,
               int num_keys, float* scores) {
  alignas(64) float sums[A * kDotCols + kLanes];
  int key = 0;
  for (; key + kDotCols <= num_keys; key += kDotCols) {
    DotTile<A, kDotCols>(queries, query_stride, keys + key * key_stride, key_stride, length, sums);
    for (int i = 0; i < A; ++i) {
      for (int j = 0; j < kDotCols; ++j) scores[i * kGroupTokens + key + j] = sums[i * kDotCols + j];
    }
  }
  for (; key < num_keys; ++key) {
    DotTile<A, 1>(queries, query_stride, keys + key * key_stride, key_stride, length, sums);
    for (int i = 0; i < A; ++i) scores[i * kGroupTokens + key] = sums[i];
  }
}

// Scores of the first n keys to exp(score - max), zeros up to the next whole vector; max and sum.
inline void SoftmaxInPlace(float* scores, int n, float* max, float* sum) {
  const DF d;
  const int padded = static_cast<int>(RoundUpToLanes(n));
  std::fill(scores + n, scores + padded, -std::numeric_limits<float>::infinity());
  VF largest = hn::LoadU(d, scores);
  for (int i = 0; i < padded; i += kLanes) largest = hn::Max(largest, hn::LoadU(d, scores + i));
  *max = MaxOfLanes(largest);
  const VF m = hn::Set(d, *max);
  VF total = hn::Zero(d);
  for (int i = 0; i < padded; i += kLanes) {
    const VF e = ExpOf(hn::Sub(hn::LoadU(d, scores + i), m));
    hn::StoreU(e, d, scores + i);
    total = hn::Add(total, e);
  }
  *sum = SumOfLanes(total);
}

// Columns of the values of consecutive keys of a page.
struct ValueSlice {
  const float* values;
  int64_t stride, width;
  int first_key, num_keys;
};

// latents[i] += weights of the slice's keys * values, for up to four queries.
inline void AddValues(const ValueSlice& slice, const int32_t* visible, int count, const float* weights, float* latents,
                      int64_t latent_stride) {
  const int first_key = slice.first_key, least = *std::min_element(visible, visible + count);
  const int common = std::clamp(least - first_key, 0, slice.num_keys);
  AddWeightedRows(weights + first_key, kGroupTokens, count, slice.values, slice.stride, common, latents, latent_stride,
                  slice.width);
  for (int i = 0; i < count; ++i) {
    const int rest = std::clamp(visible[i] - first_key, 0, slice.num_keys) - common;
    if (rest <= 0) continue;
    AddWeightedRows(weights + i * kGroupTokens + first_key + common, kGroupTokens, 1,
                    slice.values + common * slice.stride, slice.stride, rest, latents + i * latent_stride,
                    latent_stride, slice.width);
  }
}

void AttendGroup(const GroupAttention& group, const PartialAttention& out, Arena arena) {
  const int num_queries = group.num_queries;
  const int64_t kv_lora_rank = group.kv_lora_rank, width = kv_lora_rank + group.rope_dim;
  const int64_t query_stride = PaddedQuery(kv_lora_rank, group.rope_dim), latent_stride = PaddedLatent(kv_lora_rank);
  const int max_visible = *std::max_element(group.visible, group.visible + num_queries);

  // Keys in fp32: where they are, when they are whole vectors of it; else decoded once for all queries.
  const bool in_place = group.dtype == KvDType::kF32 && kv_lora_rank % kLanes == 0 && width % kLanes == 0;
  const int64_t key_stride = in_place ? width : query_stride, length = in_place ? width : query_stride;
  const int64_t entry_bytes = KvTokenBytes(group.dtype, kv_lora_rank, group.rope_dim);
  const float* keys[kGroupPages] = {};
  int num_keys[kGroupPages] = {};
  float* scores = arena.Take<float>(kTileQueries * kGroupTokens);
  float* decoded = in_place ? nullptr : arena.Take<float>(kGroupTokens * query_stride + 64);
  for (int page = 0; page < kGroupPages; ++page) {
    num_keys[page] = std::clamp(max_visible - page * kBlockTokens, 0, kBlockTokens);
    keys[page] = reinterpret_cast<const float*>(group.pages[page]);
    if (in_place) continue;
    float* dst = decoded + page * kBlockTokens * query_stride;
    keys[page] = dst;
    for (int key = 0; key < num_keys[page]; ++key) {
      ReadKvEntry(group.dtype, group.pages[page] + key * entry_bytes, kv_lora_rank, group.rope_dim, query_stride,
                  dst + key * query_stride);
    }
  }

  // Scores of all keys that any query sees; those past a query's own are not looked at.
  for (int page = 0; page < kGroupPages; ++page) {
    for (int key = 0; key < num_keys[page]; key += kKeyBlock) {
      const float* block = keys[page] + key * key_stride;
      const int n = std::min(kKeyBlock, num_keys[page] - key);
      float* to = scores + page * kBlockTokens + key;
      int q = 0;
      for (; q + kDotRows <= num_queries; q += kDotRows) {
        ScorePage<kDotRows>(group.queries + q * query_stride, query_stride, block, key_stride, length, n,
                            to + q * kGroupTokens);
      }
      for (; q < num_queries; ++q) {
        ScorePage<1>(group.queries + q * query_stride, query_stride, block, key_stride, length, n,
                     to + q * kGroupTokens);
      }
    }
  }

  for (int q = 0; q < num_queries; ++q) {
    std::fill_n(out.latents + q * latent_stride, latent_stride, 0.0f);
    if (group.visible[q] == 0) continue;
    std::fill_n(scores + q * kGroupTokens, group.num_hidden, -std::numeric_limits<float>::infinity());
    SoftmaxInPlace(scores + q * kGroupTokens, group.visible[q], out.max + q, out.sum + q);
  }

  // Values in key order: for four queries as far as all of them see, the rest one by one. A slice of a page's values
  // stays in the first-level cache for all queries.
  const int64_t value_width = RoundUpToLanes(kv_lora_rank), slice = kWideVectors * kLanes;
  for (int page = 0; page < kGroupPages && num_keys[page] > 0; ++page) {
    const int hidden = page == 0 ? group.num_hidden : 0;
    for (int64_t c = 0; c < value_width; c += slice) {
      const ValueSlice values = {keys[page] + hidden * key_stride + c, key_stride, std::min(slice, value_width - c),
                                 page * kBlockTokens + hidden, kBlockTokens - hidden};
      for (int q = 0; q < num_queries; q += 4) {
        AddValues(values, group.visible + q, std::min(4, num_queries - q), scores + q * kGroupTokens,
                  out.latents + q * latent_stride + c, latent_stride);
      }
    }
  }
}

void MergeAttention(const PartialAttention& total, const PartialAttention& part, const int32_t* visible,
                    int num_queries, int64_t kv_lora_rank) {
  const DF d;
  const int64_t stride = PaddedLatent(kv_lora_rank), width = RoundUpToLanes(kv_lora_rank);
  for (int q = 0; q < num_queries; ++q) {
    if (visible[q] == 0) continue;
    const float max = std::max(total.max[q], part.max[q]);
    const float keep = std::exp(total.max[q] - max), add = std::exp(part.max[q] - max);
    total.max[q] = max;
    total.sum[q] = total.sum[q] * keep + part.sum[q] * add;
    float* to = total.latents + q * stride;
    const float* from = part.latents + q * stride;
    const VF k = hn::Set(d, keep), a = hn::Set(d, add);
    for (int64_t c = 0; c < width; c += kLanes) {
      hn::StoreU(hn::MulAdd(hn::LoadU(d, to + c), k, hn::Mul(hn::LoadU(d, from + c), a)), d, to + c);
    }
  }
}

void FinishAttention(const PartialAttention& total, int num_queries, int64_t kv_lora_rank) {
  const DF d;
  const int64_t stride = PaddedLatent(kv_lora_rank), width = RoundUpToLanes(kv_lora_rank);
  for (int q = 0; q < num_queries; ++q) {
    const VF factor = hn::Set(d, 1.0f / total.sum[q]);
    float* latent = total.latents + q * stride;
    for (int64_t c = 0; c < width; c += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, latent + c), factor), d, latent + c);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(AbsorbHead);
HWY_EXPORT(AttendGroup);
HWY_EXPORT(MergeAttention);
HWY_EXPORT(FinishAttention);

size_t AbsorbArenaBytes() { return static_cast<size_t>(Arena::Bytes<float>(kAbsorbRows * kAbsorbStride)); }

size_t AttendArenaBytes(int64_t kv_lora_rank, int64_t rope_dim) {
  return static_cast<size_t>(Arena::Bytes<float>(kTileQueries * kGroupTokens) +
                             Arena::Bytes<float>(kGroupTokens * PaddedQuery(kv_lora_rank, rope_dim) + 64));
}

void AbsorbHead(const std::vector<RowBlock>& w_uk, const Tensor& q, int64_t c_begin, int64_t c_count, float factor,
                float* out, int64_t out_stride, Arena arena) {
  HWY_DYNAMIC_DISPATCH(AbsorbHead)(w_uk, q, c_begin, c_count, factor, out, out_stride, arena);
}

void AttendGroup(const GroupAttention& group, const PartialAttention& out, Arena arena) {
  HWY_DYNAMIC_DISPATCH(AttendGroup)(group, out, arena);
}

void MergeAttention(const PartialAttention& total, const PartialAttention& part, const int32_t* visible,
                    int num_queries, int64_t kv_lora_rank) {
  HWY_DYNAMIC_DISPATCH(MergeAttention)(total, part, visible, num_queries, kv_lora_rank);
}

void FinishAttention(const PartialAttention& total, int num_queries, int64_t kv_lora_rank) {
  HWY_DYNAMIC_DISPATCH(FinishAttention)(total, num_queries, kv_lora_rank);
}

}  // namespace cachalot
#endif  // HWY_ONCE
