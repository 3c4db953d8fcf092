// Products as tensor cores make them, in integers, and attention made of them.
#include "kernels/cpu/hopper.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/elementwise_kernels.h"
#include "kernels/cpu/quantize.h"
#include "kernels/exponential.h"
#include "kernels/gemm_plan.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/hopper.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"

#ifndef CACHALOT_HOPPER_TYPES
#define CACHALOT_HOPPER_TYPES
namespace cachalot {
namespace {

// A stored type's products.
struct Format {
  int bytes, mantissa_bits, exponent_mask;  // of a value
  int step;                                 // products of an instruction
  int exponent_bias;                        // of a product
  int aligned_bits, result_bits;            // F, and of the result behind its leading one
  int product_bits() const { return 2 * mantissa_bits; }
};
constexpr Format kE4m3 = {1, 3, 15, 32, 2 * 7, 13, 13}, kBf16 = {2, 7, 255, 16, 2 * 127, 25, 23};

constexpr int kNone = -1 << 20;  // below every exponent

struct Products {
  const int32_t *x_significand, *x_exponent, *w_significand, *w_exponent;
  int count;
};

}  // namespace
}  // namespace cachalot
#endif

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

// NOTE: the compiler makes vectors of these loops.
// The largest exponent of those that are not zero.
int LargestExponent(const Products& p) {
  int largest = kNone;
  for (int i = 0; i < p.count; ++i) {
    const int exponent = p.x_significand[i] * p.w_significand[i] != 0 ? p.x_exponent[i] + p.w_exponent[i] : kNone;
    largest = exponent > largest ? exponent : largest;
  }
  return largest;
}

// Their sum, each shifted up and then down to the largest exponent, its sign apart.
int64_t SumOf(const Products& p, int largest, int up) {
  int64_t sum = 0;
  for (int i = 0; i < p.count; ++i) {
    const int32_t product = p.x_significand[i] * p.w_significand[i], sign = product >> 31;
    const int32_t down = largest - p.x_exponent[i] - p.w_exponent[i];
    const uint32_t shifted = static_cast<uint32_t>((product ^ sign) - sign) << up >> (down > 31 ? 31 : down & 31);
    sum += (static_cast<int32_t>(shifted) ^ sign) - sign;
  }
  return sum;
}

// One instruction's share of a row: acc + x * w. NOTE: not for infinities and NaN.
float AddProducts(const Format& f, const Products& p, float acc) {
  const uint32_t bits = std::bit_cast<uint32_t>(acc);
  const int acc_field = static_cast<int>(bits >> 23 & 255), acc_exponent = std::max(acc_field, 1) - 127;
  const int64_t acc_significand = (bits & 0x7fffff) | (acc_field > 0 ? 0x800000 : 0);
  const int products = LargestExponent(p);
  int largest = products == kNone ? kNone : products - f.exponent_bias;
  if (acc_significand != 0) largest = std::max(largest, acc_exponent);
  if (largest == kNone) return 0.0f;

  int64_t sum = 0;
  if (products != kNone) sum = SumOf(p, largest + f.exponent_bias, f.aligned_bits - f.product_bits());
  if (acc_significand != 0) {
    const int down = largest - acc_exponent + 23 - f.aligned_bits;
    const int64_t cut = down >= 0 ? acc_significand >> std::min(down, 63) : acc_significand << -down;
    sum += std::signbit(acc) ? -cut : cut;
  }
  if (sum == 0) return 0.0f;
  uint64_t magnitude = static_cast<uint64_t>(std::abs(sum));
  const int drop = 63 - std::countl_zero(magnitude) - f.result_bits;
  if (drop > 0) magnitude = magnitude >> drop << drop;
  const double value = std::ldexp(static_cast<double>(magnitude), largest - f.aligned_bits);
  return static_cast<float>(sum < 0 ? -value : value);
}

