// Multi-head latent attention, absorbed: queries into latent space, softmax over cached latents, values out of it.
//
// Rows go through in blocks that fit the workspace. Within a block a tile of queries of one sequence meets the keys
// group by group; groups are combined in order, so the result does not depend on who computed them.
#include <algorithm>
#include <vector>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/elementwise_kernels.h"
#include "kernels/cpu/hopper.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/cpu/quantize.h"
#include "kernels/gemm_plan.h"
#include "kernels/splits.h"

namespace cachalot {
namespace {

constexpr int64_t kRowBlockBytes = int64_t{64} << 20;  // of queries, latents and values of a block of rows
constexpr int64_t kSlotsPerThread = 16;                // partial results in flight

struct Dimensions {
  int64_t heads, nope, rope, value, latent;
  int64_t query_stride() const { return PaddedQuery(latent, rope); }
  int64_t latent_stride() const { return PaddedLatent(latent); }
  int64_t bytes_per_row() const {
    return 4 * heads * (query_stride() + latent_stride() + (nope + rope) + value + 3) + 4 * Arena::kAlign;
  }
};

// Queries of one sequence: consecutive (token, head) pairs of a block of rows.
struct QueryTile {
  int32_t first_query = 0, num_queries = 0;
  int32_t slot = 0;
  int32_t num_groups = 0;  // that its last query sees
  int64_t first_item = 0;  // of (tile, group) pairs, in order
};

PartialAttention TakePartial(Arena* arena, int64_t latent_stride) {
  return {arena->Take<float>(kTileQueries), arena->Take<float>(kTileQueries),
          arena->Take<float>(kTileQueries * latent_stride)};
}

int64_t PartialBytes(int64_t latent_stride) {
  return 2 * Arena::Bytes<float>(kTileQueries) + Arena::Bytes<float>(kTileQueries * latent_stride);
}

int64_t RowsPerBlock(const Dimensions& dims, int64_t max_rows) {
  return std::clamp<int64_t>(kRowBlockBytes / dims.bytes_per_row(), 1, std::max<int64_t>(max_rows, 1));
}

int64_t MaxTiles(const Dimensions& dims, int64_t num_rows) { return num_rows * (dims.heads / 16 + 2); }

}  // namespace

size_t CpuOps::AttentionWorkspaceBytes() const {
  const OpLimits& l = options_.limits;
  const Dimensions dims = {l.num_heads, l.qk_nope_head_dim, l.qk_rope_head_dim, l.v_head_dim, l.kv_lora_rank};
  const int64_t rows = RowsPerBlock(dims, l.max_tokens);
  return static_cast<size_t>(rows * dims.bytes_per_row() + Arena::Bytes<QueryTile>(MaxTiles(dims, rows)) +
                             kSlotsPerThread * pool_.num_threads() * PartialBytes(dims.latent_stride()) +
                             8 * Arena::kAlign);
}

// One block of rows on its way: the call's arguments and the block's workspace.
struct CpuOps::AttentionPlan {
  Dimensions dims;
  const CpuKvUp* kv_up;
  const KvCache* cache;
  const SlotState* state;
  const RopeTable* rope;
  float softmax_scale;
  int first_key;
  const int32_t* positions;  // of the block's rows
  const int32_t* slots;
  int64_t num_rows;
  Activation out;          // [rows,H*V]
  Tensor q;                // [rows,H*(N+R)] f32
  float* queries;          // [rows*H][query_stride] latent queries with their rotated part
  PartialAttention total;  // [rows*H]
  Tensor values;           // [rows,H*V] f32
  QueryTile* tiles;
  int64_t num_tiles, num_items;
  Arena slots_arena;  // partial results
  int64_t num_slots;
  bool imitates_gpu;
  // If it does: of the whole call, and of this block's (row, head) pairs.
  int64_t num_call_rows;
  const KeySplits* key_splits;

