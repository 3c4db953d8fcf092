// MlaAttention: queries absorbed through W_UK, attention in the latent space, results projected through W_UV; long
// prefill chunks with keys and values made of the latents instead (prefill_attention_kernels.h).
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/prefill_attention_kernels.h"

namespace cachalot {
namespace {

void CheckCache(const KvCache& cache, const SlotState& state, int64_t latent_dim, int64_t rope_dim) {
  CHECK(cache.dtype != KvDType::kF32, "a cache of f32");
  CHECK_SHAPE(cache.blocks, -1, kBlockTokens, KvTokenBytes(cache.dtype, latent_dim, rope_dim));
  CHECK(cache.blocks.is_contiguous());
  CHECK_SHAPE(state.block_table, -1, -1);
  static_assert(kBlockTokens == kPageTokens);
}

Activation FirstRows(const Activation& x, int64_t num_rows) {
  return {x.values.Rows(0, num_rows), x.scales.empty() ? Tensor() : x.scales.Rows(0, num_rows)};
}

}  // namespace

CudaOps::StepRowsKey CudaOps::KeyOf(const StepRows& rows, const StepInput& input) {
  return {rows.positions.data,    rows.slots.data,       input.seq_slot.data,
          input.query_start.data, rows.positions.dim(0), input.seq_slot.dim(0)};
}

bool CudaOps::HasPlan(const StepRows& rows, const StepInput& input, const AttentionArguments& a) {
  const bool is_step = KeyOf(rows, input) == step_rows_;
  const PlanKey key = {a.num_heads, a.num_tokens, a.max_rows};
  const bool has_plan = is_step && planned_ == key;
  planned_ = is_step ? key : PlanKey();
  return has_plan;
}

void CudaOps::MlaAttention(const Activation& out, const Tensor& q, const Weight& kv_up, const KvCache& cache,
                           const SlotState& state, const StepInput& input, const StepRows& rows, const RopeTable& rope,
                           float softmax_scale, int first_key) {
  const auto* up = dynamic_cast<const CudaKvUp*>(&kv_up);
  CHECK(up != nullptr, "this weight was not made by MakeKvUp");
  const int64_t num_tokens = q.dim(0), num_heads = up->w_uk().num_groups, num_sequences = input.seq_slot.dim(0);
  const int64_t latent_dim = up->cols(), rope_dim = rope.cos_sin.dim(1);
  CHECK(latent_dim == options_.limits.kv_lora_rank && rope_dim == options_.limits.qk_rope_head_dim &&
            num_heads <= options_.limits.num_heads,
        "kv_b of {} heads and {} latents, rope of {}", num_heads, latent_dim, rope_dim);
  CHECK_SHAPE(q, num_tokens, num_heads * (up->w_uk().cols + rope_dim));
  CheckActivation(out, num_tokens, num_heads * up->w_uv().rows);
  CheckCache(cache, state, latent_dim, rope_dim);
  CHECK_SHAPE(input.query_start, num_sequences + 1);
  CHECK_SHAPE(rows.positions, num_tokens);
  CHECK_SHAPE(rows.slots, num_tokens);
  if (num_tokens == 0) return;

  AttentionArguments attention;
  attention.cache = cache.blocks.as<uint8_t>();
  attention.num_blocks = cache.blocks.dim(0);
  attention.token_bytes = cache.blocks.dim(2);
  attention.is_fp8 = cache.dtype == KvDType::kFP8;
  attention.block_table = state.block_table.as<int32_t>();
  attention.table_stride = state.block_table.row_stride;
  attention.seq_slot = input.seq_slot.as<int32_t>();
  attention.query_start = input.query_start.as<int32_t>();
  attention.positions = rows.positions.as<int32_t>();
  attention.slots = rows.slots.as<int32_t>();
  attention.latent_dim = static_cast<int>(latent_dim);
  attention.rope_dim = static_cast<int>(rope_dim);
  attention.num_tokens = static_cast<int>(num_tokens);
  attention.num_sequences = static_cast<int>(num_sequences);
  attention.num_heads = static_cast<int>(num_heads);
  attention.num_sms = num_sms_;
  attention.softmax_scale = softmax_scale;
  attention.plan = workspace_.attention_plan;
  attention.partials = workspace_.attention_partials;
  CHECK(first_key >= 0 && first_key < kPageTokens, "first key {}", first_key);
  attention.first_key = first_key;
  attention.is_exact = options_.is_exact;

  // NOTE: what is absorbed comes first: rows of long chunks among its own it spoils, and both work in the same memory.
  PrefillArguments prefill;
  const bool has_long = first_key == 0 && TakesLongChunks(input.long_chunks, attention, out, q, *up, rope, &prefill);
  if (has_long) {
    attention.num_tokens = input.long_chunks.other_rows;
    attention.max_rows = input.long_chunks.min_rows;
  }
  if (attention.num_tokens > 0) {
    attention.has_plan = HasPlan(rows, input, attention);
    Absorb(FirstRows(out, attention.num_tokens), q.Rows(0, attention.num_tokens), *up, rope, attention);
  }
  if (!has_long) return;
  CHECK(LaunchPrefillAttention(stream_.get(), prefill), "no tensor map of {} rows", num_tokens);
  stream_.Launched("prefill attention");
}

// `prefill` is complete where they are taken.
bool CudaOps::TakesLongChunks(const LongChunks& chunks, const AttentionArguments& a, const Activation& out,
                              const Tensor& q, const CudaKvUp& up, const RopeTable& rope, PrefillArguments* prefill) {
  if (chunks.min_rows == 0 || workspace_.prefill_window == 0 || up.w_uk().cols != kPrefillNopeDim ||
      up.w_uv().rows != kPrefillValueDim) {
    return false;
  }
  CHECK(chunks.first_row < a.num_tokens && chunks.other_rows <= a.num_tokens && chunks.num_keys > 0,
        "long chunks of {} keys from row {} on", chunks.num_keys, chunks.first_row);
  PlacePrefillWorkspace(workspace_.attention, options_.limits.max_tokens, options_.limits.max_sequences,
                        options_.limits.num_heads, workspace_.prefill_window, prefill);
  prefill->q = RefOf(q);
  prefill->out = RefOf(out, options_.scale_rule);
  prefill->w_uk = up.w_uk();
  prefill->w_uv = up.w_uv();
  prefill->cache = a.cache;
  prefill->token_bytes = a.token_bytes;
  prefill->is_fp8 = a.is_fp8;
  prefill->block_table = a.block_table;
  prefill->table_stride = a.table_stride;
  prefill->seq_slot = a.seq_slot;
  prefill->query_start = a.query_start;
  prefill->positions = a.positions;
  prefill->slots = a.slots;
  prefill->cos_sin = rope.cos_sin.as<float>();
  prefill->num_tokens = a.num_tokens;
  prefill->num_sequences = a.num_sequences;
  prefill->num_heads = a.num_heads;
  prefill->num_sms = a.num_sms;
  prefill->long_chunks = chunks;
  prefill->softmax_scale = a.softmax_scale;
  return CanPrefill(*prefill);
}

void CudaOps::Absorb(const Activation& out, const Tensor& q, const CudaKvUp& up, const RopeTable& rope,
                     AttentionArguments attention) {
  const int64_t num_tokens = q.dim(0), num_heads = attention.num_heads, nope_dim = up.w_uk().cols;
  const int64_t v_dim = up.w_uv().rows, latent_dim = attention.latent_dim, rope_dim = attention.rope_dim;
  const int64_t entry_dim = latent_dim + rope_dim;
  const Tensor absorbed(workspace_.attention, DType::kBF16, {num_tokens, num_heads * entry_dim});
  const Tensor latents(static_cast<uint8_t*>(workspace_.attention) + workspace_.latent_out_offset, DType::kBF16,
                       {num_tokens, num_heads * latent_dim});
  RopeQueriesArguments rotation;
  rotation.q = RefOf(q);
  rotation.q_absorbed = absorbed.data;
  rotation.out = latents.data;
  rotation.cos_sin = rope.cos_sin.as<float>();
  rotation.positions = attention.positions;
  rotation.slots = attention.slots;
  rotation.num_tokens = static_cast<int>(num_tokens);
  rotation.num_heads = static_cast<int>(num_heads);
  rotation.nope_dim = static_cast<int>(nope_dim);
  rotation.latent_dim = static_cast<int>(latent_dim);
  rotation.rope_dim = static_cast<int>(rope_dim);
  // NOTE: in this order the product asks for its weight while the one that makes q still runs.
  Multiply(absorbed, entry_dim, Activation{q, Tensor()}, nope_dim + rope_dim, up.w_uk(), nullptr);
  LaunchRopeQueries(stream_.get(), rotation);
  stream_.Launched("rope");

  attention.q = absorbed.data;
  attention.out = latents.data;
  CHECK(LaunchAttention(stream_.get(), attention), "no tensor map of {} blocks", attention.num_blocks);
  stream_.Launched("attention");

  if (out.values.dtype != DType::kF8E4M3) {
    Multiply(out.values, v_dim, Activation{latents, Tensor()}, latent_dim, up.w_uv(), nullptr);
    return;
  }
  if (MultiplyQuantised(out, v_dim, Activation{latents, Tensor()}, latent_dim, up.w_uv())) return;
  const Tensor values(workspace_.attention_out, DType::kBF16, {num_tokens, num_heads * v_dim});
  Multiply(values, v_dim, Activation{latents, Tensor()}, latent_dim, up.w_uv(), nullptr);
  LaunchQuantize(stream_.get(), RefOf(out, options_.scale_rule), RefOf(values), num_tokens, num_heads * v_dim);
  stream_.Launched("quantize");
}

}  // namespace cachalot