// acc + x * w, instruction by instruction.
float AddAllProducts(const Format& f, const Products& p, float acc) {
  for (int k = 0; k < p.count; k += f.step) {
    const Products step = {p.x_significand + k, p.x_exponent + k, p.w_significand + k, p.w_exponent + k,
                           std::min(f.step, p.count - k)};
    acc = AddProducts(f, step, acc);
  }
  return acc;
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(AddAllProducts);

namespace {

// Values: significand * 2^(exponent - bias - mantissa bits), with its sign; the exponent is at least 1.
struct Row {
  std::vector<int32_t> significand, exponent;
};

// `stride`: bytes from value to value.
void ReadRow(const Format& f, const uint8_t* p, int64_t stride, int64_t n, Row* row) {
  row->significand.resize(n);
  row->exponent.resize(n);
  for (int64_t i = 0; i < n; ++i, p += stride) {
    const int bits = f.bytes == 1 ? p[0] : p[0] | p[1] << 8;
    const int exponent = bits >> f.mantissa_bits & f.exponent_mask, mantissa = bits & ((1 << f.mantissa_bits) - 1);
    const int significand = exponent > 0 ? mantissa | 1 << f.mantissa_bits : mantissa;
    const bool is_negative = bits >> f.mantissa_bits > f.exponent_mask;
    row->significand[i] = is_negative ? -significand : significand;
    row->exponent[i] = std::max(exponent, 1);
  }
}

// acc + x * w over values [begin, end) of x and as many of w from w_begin on.
float AddDot(const Format& f, const Row& x, int64_t begin, int64_t end, const Row& w, int64_t w_begin, float acc) {
  const Products products = {x.significand.data() + begin, x.exponent.data() + begin, w.significand.data() + w_begin,
                             w.exponent.data() + w_begin, static_cast<int>(end - begin)};
  return HWY_DYNAMIC_DISPATCH(AddAllProducts)(f, products, acc);
}

// f32 that holds bf16 values, `stride` floats from one to the next.
void ReadBf16(const float* values, int64_t stride, int64_t n, Row* row) {
  ReadRow(kBf16, reinterpret_cast<const uint8_t*>(values) + 2, stride * int64_t{sizeof(float)}, n, row);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What a split leaves: its latents are not divided by its sum yet.
struct SplitResult {
  float max, sum;
  std::vector<float> latents;
};

// What a head knows of its row: sums[i], of eight threads, each of two keys in eight of a split's even or odd pages.
struct HeadState {
  Row query;
  float max = -kInfinity, sums[8] = {};
  int64_t first_page = 0;  // of the split
  std::vector<SplitResult> before;

  float Sum() const {
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }
  // The split's end; the next one begins with `page`.
  void EndSplit(float* latents, int64_t latent_dim, int64_t page) {
    before.push_back({max, Sum(), {latents, latents + latent_dim}});
    std::fill_n(latents, latent_dim, 0.0f);
    max = -kInfinity;
    std::fill_n(sums, 8, 0.0f);
    first_page = page;
  }
};

// As a warp adds what each lane has.
float WarpSum(float (&x)[32]) {
  for (int offset = 16; offset > 0; offset /= 2) {
    float next[32];
    for (int i = 0; i < 32; ++i) next[i] = x[i] + x[i ^ offset];
    std::copy_n(next, 32, x);
  }
  return x[0];
}

void Join(const std::vector<SplitResult>& splits, int64_t latent_dim, float* out) {
  float max = -kInfinity, sum = 0;
  for (const SplitResult& split : splits) max = std::max(max, split.max);
  for (size_t first = 0; first < splits.size(); first += 32) {
    float parts[32] = {};
    for (size_t s = first; s < std::min(first + 32, splits.size()); ++s) {
      const float weight = Exp2(splits[s].max - max);
      parts[s - first] = weight * splits[s].sum;
      for (int64_t c = 0; c < latent_dim; ++c) out[c] = std::fma(weight, splits[s].latents[c], out[c]);
    }
    sum += WarpSum(parts);
  }
  for (int64_t c = 0; c < latent_dim; ++c) out[c] /= sum;
}

// exp2(score * scale - max) of a page's keys, in `p`; by how much earlier results shrink.
float PageProbabilities(HeadState* head, int64_t page, const float* scores, float scale, int64_t num_keys, float* p) {
  const float before = head->max;
  head->max = GrownMax(before, *std::max_element(scores, scores + num_keys) * scale);
  const float shrink = Exp2(before - head->max);
  for (int64_t k = 0; k < kBlockTokens; ++k) {
    p[k] = k < num_keys ? Exp2(std::fma(scores[k], scale, -head->max)) : 0.0f;
  }
  for (int i = 0; i < 8; ++i) {
    float sum = 0;
    for (int j = 0; j < 8; ++j) sum += p[8 * j + 2 * (i % 4)] + p[8 * j + 2 * (i % 4) + 1];
    head->sums[i] =
        i / 4 == (page - head->first_page) % 2 ? std::fma(head->sums[i], shrink, sum) : head->sums[i] * shrink;
  }
  return shrink;
}

}  // namespace

bool TensorCoresTake(const RowBlock& block, const Activation& x) {
  return x.values.dtype == block.dtype && (block.dtype == DType::kF8E4M3 || block.dtype == DType::kBF16) &&
         x.values.row_stride * DTypeBytes(block.dtype) % 16 == 0;
}

void TensorCoreBlock(const RowBlock& block, const Activation& x, const Tensor& y, int64_t num_splits) {
  thread_local Row w;
  thread_local std::vector<Row> rows;
  const bool is_fp8 = block.dtype == DType::kF8E4M3;
  const Format& format = is_fp8 ? kE4m3 : kBf16;
  const int64_t cols = x.cols(), step = kInnerBlockBytes / format.bytes, num_steps = (cols + step - 1) / step;
  const int64_t x_bytes = DTypeBytes(x.values.dtype), x_offset = x.values.dtype == DType::kF32 ? 2 : 0;
  rows.resize(std::max<size_t>(rows.size(), x.rows()));
  for (int64_t t = 0; t < x.rows(); ++t) {
    const auto* values = static_cast<const uint8_t*>(x.values.data) + t * x.values.row_stride * x_bytes + x_offset;
    ReadRow(format, values, x_bytes, cols, &rows[t]);
  }
  // Over steps [begin, end) of the inner dimension.
  const auto sum_of = [&](int64_t t, int64_t begin, int64_t end) {
    if (!is_fp8) return AddDot(format, rows[t], begin * step, std::min(cols, end * step), w, begin * step, 0.0f);
    float sum = 0;
    for (int64_t s = begin; s < end; ++s) {
      float w_scale;
      std::memcpy(&w_scale, block.scales + s * sizeof(float), sizeof(float));
      const float part = AddDot(format, rows[t], s * step, std::min(cols, (s + 1) * step), w, s * step, 0.0f);
      sum = std::fma(part, w_scale * x.scales.row<float>(t)[s], sum);
    }
    return sum;
  };
  for (int64_t r = 0; r < block.num_rows; ++r) {
    ReadRow(format, block.data + r * block.row_bytes, format.bytes, cols, &w);
    for (int64_t t = 0; t < x.rows(); ++t) {
      float sum = 0;
      for (int64_t i = 0; i < num_splits; ++i) {
        sum += sum_of(t, InnerSplitBegin(num_steps, num_splits, i), InnerSplitBegin(num_steps, num_splits, i + 1));
      }
      if (y.dtype == DType::kBF16) {
        y.row<uint16_t>(t)[block.first_row + r] = FloatToBf16(sum);
      } else {
        y.row<float>(t)[block.first_row + r] = sum;
      }
    }
  }
}

namespace {

// As plain_attention_kernels.cu: a warp a key, then keys one after the other. NOTE: a GPU that leaves keys out goes
// through them in another order.
void AttendPlainly(const RowAttention& row, absl::FunctionRef<const uint8_t*(int64_t)> page_at) {
  const int64_t latent_dim = row.kv_lora_rank, entry_dim = latent_dim + row.rope_dim;
  const int64_t stride = PaddedQuery(latent_dim, row.rope_dim);
  const int64_t entry_bytes = KvTokenBytes(row.dtype, latent_dim, row.rope_dim);
  std::vector<float> max(row.num_heads, -kInfinity), sum(row.num_heads, 0.0f), entries(kBlockTokens * stride + 64);
  for (int64_t h = 0; h < row.num_heads; ++h) std::fill_n(row.out + h * row.out_stride, latent_dim, 0.0f);
  for (int64_t first = 0; first < row.num_keys; first += kBlockTokens) {
    const int64_t num_keys = std::min<int64_t>(kBlockTokens, row.num_keys - first);
    const int64_t hidden = std::max<int64_t>(row.first_key - first, 0);
    const uint8_t* page = page_at(first / kBlockTokens);
    for (int64_t k = hidden; k < num_keys; ++k) {
      float* entry = entries.data() + k * stride;
      ReadKvEntry(row.dtype, page + k * entry_bytes, latent_dim, row.rope_dim, stride, entry);
      RoundToBf16(entry, entry_dim);
    }
    for (int64_t h = 0; h < row.num_heads; ++h) {
      const float* query = row.queries + h * row.query_stride;
      float* out = row.out + h * row.out_stride;
      float scores[kBlockTokens];
      for (int64_t k = hidden; k < num_keys; ++k) {
        float lanes[32] = {};
        for (int64_t i = 0; i < entry_dim; ++i) {
          lanes[i % 32] = std::fma(query[i], entries[k * stride + i], lanes[i % 32]);
        }
        scores[k] = WarpSum(lanes) * row.softmax_scale * kLog2E;
      }
      const float before = max[h];
      max[h] = std::max(before, *std::max_element(scores + hidden, scores + num_keys));
      const float shrink = Exp2(before - max[h]);
      sum[h] *= shrink;
      for (int64_t c = 0; c < latent_dim; ++c) out[c] *= shrink;
      for (int64_t k = hidden; k < num_keys; ++k) {
        const float p = Exp2(scores[k] - max[h]), rounded = Bf16ToFloat(FloatToBf16(p));
        sum[h] += p;
        for (int64_t c = 0; c < latent_dim; ++c) out[c] = std::fma(rounded, entries[k * stride + c], out[c]);
      }
    }
  }
  for (int64_t h = 0; h < row.num_heads; ++h) {
    float* out = row.out + h * row.out_stride;
    for (int64_t c = 0; c < latent_dim; ++c) out[c] /= sum[h];
    RoundToBf16(out, latent_dim);
  }
}

}  // namespace

void AttendAsGpu(const RowAttention& row, absl::FunctionRef<const uint8_t*(int64_t)> page_at) {
  if (row.kv_lora_rank != kLatentDim || row.rope_dim != kRopeDim || row.first_key > 0) {
    return AttendPlainly(row, page_at);
  }

  const int64_t latent_dim = row.kv_lora_rank, entry_dim = latent_dim + row.rope_dim;
  const int64_t stride = PaddedQuery(latent_dim, row.rope_dim);  // NOTE: entries are read as whole vectors
  const int64_t entry_bytes = KvTokenBytes(row.dtype, latent_dim, row.rope_dim);
  const float scale = row.softmax_scale * kLog2E;
  std::vector<HeadState> heads(row.num_heads);
  for (int64_t h = 0; h < row.num_heads; ++h) {
    ReadBf16(row.queries + h * row.query_stride, 1, entry_dim, &heads[h].query);
    std::fill_n(row.out + h * row.out_stride, latent_dim, 0.0f);
  }
  thread_local std::vector<float> entries;
  thread_local std::vector<Row> keys, columns;
  entries.assign(kBlockTokens * stride + 64, 0.0f);
  keys.resize(std::max<size_t>(keys.size(), kBlockTokens));
  columns.resize(std::max<size_t>(columns.size(), latent_dim));
  Row probabilities;
  for (int64_t first = 0; first < row.num_keys; first += kBlockTokens) {
    const int64_t num_keys = std::min<int64_t>(kBlockTokens, row.num_keys - first);
    const uint8_t* page = page_at(first / kBlockTokens);
    for (int64_t k = 0; k < num_keys; ++k) {
      float* entry = entries.data() + k * stride;
      ReadKvEntry(row.dtype, page + k * entry_bytes, latent_dim, row.rope_dim, stride, entry);
      RoundToBf16(entry, entry_dim);
      ReadBf16(entry, 1, entry_dim, &keys[k]);
    }
    for (int64_t c = 0; c < latent_dim; ++c) ReadBf16(entries.data() + c, stride, num_keys, &columns[c]);
    for (int64_t h = 0; h < row.num_heads; ++h) {
      float scores[kBlockTokens], p[kBlockTokens];
      float* out = row.out + h * row.out_stride;
      const int64_t index = first / kBlockTokens, next_split = static_cast<int64_t>(heads[h].before.size()) + 1;
      if (next_split < row.splits[h].num_splits &&
          index == SplitBegin(row.splits[h].num_pages, row.splits[h].num_splits, next_split)) {
        heads[h].EndSplit(out, latent_dim, index);
      }
      for (int64_t k = 0; k < num_keys; ++k) {
        scores[k] = AddDot(kBf16, heads[h].query, 0, entry_dim, keys[k], 0, 0.0f);
      }
      const float shrink = PageProbabilities(&heads[h], index, scores, scale, num_keys, p);
      RoundToBf16(p, kBlockTokens);
      ReadBf16(p, 1, kBlockTokens, &probabilities);
      for (int64_t c = 0; c < latent_dim; ++c) {
        out[c] = AddDot(kBf16, probabilities, 0, num_keys, columns[c], 0, out[c] * shrink);
      }
    }
  }
  for (int64_t h = 0; h < row.num_heads; ++h) {
    float* out = row.out + h * row.out_stride;
    if (row.splits[h].num_splits > 1) {
      heads[h].EndSplit(out, latent_dim, 0);  // NOTE: splits of later keys than the row sees add nothing
      Join(heads[h].before, latent_dim, out);
    } else {
      const float factor = 1.0f / heads[h].Sum();
      for (int64_t c = 0; c < latent_dim; ++c) out[c] *= factor;
    }
    RoundToBf16(out, latent_dim);
  }
}

}  // namespace cachalot
#endif  // HWY_ONCE
