// Linear kernels: few rows stream the weights through registers, many rows decode a tile of weights once.
//
// One order of arithmetic for both: k in chunks of kChunk; within a chunk one vector accumulator over k in order, then
// ReduceLanes; chunks are added in order.
#include "kernels/cpu/linear_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear_kernels.cc"
#include "hwy/foreach_target.h"
// NOTE: after foreach_target.
#include "hwy/highway.h"
#include "kernels/cpu/dot_tile-inl.h"
#include "kernels/cpu/rows-inl.h"
#include "kernels/cpu/simd-inl.h"

#ifndef CACHALOT_LINEAR_KERNELS_CONSTANTS
#define CACHALOT_LINEAR_KERNELS_CONSTANTS
namespace cachalot {
namespace {

constexpr int64_t kChunk = 768;               // of k
constexpr int64_t kTileStride = kChunk + 16;  // NOTE: not a multiple of 4 KiB: rows must not share cache sets
constexpr int64_t kFewRows = 4;               // that share a pass over the weights
constexpr int64_t kFewSpan = 12 * kChunk;     // of k, packed at a time for few rows
constexpr int64_t kFewStride = kFewSpan + 16;
constexpr int64_t kPanelRows = 8;  // of x, packed at a time for many rows

}  // namespace
}  // namespace cachalot
#endif

HWY_BEFORE_NAMESPACE();
namespace cachalot {
namespace HWY_NAMESPACE {

// dst <- x[t, k0 .. k0+n) times the scales of x and w, zero-padded to whole vectors. k0 is a multiple of 128.
template <class Weights, class Source>
void PackRowFrom(const Activation& x, const RowBlock& block, int64_t t, int64_t k0, int64_t n, float* dst) {
  const uint8_t* row = static_cast<const uint8_t*>(x.values.data) + (t * x.values.row_stride + k0) * Source::kBytes;
  if (block.scales == nullptr && x.scales.empty()) return Widen<Source>(row, n, 1.0f, dst);
  const float* x_scales = x.scales.empty() ? nullptr : x.scales.row<float>(t);
  for (int64_t i = 0; i < n; i += kQuantGroup) {
    const int64_t group = (k0 + i) / kQuantGroup;
    float factor = Source::kFactor * Weights::kFactor;
    if (x_scales != nullptr) factor *= x_scales[group];
    if (block.scales != nullptr) factor *= LoadScale(block.scales, group);
    Widen<Source>(row + i * Source::kBytes, std::min<int64_t>(kQuantGroup, n - i), factor, dst + i);
  }
}

template <class Weights>
void PackRow(const Activation& x, const RowBlock& block, int64_t t, int64_t k0, int64_t n, float* dst) {
  WithSource(x.values.dtype, [&](auto source) { PackRowFrom<Weights, decltype(source)>(x, block, t, k0, n, dst); });
}

// totals[t][r] += x[t] . w[r] over k in [0, n), n at most kFewSpan; w in the stored type, R rows at once.
template <class Weights, int T, int R>
HWY_INLINE void StreamRows(const uint8_t* HWY_RESTRICT w, int64_t row_bytes, const float* HWY_RESTRICT x, int64_t n,
                           float* HWY_RESTRICT totals) {
  constexpr int64_t kB = Weights::kBytes;
  for (int64_t k0 = 0; k0 < n; k0 += kChunk) {
    const int64_t end = std::min(n, k0 + kChunk);
    VF acc[T * R];
    for (int i = 0; i < T * R; ++i) acc[i] = hn::Zero(DF());
    int64_t k = k0;
    for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
      VF x0[T], x1[T];
      for (int t = 0; t < T; ++t) {
        x0[t] = hn::LoadU(DF(), x + t * kFewStride + k);
        x1[t] = hn::LoadU(DF(), x + t * kFewStride + k + kLanes);
      }
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w + r * row_bytes + k * kB;
        // NOTE: rows are too short for the hardware to see far ahead: fetch the rows that come next.
        __builtin_prefetch(p + R * row_bytes, 0, 2);
        if constexpr (2 * kLanes * kB > 64) __builtin_prefetch(p + R * row_bytes + 64, 0, 2);
        VF w0, w1;
        Weights::LoadPair(p, w0, w1);
        for (int t = 0; t < T; ++t) acc[t * R + r] = hn::MulAdd(x0[t], w0, acc[t * R + r]);
        for (int t = 0; t < T; ++t) acc[t * R + r] = hn::MulAdd(x1[t], w1, acc[t * R + r]);
      }
    }
    for (; k < end; k += kLanes) {
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w + r * row_bytes + k * kB;
        const VF wk = end - k >= kLanes ? Weights::Load(p) : LoadTail<Weights>(p, end - k);
        for (int t = 0; t < T; ++t) {
          acc[t * R + r] = hn::MulAdd(hn::LoadU(DF(), x + t * kFewStride + k), wk, acc[t * R + r]);
        }
      }
    }
    alignas(64) float sums[T * R + kLanes];
    ReduceAll<T * R>(acc, sums);
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) totals[t * kQuantGroup + r] += sums[t * R + r];
    }
  }
}

