// MlaAttention: queries absorbed through W_UK, attention in the latent space, results projected through W_UV.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/drafts_kernels.h"

namespace cachalot {
namespace {

void CheckCache(const KvCache& cache, const SlotState& state, int64_t latent_dim, int64_t rope_dim) {
  CHECK(cache.dtype != KvDType::kF32, "a cache of f32");
  CHECK_SHAPE(cache.blocks, -1, kBlockTokens, KvTokenBytes(cache.dtype, latent_dim, rope_dim));
  CHECK(cache.blocks.is_contiguous());
  CHECK_SHAPE(state.block_table, -1, -1);
  static_assert(kBlockTokens == kPageTokens);
}

}  // namespace

void CudaOps::MlaAttention(const Activation& out, const Tensor& q, const Weight& kv_up, const KvCache& cache,
                           const SlotState& state, const StepInput& input, const StepRows& rows, const RopeTable& rope,
                           float softmax_scale, int first_key) {
  const auto* up = dynamic_cast<const CudaKvUp*>(&kv_up);
  CHECK(up != nullptr, "this weight was not made by MakeKvUp");
  const int64_t num_tokens = q.dim(0), num_heads = up->w_uk().num_groups;
  const int64_t nope_dim = up->w_uk().cols, v_dim = up->w_uv().rows, num_sequences = input.seq_slot.dim(0);
  const int64_t latent_dim = up->cols(), rope_dim = rope.cos_sin.dim(1), entry_dim = latent_dim + rope_dim;
  CHECK(latent_dim == options_.limits.kv_lora_rank && rope_dim == options_.limits.qk_rope_head_dim &&
            num_heads <= options_.limits.num_heads,
        "kv_b of {} heads and {} latents, rope of {}", num_heads, latent_dim, rope_dim);
  CHECK_SHAPE(q, num_tokens, num_heads * (nope_dim + rope_dim));
  CheckActivation(out, num_tokens, num_heads * v_dim);
  CheckCache(cache, state, latent_dim, rope_dim);
  CHECK_SHAPE(input.query_start, num_sequences + 1);
  CHECK_SHAPE(rows.positions, num_tokens);
  CHECK_SHAPE(rows.slots, num_tokens);
  if (num_tokens == 0) return;

  RopeQueriesArguments rotation;
  rotation.q = RefOf(q);
  rotation.q_absorbed = workspace_.q_absorbed;
  rotation.out = workspace_.latent_out;
  rotation.cos_sin = rope.cos_sin.as<float>();
  rotation.positions = rows.positions.as<int32_t>();
  rotation.slots = rows.slots.as<int32_t>();
  rotation.num_tokens = static_cast<int>(num_tokens);
  rotation.num_heads = static_cast<int>(num_heads);
  rotation.nope_dim = static_cast<int>(nope_dim);
  rotation.latent_dim = static_cast<int>(latent_dim);
  rotation.rope_dim = static_cast<int>(rope_dim);
  LaunchRopeQueries(stream_.get(), rotation);
  const Tensor absorbed(workspace_.q_absorbed, DType::kBF16, {num_tokens, num_heads * entry_dim});
  Multiply(absorbed, entry_dim, Activation{q, Tensor()}, nope_dim + rope_dim, up->w_uk(), nullptr);

  AttentionArguments attention;
  attention.q = workspace_.q_absorbed;
  attention.out = workspace_.latent_out;
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
  if (first_key > 0) {
    LaunchAttentionFrom(stream_.get(), attention, first_key);
  } else {
    CHECK(LaunchAttention(stream_.get(), attention), "no tensor map of {} blocks", attention.num_blocks);
  }
  stream_.Launched("attention");

  const Activation latents{Tensor(workspace_.latent_out, DType::kBF16, {num_tokens, num_heads * latent_dim}), Tensor()};
  if (out.values.dtype != DType::kF8E4M3) {
    Multiply(out.values, v_dim, latents, latent_dim, up->w_uv(), nullptr);
    return;
  }
  const Tensor values(workspace_.attention_out, DType::kBF16, {num_tokens, num_heads * v_dim});
  Multiply(values, v_dim, latents, latent_dim, up->w_uv(), nullptr);
  LaunchQuantize(stream_.get(), RefOf(out, options_.scale_rule), RefOf(values), num_tokens, num_heads * v_dim);
  stream_.Launched("quantize");
}

}  // namespace cachalot
