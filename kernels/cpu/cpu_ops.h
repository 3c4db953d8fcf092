// CpuOps: the verbs of ops.h on the CPU. One file a topic: linear, elementwise, latent, attention, router, steps,
// sampling; arithmetic lives in Highway kernels beside them.
#ifndef CACHALOT_KERNELS_CPU_CPU_OPS_H_
#define CACHALOT_KERNELS_CPU_CPU_OPS_H_

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/arena.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/weights.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace cachalot {

// Verbs run where they are called (the device thread), with the pool's help, and are done when they return.
class CpuOps : public Ops {
 public:
  // ResourceExhausted when the workspace does not fit. `device` and `pool` must outlive the result.
  static absl::StatusOr<std::unique_ptr<CpuOps>> Make(const BackendOptions& options, Device* device, ThreadPool* pool);

  std::unique_ptr<Weight> MakeVector(const Tensor& source) override;
  std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& row_stacked) override;
  std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) override;
  std::unique_ptr<Weight> MakeExperts(const std::vector<std::vector<WeightPart>>& row_stacked_per_slot) override;
  absl::Status FinishWeights() override { return absl::OkStatus(); }

  void UpdateBlockTables(const SlotState& state, const Tensor& updates) override;
  void UpdateTokenBiases(const SlotState& state, const Tensor& updates) override;
  void BeginStep(const StepRows& rows, const SlotState& state, const StepInput& input) override;
  void CountTokens(const SlotState& state, const Tensor& tokens) override;

  void Embed(const Tensor& h, const Weight& embed_tokens, const StepRows& rows) override;
  void AddRmsNorm(const Tensor& h, const Activation& x, const Tensor& plain, const Tensor& delta, const Weight& weight,
                  float eps) override;
  void Linear(const Tensor& y, const Activation& x, const Weight& w) override;
  void LatentNormRopeWrite(const KvCache& cache, const SlotState& state, const Activation& q_latent, const Tensor& q_a,
                           const Tensor& kv, const Weight* q_a_layernorm, const Weight& kv_a_layernorm,
                           const StepRows& rows, const RopeTable& rope, float eps) override;
  void MlaAttention(const Activation& out, const Tensor& q, const Weight& kv_up, const KvCache& cache,
                    const SlotState& state, const StepInput& input, const StepRows& rows, const RopeTable& rope,
                    float softmax_scale, int first_key) override;
  void SiluMul(const Activation& out, const Tensor& gate_up) override;
  void Router(const Tensor& topk_slots, const Tensor& topk_weights, const Tensor& x, const Weight& gate,
              const Weight* correction_bias, const ExpertTable& experts, const StepRows& rows,
              const RouterOptions& options) override;
  void GroupedLinear(const Tensor& y, const Activation& x, const Weight& experts, const Tensor& offsets) override;
  void GroupedSiluMul(const Activation& out, const Tensor& gate_up, const Tensor& offsets) override;
  void GatherRows(const Activation& out, const Activation& x, const Tensor& row_token) override;

  void PreviousHidden(const Tensor& out, const Tensor& hidden, const Tensor& borders, const SlotState& state,
                      const StepRows& rows) override;
  void KeepBorders(const Tensor& borders, const Tensor& hidden, const SlotState& state, const StepRows& rows) override;
  void BeginDrafts(const StepRows& rows, const StepInput& drafts, const SlotState& state, const StepInput& input,
                   const Tensor& num_accepted) override;
  void ProposeDrafts(const Tensor& proposed, const StepRows& rows, const SlotState& state, const Tensor& logits,
                     const StepInput& drafts, int index, int num_valid_tokens) override;

  void Sample(const SampleOutput& out, const SlotState& state, const Tensor& logits, const Tensor& mask,
              const StepInput& input, const StepRows& rows, int num_valid_tokens) override;

 private:
  CpuOps(const BackendOptions& options, ThreadPool* pool) : options_(options), pool_(*pool) {}

  // Workspace of one worker, and workspace of the verb as a whole. Every verb may use all of both.
  Arena WorkerArena(int worker) const;
  Arena SharedArena() const { return Arena(shared_workspace_.data(), shared_workspace_.bytes()); }
  size_t WorkerArenaBytes() const;
  size_t SharedArenaBytes() const;
  size_t AttentionWorkspaceBytes() const;
  int64_t RowCapacity() const;  // values of the widest row that a verb takes

  // body(begin, end, worker) over [0, n) in pieces worth handing out; `cost` of one is in values touched.
  template <typename Body>
  void ForRows(int64_t n, int64_t cost, const Body& body) {
    constexpr int64_t kPieceCost = 1 << 15;
    const int64_t most = (n + 4 * pool_.num_threads() - 1) / (4 * pool_.num_threads());
    const int64_t least = kPieceCost / std::max<int64_t>(cost, 1) + 1;
    const int64_t piece = std::max<int64_t>(std::max(most, least), 1);
    pool_.Run((n + piece - 1) / piece,
              [&](int64_t i, int worker) { body(i * piece, std::min(n, (i + 1) * piece), worker); });
  }

  // One product of a batch that shares the pool.
  struct Product {
    const CpuLinear* w;
    Activation x;
    Tensor y;
    bool is_grouped;  // by expert
  };
  // Products and what attention multiplies are rounded and summed as on the GPU, whose oracle this is then.
  bool ImitatesGpu() const { return options_.value_dtype == DType::kBF16; }

  void RunProducts(int64_t num_products, absl::FunctionRef<Product(int64_t)> product);
  void SiluMulRows(const Activation& out, const Tensor& gate_up, int64_t num_rows);

  // Attention (attention.cc).
  struct AttentionPlan;
  void AbsorbQueries(const AttentionPlan& plan);
  void AttendTiles(const AttentionPlan& plan);
  void ProjectValues(const AttentionPlan& plan);

  // Sampling (sampling.cc).
  struct SampleCall;
  void SampleRow(const SampleCall& call, int64_t row, Arena arena);
  void VerifyDrafts(const SampleCall& call);

  const BackendOptions options_;
  ThreadPool& pool_;
  std::vector<int64_t> first_task_;  // of every product of a batch
  Buffer worker_workspace_;
  Buffer shared_workspace_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_CPU_OPS_H_