template <class Weights, int T>
void StreamBlock(const RowBlock& block, const uint8_t* w, const float* x, int64_t n, float* totals) {
  // Enough chains of additions to hide their latency, few enough to stay in registers.
  constexpr int R = (kManyRegisters ? 8 : 4) / (T > 2 ? 2 : 1);
  int64_t r = 0;
  for (; r + R <= block.num_rows; r += R) {
    StreamRows<Weights, T, R>(w + r * block.row_bytes, block.row_bytes, x, n, totals + r);
  }
  for (; r < block.num_rows; ++r) {
    StreamRows<Weights, T, 1>(w + r * block.row_bytes, block.row_bytes, x, n, totals + r);
  }
}

inline void StoreTotals(const float* totals, const RowBlock& block, const Tensor& y, int64_t t) {
  EmitRow(totals, y.Columns(block.first_row, block.num_rows), t);
}

// Up to kFewRows rows of x from t0 on.
template <class Weights>
void FewRows(const RowBlock& block, const Activation& x, int64_t t0, const Tensor& y, Arena arena) {
  const int64_t cols = x.cols(), num_rows = std::min(kFewRows, x.rows() - t0);
  float* packed = arena.Take<float>(kFewRows * kFewStride);
  float* totals = arena.Take<float>(kFewRows * kQuantGroup);
  std::fill_n(totals, kFewRows * kQuantGroup, 0.0f);
  for (int64_t k0 = 0; k0 < cols; k0 += kFewSpan) {
    const int64_t n = std::min(kFewSpan, cols - k0);
    // NOTE: three rows run as four: a row of zeros costs less than another instantiation.
    for (int64_t t = 0; t < num_rows; ++t) PackRow<Weights>(x, block, t0 + t, k0, n, packed + t * kFewStride);
    if (num_rows == 3) std::fill_n(packed + 3 * kFewStride, RoundUpToLanes(n), 0.0f);
    const uint8_t* w = block.data + k0 * Weights::kBytes;
    switch (num_rows) {
      case 1: StreamBlock<Weights, 1>(block, w, packed, n, totals); break;
      case 2: StreamBlock<Weights, 2>(block, w, packed, n, totals); break;
      default: StreamBlock<Weights, 4>(block, w, packed, n, totals);
    }
  }
  for (int64_t t = 0; t < num_rows; ++t) StoreTotals(totals + t * kQuantGroup, block, y, t0 + t);
}

// Totals of many rows lie by register tile, [t / 4][r / kDotCols][4][kDotCols], so that a tile adds whole vectors.
constexpr int64_t kTileSize = kDotRows * kDotCols;
HWY_INLINE int64_t TileOffset(int64_t t, int64_t r) {
  return (t / kDotRows * (kQuantGroup / kDotCols) + r / kDotCols) * kTileSize;
}

// Piece `piece` of `num_pieces` of x[t, k0 .. k0+n), into the second-level cache.
HWY_INLINE void PrefetchRow(const Tensor& x, int64_t t, int64_t k0, int64_t n, int64_t piece, int64_t num_pieces) {
  if (t >= x.dim(0)) return;
  const int64_t element = DTypeBytes(x.dtype), size = n * element / num_pieces;
  const uint8_t* p = static_cast<const uint8_t*>(x.data) + (t * x.row_stride + k0) * element + size * piece;
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(p + i, 0, 2);
}