  void MakeTiles(int64_t tile_queries);
  // Keys of group g that the tile's queries see.
  void Visible(const QueryTile& tile, int64_t g, int32_t* visible) const;
  PartialAttention TotalOf(const QueryTile& tile) const {
    return {total.max + tile.first_query, total.sum + tile.first_query,
            total.latents + tile.first_query * dims.latent_stride()};
  }
  PartialAttention Slot(int64_t i) const {
    Arena arena = slots_arena;
    arena.Take<char>(i * PartialBytes(dims.latent_stride()));
    return TakePartial(&arena, dims.latent_stride());
  }
  // Where the result of (tile, g) goes: every query sees group 0, so that one begins the total.
  PartialAttention ResultOf(const QueryTile& tile, int64_t g, int64_t slot) const {
    return g == 0 ? TotalOf(tile) : Slot(slot);
  }
  // Of a product of the block's rows with one matrix [rows,cols] a head.
  int64_t GpuSplits(int64_t rows, int64_t cols) const {
    constexpr int64_t kStep = kInnerBlockBytes / 2;
    return PlanGemm({.num_rows = num_call_rows,
                     .num_groups = dims.heads,
                     .weight_rows = rows,
                     .num_steps = (cols + kStep - 1) / kStep,
                     .is_fp8 = false})
        .splits;
  }
  const uint8_t* PageAt(int32_t slot, int64_t index) const;
  void AttendRowAsGpu(int64_t t) const;
  void Attend(const QueryTile& tile, int64_t g, const PartialAttention& part, Arena arena) const;
  void Merge(const QueryTile& tile, int64_t g, const PartialAttention& part) const;
};

// A run is consecutive rows of one sequence at consecutive positions; tiles do not leave it.
void CpuOps::AttentionPlan::MakeTiles(int64_t tile_queries) {
  num_tiles = num_items = 0;
  for (int64_t t = 0; t < num_rows;) {
    int64_t end = t + 1;
    if (slots[t] < 0) {
      t = end;
      continue;
    }
    while (end < num_rows && slots[end] == slots[t] && positions[end] == positions[end - 1] + 1) ++end;
    for (int64_t first = t * dims.heads; first < end * dims.heads; first += tile_queries) {
      const int64_t last = std::min(first + tile_queries, end * dims.heads) - 1;
      const int32_t num_groups = positions[last / dims.heads] / kGroupTokens + 1;
      tiles[num_tiles++] = {static_cast<int32_t>(first), static_cast<int32_t>(last + 1 - first), slots[t], num_groups,
                            num_items};
      num_items += num_groups;
    }
    t = end;
  }
}

void CpuOps::AttentionPlan::Visible(const QueryTile& tile, int64_t g, int32_t* visible) const {
  for (int i = 0; i < tile.num_queries; ++i) {
    const int64_t position = positions[(tile.first_query + i) / dims.heads];
    visible[i] = static_cast<int32_t>(std::clamp<int64_t>(position + 1 - g * kGroupTokens, 0, kGroupTokens));
  }
}

const uint8_t* CpuOps::AttentionPlan::PageAt(int32_t slot, int64_t index) const {
  CHECK(index < state->block_table.dim(1), "page {} of {}", index, state->block_table.dim(1));
  const int64_t block = state->block_table.row<int32_t>(slot)[index];
  CHECK(block >= 0 && block < cache->blocks.dim(0), "block {} of {}", block, cache->blocks.dim(0));
  return cache->blocks.row<uint8_t>(block);
}

void CpuOps::AttentionPlan::Attend(const QueryTile& tile, int64_t g, const PartialAttention& part, Arena arena) const {
  int32_t visible[kTileQueries];
  Visible(tile, g, visible);
  GroupAttention group;
  group.queries = queries + tile.first_query * dims.query_stride();
  group.visible = visible;
  group.num_hidden = g == 0 ? first_key : 0;
  group.num_queries = tile.num_queries;
  group.dtype = cache->dtype;
  group.kv_lora_rank = dims.latent;
  group.rope_dim = dims.rope;
  const int32_t num_keys = visible[tile.num_queries - 1];  // NOTE: positions rise within a tile
  for (int page = 0; page < kGroupPages && page * kBlockTokens < num_keys; ++page) {
    group.pages[page] = PageAt(tile.slot, g * kGroupPages + page);
  }
  AttendGroup(group, part, arena);
}

void CpuOps::AttentionPlan::Merge(const QueryTile& tile, int64_t g, const PartialAttention& part) const {
  if (g > 0) {
    int32_t visible[kTileQueries];
    Visible(tile, g, visible);
    MergeAttention(TotalOf(tile), part, visible, tile.num_queries, dims.latent);
  }
  if (g < tile.num_groups - 1) return;
  FinishAttention(TotalOf(tile), tile.num_queries, dims.latent);
}

// Latent queries: q_nope * W_UK, then the rotated q_pe, both times the softmax scale.
void CpuOps::AbsorbQueries(const AttentionPlan& plan) {
  const Dimensions& d = plan.dims;
  const int64_t head_width = d.nope + d.rope, row_stride = d.heads * d.query_stride();
  const int64_t slices = (d.latent + kQuantGroup - 1) / kQuantGroup;
  pool_.Run(d.heads * slices, [&](int64_t task, int worker) {
    const int64_t h = task / slices, c = task % slices * kQuantGroup;
    float* out = plan.queries + h * d.query_stride();
    const Tensor nope = plan.q.Columns(h * head_width, d.nope);
    const float factor = plan.imitates_gpu ? 1.0f : plan.softmax_scale;  // NOTE: a GPU scales the scores
    const int64_t width = std::min<int64_t>(kQuantGroup, d.latent - c);
    if (plan.imitates_gpu) {
      Tensor absorbed(out, DType::kF32, {plan.num_rows, d.latent});
      absorbed.row_stride = row_stride;
      const RowBlock columns = plan.kv_up->w_uk_transposed(static_cast<int>(h)).Rows(c, width);
      TensorCoreBlock(columns, Activation{nope, Tensor()}, absorbed, plan.GpuSplits(d.latent, d.nope));
    } else {
      AbsorbHead(plan.kv_up->w_uk(static_cast<int>(h)), nope, c, width, factor, out, row_stride, WorkerArena(worker));
    }
    const auto round = [&](float* values, int64_t n) {
      if (plan.imitates_gpu) RoundToBf16(values, n);
    };
    for (int64_t t = 0; t < plan.num_rows; ++t) round(out + t * row_stride + c, width);
    // NOTE: the last slice may have written past C: the rotated part and the padding come after it.
    if (c + kQuantGroup < d.latent) return;
    for (int64_t t = 0; t < plan.num_rows; ++t) {
      float* query = out + t * row_stride;
      if (plan.slots[t] >= 0) {
        CHECK(plan.positions[t] < plan.rope->cos_sin.dim(0), "position {}", plan.positions[t]);
        Rope(plan.q.row<float>(t) + h * head_width + d.nope, plan.rope->cos_sin.row<float>(plan.positions[t]), d.rope,
             factor, query + d.latent);
        round(query + d.latent, d.rope);
      }
      std::fill(query + d.latent + d.rope, query + d.query_stride(), 0.0f);
    }
  });
}

void CpuOps::AttentionPlan::AttendRowAsGpu(int64_t t) const {
  if (slots[t] < 0) return;
  RowAttention row;
  row.queries = queries + t * dims.heads * dims.query_stride();
  row.query_stride = dims.query_stride();
  row.out = total.latents + t * dims.heads * dims.latent_stride();
  row.out_stride = dims.latent_stride();
  row.splits = key_splits + t * dims.heads;
  row.num_heads = dims.heads;
  row.kv_lora_rank = dims.latent;
  row.rope_dim = dims.rope;
  row.first_key = first_key;
  row.num_keys = positions[t] + 1;
  row.dtype = cache->dtype;
  row.softmax_scale = softmax_scale;
  AttendAsGpu(row, [&](int64_t index) { return PageAt(slots[t], index); });
}

void CpuOps::AttendTiles(const AttentionPlan& plan) {
  if (plan.imitates_gpu) return pool_.Run(plan.num_rows, [&](int64_t t, int) { plan.AttendRowAsGpu(t); });
  // With many tiles each goes through its groups alone.
  int64_t longest = 0;
  for (int64_t i = 0; i < plan.num_tiles; ++i) longest = std::max<int64_t>(longest, plan.tiles[i].num_groups);
  if (longest * 2 * pool_.num_threads() <= plan.num_items) {
    pool_.Run(plan.num_tiles, [&](int64_t i, int worker) {
      for (int64_t g = 0; g < plan.tiles[i].num_groups; ++g) {
        const PartialAttention result = plan.ResultOf(plan.tiles[i], g, worker);
        plan.Attend(plan.tiles[i], g, result, WorkerArena(worker));
        plan.Merge(plan.tiles[i], g, result);
      }
    });
    return;
  }

  // With few, (tile, group) pairs are shared out, as many at a time as there are slots for their results.
  const auto tile_of = [&](int64_t item) {
    return std::upper_bound(plan.tiles, plan.tiles + plan.num_tiles, item,
                            [](int64_t value, const QueryTile& tile) { return value < tile.first_item; }) -
           plan.tiles - 1;
  };
  for (int64_t begin = 0; begin < plan.num_items; begin += plan.num_slots) {
    const int64_t end = std::min(plan.num_items, begin + plan.num_slots);
    pool_.Run(end - begin, [&](int64_t i, int worker) {
      const QueryTile& tile = plan.tiles[tile_of(begin + i)];
      const int64_t g = begin + i - tile.first_item;
      plan.Attend(tile, g, plan.ResultOf(tile, g, i), WorkerArena(worker));
    });
    const int64_t first_tile = tile_of(begin), last_tile = tile_of(end - 1);
    pool_.Run(last_tile + 1 - first_tile, [&](int64_t i, int) {
      const QueryTile& tile = plan.tiles[first_tile + i];
      const int64_t from = std::max(begin, tile.first_item), to = std::min(end, tile.first_item + tile.num_groups);
      for (int64_t item = from; item < to; ++item) plan.Merge(tile, item - tile.first_item, plan.Slot(item - begin));
    });
  }
}

// Values: latents * W_UV^T, then into the type of `out`.
void CpuOps::ProjectValues(const AttentionPlan& plan) {
  const Dimensions& d = plan.dims;
  const int64_t pieces = (plan.num_rows + kLinearRows - 1) / kLinearRows;
  pool_.Run(d.heads * pieces, [&](int64_t task, int worker) {
    const int64_t h = task / pieces, t = task % pieces * kLinearRows;
    const int64_t num_rows = std::min(kLinearRows, plan.num_rows - t);
    Tensor latents(plan.total.latents + (t * d.heads + h) * d.latent_stride(), DType::kF32, {num_rows, d.latent});
    latents.row_stride = d.heads * d.latent_stride();
    const Tensor values = plan.values.Rows(t, num_rows).Columns(h * d.value, d.value);
    for (const RowBlock& block : plan.kv_up->w_uv(static_cast<int>(h))) {
      if (plan.imitates_gpu) {
        TensorCoreBlock(block, Activation{latents, Tensor()}, values, plan.GpuSplits(d.value, d.latent));
      } else {
        LinearBlock(block, Activation{latents, Tensor()}, values, WorkerArena(worker));
      }
    }
  });
  if (plan.values.data == plan.out.values.data) return;
  ForRows(plan.num_rows, d.heads * d.value, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      if (plan.imitates_gpu) RoundToBf16(plan.values.row<float>(t), d.heads * d.value);
      EmitActivationRow(plan.values.row<float>(t), plan.out, t, options_.scale_rule);
    }
  });
}

