// The latent path: normed c and rotated k_pe into the cache, q_latent normed.
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/latent_kernels.h"

namespace cachalot {
namespace {

KvLayout LayoutOf(KvDType dtype) {
  if (dtype == KvDType::kF32) return KvLayout::kF32;
  return dtype == KvDType::kBF16 ? KvLayout::kBF16 : KvLayout::kFP8;
}

void SetCache(LatentArgs& args, const KvCache& cache, const SlotState& state) {
  args.blocks = cache.blocks.as<uint8_t>();
  args.block_bytes = cache.blocks.row_stride;
  args.token_bytes = cache.blocks.dim(2);
  args.num_blocks = cache.blocks.dim(0);
  args.layout = LayoutOf(cache.dtype);
  args.block_table = state.block_table.as<int32_t>();
  args.table_stride = state.block_table.row_stride;
  args.num_slots = static_cast<int32_t>(state.block_table.dim(0));
  args.table_cols = static_cast<int32_t>(state.block_table.dim(1));
}

}  // namespace

void CudaOps::LatentNormRopeWrite(const KvCache& cache, const SlotState& state, const Activation& q_latent,
                                  const Tensor& q_a, const Tensor& kv, const Weight* q_a_layernorm,
                                  const Weight& kv_a_layernorm, const StepRows& rows, const RopeTable& rope,
                                  float eps) {
  const int64_t num_rows = kv.dim(0), kv_lora_rank = kv_a_layernorm.cols(), rope_dim = rope.cos_sin.dim(1);
  const bool has_q = !q_latent.values.empty();
  CHECK_SHAPE(kv, num_rows, kv_lora_rank + rope_dim);
  CHECK_SHAPE(cache.blocks, -1, kBlockTokens, KvTokenBytes(cache.dtype, kv_lora_rank, rope_dim));
  CHECK_SHAPE(state.block_table, -1, -1);
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK(has_q == (q_a_layernorm != nullptr));
  // NOTE: scales of an fp8 entry are stored by words.
  CHECK(kv_lora_rank % 4 == 0 && rope_dim % 2 == 0 && kv_lora_rank <= kMaxLatentDim && rope_dim <= kMaxRopeDim,
        "kv_lora_rank {}, rope {}", kv_lora_rank, rope_dim);
  LatentArgs args = {};
  SetCache(args, cache, state);
  args.kv = RefOf(kv);
  args.kv_weight = VectorValues(kv_a_layernorm, kv_lora_rank);
  args.kv_lora_rank = static_cast<int32_t>(kv_lora_rank);
  args.rope_dim = static_cast<int32_t>(rope_dim);
  args.slots = rows.slots.as<int32_t>();
  args.positions = rows.positions.as<int32_t>();
  args.cos_sin = rope.cos_sin.as<float>();
  args.rope_stride = rope.cos_sin.row_stride;
  args.rope_positions = static_cast<int32_t>(rope.cos_sin.dim(0));
  args.eps = eps;
  if (has_q) {
    const int64_t q_rank = q_a_layernorm->cols();
    CHECK_SHAPE(q_a, num_rows, q_rank);
    CheckActivation(q_latent, num_rows, q_rank);
    args.q = {.h = RefOf(q_a),
              .x = RefOf(q_latent, options_.scale_rule),
              .plain = {},
              .delta = {},
              .weight = VectorValues(*q_a_layernorm, q_rank),
              .eps = eps,
              .cols = static_cast<int32_t>(q_rank)};
  }
  if (num_rows == 0) return;
  LaunchLatentNormRopeWrite(stream_.get(), args, num_rows);
  stream_.Launched("LatentNormRopeWrite");
}

}  // namespace cachalot