template <class Weights>
void ManyRows(const RowBlock& block, const Activation& x, const Tensor& y, Arena arena) {
  const int64_t cols = x.cols(), num_rows = x.rows();
  float* tile = arena.Take<float>(kQuantGroup * kTileStride);                // [128][kChunk] of w
  float* panel = arena.Take<float>(kPanelRows * kTileStride);                // [8][kChunk] of x
  float* totals = arena.Take<float>((num_rows + kPanelRows) * kQuantGroup);  // of x * w, by tiles
  std::fill_n(totals, (num_rows + kPanelRows) * kQuantGroup, 0.0f);
  for (int64_t k0 = 0; k0 < cols; k0 += kChunk) {
    const int64_t n = std::min(kChunk, cols - k0), padded = RoundUpToLanes(n);
    for (int64_t r = 0; r < block.num_rows; ++r) {
      Widen<Weights>(block.data + r * block.row_bytes + k0 * Weights::kBytes, n, 1.0f, tile + r * kTileStride);
    }
    for (int64_t t0 = 0; t0 < num_rows; t0 += kPanelRows) {
      const int64_t t_end = std::min(num_rows, t0 + kPanelRows);
      for (int64_t t = t0; t < t_end; ++t) PackRow<Weights>(x, block, t, k0, n, panel + (t - t0) * kTileStride);
      // NOTE: rows past the last one are multiplied too, as they lie in the workspace; nobody reads their totals.
      for (int64_t r = 0; r < block.num_rows; r += kDotCols) {
        for (int64_t i = r; i < r + kDotCols; ++i) {  // what the next panel packs
          PrefetchRow(x.values, t_end + i % kPanelRows, k0, n, i / kPanelRows, kQuantGroup / kPanelRows);
        }
        for (int64_t t = t0; t < t_end; t += kDotRows) {
          alignas(64) float sums[kTileSize + kLanes];
          DotTile<kDotRows, kDotCols>(panel + (t - t0) * kTileStride, kTileStride, tile + r * kTileStride, kTileStride,
                                      padded, sums);
          float* total = totals + TileOffset(t, r);
          for (int64_t i = 0; i < kTileSize; i += kLanes) {
            hn::StoreU(hn::Add(hn::LoadU(DF(), total + i), hn::LoadU(DF(), sums + i)), DF(), total + i);
          }
        }
      }
    }
  }
  float* row = panel;
  for (int64_t t = 0; t < num_rows; ++t) {
    for (int64_t r = 0; r < block.num_rows; ++r) {
      row[r] = totals[TileOffset(t, r) + t % kDotRows * kDotCols + r % kDotCols];
    }
    StoreTotals(row, block, y, t);
  }
}

void LinearBlock(const RowBlock& block, const Activation& x, const Tensor& y, Arena arena) {
  WithSource(block.dtype, [&](auto source) {
    using Weights = decltype(source);
    // A block of narrow weights stays in the second-level cache for a few passes, which beat a tile until then.
    const int64_t most = Weights::kBytes <= 2 ? 3 * kFewRows : kFewRows;
    if (x.rows() > most) return ManyRows<Weights>(block, x, y, arena);
    for (int64_t t = 0; t < x.rows(); t += kFewRows) FewRows<Weights>(block, x, t, y, arena);
  });
}

void DequantizeRow(const RowBlock& block, int64_t row, int64_t cols, float* dst) {
  WithSource(block.dtype, [&](auto source) {
    using Source = decltype(source);
    const uint8_t* p = block.data + row * block.row_bytes;
    if (block.scales == nullptr) return Widen<Source>(p, cols, Source::kFactor, dst);
    for (int64_t c = 0; c < cols; c += kQuantGroup) {
      Widen<Source>(p + c * Source::kBytes, std::min<int64_t>(kQuantGroup, cols - c),
                    Source::kFactor * LoadScale(block.scales, c / kQuantGroup), dst + c);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace cachalot
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace cachalot {

HWY_EXPORT(LinearBlock);
HWY_EXPORT(DequantizeRow);

size_t LinearArenaBytes() {
  const int64_t few = Arena::Bytes<float>(kFewRows * kFewStride) + Arena::Bytes<float>(kFewRows * kQuantGroup);
  const int64_t many = Arena::Bytes<float>(kQuantGroup * kTileStride) + Arena::Bytes<float>(kPanelRows * kTileStride) +
                       Arena::Bytes<float>((kLinearRows + kPanelRows) * kQuantGroup);
  return static_cast<size_t>(std::max(few, many));
}

void LinearBlock(const RowBlock& block, const Activation& x, const Tensor& y, Arena arena) {
  CHECK(x.rows() <= kLinearRows);
  HWY_DYNAMIC_DISPATCH(LinearBlock)(block, x, y, arena);
}

void DequantizeRow(const RowBlock& block, int64_t row, int64_t cols, float* dst) {
  HWY_DYNAMIC_DISPATCH(DequantizeRow)(block, row, cols, dst);
}

}  // namespace cachalot
#endif  // HWY_ONCE