// How the GPU would cut the keys of every (row, head): tiles do not leave a sequence (attention_plan.cuh).
std::vector<KeySplits> GpuKeySplits(const Dimensions& dims, const StepInput& input, const int32_t* positions,
                                    int64_t num_rows) {
  std::vector<KeySplits> splits(num_rows * dims.heads);
  if (dims.latent != kLatentDim || dims.rope != kRopeDim) return splits;
  const int32_t* starts = input.query_start.as<int32_t>();
  int64_t total_pages = 0;
  const auto for_tiles = [&](auto&& f) {
    for (int64_t s = 0; s < input.seq_slot.dim(0); ++s) {
      if (input.seq_slot.as<int32_t>()[s] < 0) continue;
      const int64_t begin = starts[s] * dims.heads, end = starts[s + 1] * dims.heads;
      for (int64_t first = begin; first < end; first += kGpuTileQueries) {
        const int64_t last = std::min<int64_t>(first + kGpuTileQueries, end) - 1;
        f(first, last, positions[last / dims.heads] / kBlockTokens + 1);
      }
    }
  };
  for_tiles([&](int64_t, int64_t, int64_t pages) { total_pages += pages; });
  const int64_t pages_per_item = PagesPerItem(total_pages, kHopperSms);
  for_tiles([&](int64_t first, int64_t last, int64_t pages) {
    const auto num_splits = static_cast<int32_t>(NumKeySplits(pages, pages_per_item));
    for (int64_t i = first; i <= last; ++i) splits[i] = {static_cast<int32_t>(pages), num_splits};
  });
  return splits;
}

