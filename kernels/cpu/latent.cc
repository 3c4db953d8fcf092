// The latent path: normed c and rotated k_pe into the cache, q_latent normed.
#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/elementwise_kernels.h"

namespace cachalot {
namespace {

const float* VectorValues(const Weight& w, int64_t size) {
  const auto* vector = dynamic_cast<const CpuVector*>(&w);
  CHECK(vector != nullptr && vector->cols() == size, "not a vector of {}", size);
  return vector->values();
}

}  // namespace

void CpuOps::LatentNormRopeWrite(const KvCache& cache, const SlotState& state, const Activation& q_latent,
                                 const Tensor& q_a, const Tensor& kv, const Weight* q_a_layernorm,
                                 const Weight& kv_a_layernorm, const StepRows& rows, const RopeTable& rope, float eps) {
  const int64_t num_rows = kv.dim(0), kv_lora_rank = kv_a_layernorm.cols(), rope_dim = rope.cos_sin.dim(1);
  const bool has_q = !q_latent.values.empty();
  CHECK_SHAPE(kv, num_rows, kv_lora_rank + rope_dim);
  CHECK_SHAPE(cache.blocks, -1, kBlockTokens, KvTokenBytes(cache.dtype, kv_lora_rank, rope_dim));
  CHECK_SHAPE(rows.slots, num_rows);
  CHECK_SHAPE(rows.positions, num_rows);
  CHECK(has_q == (q_a_layernorm != nullptr));
  if (has_q) {
    CHECK_SHAPE(q_a, num_rows, q_a_layernorm->cols());
    CHECK_SHAPE(q_latent.values, num_rows, q_a.dim(1));
  }
  const float* kv_weight = VectorValues(kv_a_layernorm, kv_lora_rank);
  const float* q_weight = has_q ? VectorValues(*q_a_layernorm, q_a.dim(1)) : nullptr;
  const int32_t* slots = rows.slots.as<int32_t>();
  const int32_t* positions = rows.positions.as<int32_t>();

  const auto write_entry = [&](int64_t t, float* scratch, float* normed) {
    const int64_t position = positions[t], index = position / kBlockTokens;
    CHECK(position < rope.cos_sin.dim(0) && index < state.block_table.dim(1), "position {}", position);
    const int64_t block = state.block_table.row<int32_t>(slots[t])[index];
    CHECK(block >= 0 && block < cache.blocks.dim(0), "block {} of {}", block, cache.blocks.dim(0));
    uint8_t* entry = cache.blocks.row<uint8_t>(block) + position % kBlockTokens * cache.blocks.dim(2);
    const float* x = WidenedRow(kv, t, scratch);
    RmsNorm(x, kv_weight, kv_lora_rank, eps, normed);
    Rope(x + kv_lora_rank, rope.cos_sin.row<float>(position), rope_dim, 1.0f, normed + kv_lora_rank);
    WriteKvEntry(cache.dtype, normed, kv_lora_rank, normed + kv_lora_rank, rope_dim, entry);
  };
  ForRows(num_rows, 8 * kv.dim(1), [&](int64_t begin, int64_t end, int worker) {
    Arena arena = WorkerArena(worker);
    float* scratch = arena.Take<float>(RowCapacity());
    float* normed = arena.Take<float>(RowCapacity());
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] >= 0) write_entry(t, scratch, normed);
      if (!has_q) continue;
      RmsNorm(WidenedRow(q_a, t, scratch), q_weight, q_a.dim(1), eps, normed);
      EmitActivationRow(normed, q_latent, t, options_.scale_rule);
    }
  });
}

}  // namespace cachalot
