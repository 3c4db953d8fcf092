// CpuOps: workspace.
#include "kernels/cpu/cpu_ops.h"

#include <algorithm>

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/linear_kernels.h"

namespace cachalot {

absl::StatusOr<std::unique_ptr<CpuOps>> CpuOps::Make(const BackendOptions& options, Device* device, ThreadPool* pool) {
  auto ops = std::unique_ptr<CpuOps>(new CpuOps(options, pool));
  const size_t worker_bytes = ops->WorkerArenaBytes() * pool->num_threads();
  absl::StatusOr<Buffer> worker = device->Allocate(worker_bytes, Device::Memory::kDevice);
  if (!worker.ok()) return worker.status();
  ops->worker_workspace_ = *std::move(worker);
  absl::StatusOr<Buffer> shared = device->Allocate(ops->SharedArenaBytes(), Device::Memory::kDevice);
  if (!shared.ok()) return shared.status();
  ops->shared_workspace_ = *std::move(shared);
  ops->first_task_.resize(std::max(options.limits.num_local_experts, 1) + 1);
  return ops;
}

Arena CpuOps::WorkerArena(int worker) const {
  const size_t bytes = WorkerArenaBytes();
  return Arena(static_cast<char*>(worker_workspace_.data()) + worker * bytes, bytes);
}

int64_t CpuOps::RowCapacity() const {
  const OpLimits& l = options_.limits;
  const int64_t widths[] = {2 * l.hidden_size,
                            2 * l.max_ffn_width,
                            l.q_lora_rank,
                            l.kv_lora_rank + l.qk_rope_head_dim,
                            l.num_heads * (l.qk_nope_head_dim + l.qk_rope_head_dim),
                            l.num_heads * l.v_head_dim};
  return *std::max_element(std::begin(widths), std::end(widths)) + 64;
}

// The largest of what any verb takes.
size_t CpuOps::WorkerArenaBytes() const {
  const OpLimits& l = options_.limits;
  const int64_t padded_vocab = (l.vocab_size + 63) / 64 * 64;
  const size_t rows = 2 * Arena::Bytes<float>(RowCapacity());
  const size_t router = 3 * Arena::Bytes<float>(l.num_experts);
  const size_t sampling = Arena::Bytes<float>(padded_vocab) + Arena::Bytes<uint64_t>(padded_vocab + 1) +
                          Arena::Bytes<float>(padded_vocab / 64);
  const size_t attention = std::max(AbsorbArenaBytes(), AttendArenaBytes(l.kv_lora_rank, l.qk_rope_head_dim));
  return std::max({rows, router, sampling, attention, LinearArenaBytes()});
}

size_t CpuOps::SharedArenaBytes() const {
  const OpLimits& l = options_.limits;
  const size_t router = Arena::Bytes<float>(static_cast<int64_t>(l.max_tokens) * l.num_experts);
  return std::max(router, AttentionWorkspaceBytes());
}

}  // namespace cachalot