void CpuOps::MlaAttention(const Activation& out, const Tensor& q, const Weight& kv_up, const KvCache& cache,
                          const SlotState& state, const StepInput& input, const StepRows& rows, const RopeTable& rope,
                          float softmax_scale, int first_key) {
  const auto* up = dynamic_cast<const CpuKvUp*>(&kv_up);
  CHECK(up != nullptr, "this weight was not made by MakeKvUp");
  const int64_t num_rows = q.dim(0);
  const Dimensions dims = {up->num_heads(), up->nope_dim(), rope.cos_sin.dim(1), up->v_dim(), up->cols()};
  CHECK_SHAPE(q, num_rows, dims.heads * (dims.nope + dims.rope));
  CHECK_SHAPE(out.values, num_rows, dims.heads * dims.value);
  if (out.values.dtype == DType::kF8E4M3) {
    CHECK_SHAPE(out.scales, num_rows, (dims.heads * dims.value + kQuantGroup - 1) / kQuantGroup);
  }
  CHECK_SHAPE(cache.blocks, -1, kBlockTokens, KvTokenBytes(cache.dtype, dims.latent, dims.rope));
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK(first_key < kBlockTokens, "first key {}", first_key);
  for (int64_t t = 0; t < num_rows; ++t) {
    CHECK(rows.slots.as<int32_t>()[t] < 0 || rows.positions.as<int32_t>()[t] >= first_key, "row {} sees no key", t);
  }

  std::vector<KeySplits> key_splits;
  if (ImitatesGpu()) key_splits = GpuKeySplits(dims, input, rows.positions.as<int32_t>(), num_rows);
  const int64_t rows_per_block = RowsPerBlock(dims, options_.limits.max_tokens);
  for (int64_t begin = 0; begin < num_rows; begin += rows_per_block) {
    const int64_t n = std::min(rows_per_block, num_rows - begin), queries = n * dims.heads;
    Arena arena = SharedArena();
    AttentionPlan plan;
    plan.dims = dims;
    plan.kv_up = up;
    plan.cache = &cache;
    plan.state = &state;
    plan.rope = &rope;
    plan.softmax_scale = softmax_scale;
    plan.first_key = first_key;
    plan.imitates_gpu = ImitatesGpu();
    plan.num_call_rows = num_rows;
    plan.key_splits = key_splits.data() + (key_splits.empty() ? 0 : begin * dims.heads);
    plan.positions = rows.positions.as<int32_t>() + begin;
    plan.slots = rows.slots.as<int32_t>() + begin;
    plan.num_rows = n;
    plan.out = out.Rows(begin, n);
    plan.queries = arena.Take<float>(queries * dims.query_stride());
    plan.total = {arena.Take<float>(queries), arena.Take<float>(queries),
                  arena.Take<float>(queries * dims.latent_stride())};
    for (int64_t t = 0; t < n; ++t) {
      if (plan.slots[t] >= 0) continue;
      const int64_t size = dims.heads * dims.latent_stride();  // padding comes out as zeros
      std::fill_n(plan.total.latents + t * size, size, 0.0f);
    }
    // Arguments in fp32 stay where they are.
    plan.q = q.Rows(begin, n);
    if (q.dtype != DType::kF32) {
      plan.q = Tensor(arena.Take<float>(n * (q.dim(1) + 16)), DType::kF32, {n, q.dim(1) + 16}).Columns(0, q.dim(1));
      for (int64_t t = 0; t < n; ++t) WidenedRow(q, begin + t, plan.q.row<float>(t));
    }
    plan.values = plan.out.values;
    if (plan.values.dtype != DType::kF32) {
      const int64_t width = dims.heads * dims.value;
      plan.values = Tensor(arena.Take<float>(n * width), DType::kF32, {n, width});
    }
    plan.tiles = arena.Take<QueryTile>(MaxTiles(dims, n));
    plan.num_slots = kSlotsPerThread * pool_.num_threads();
    plan.slots_arena = arena;
    int64_t tile_queries = kTileQueries;
    plan.MakeTiles(tile_queries);
    while (tile_queries > 16 && plan.num_items < 2 * pool_.num_threads()) plan.MakeTiles(tile_queries /= 2);

    AbsorbQueries(plan);
    AttendTiles(plan);
    ProjectValues(plan);
  }
}

}  // namespace cachalot
