// CudaOps: the verbs of ops.h on one stream of one GPU. One file a topic: X.cc checks shapes and queues, X_kernels.cu
// computes; X_kernels.h is all they share, so that nvcc sees no library's headers.
#ifndef CACHALOT_KERNELS_CUDA_CUDA_OPS_H_
#define CACHALOT_KERNELS_CUDA_CUDA_OPS_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/cuda_weights.h"
#include "kernels/cuda/stream.h"
#include "kernels/cuda/weight_loader.h"
#include "kernels/device.h"
#include "kernels/ops.h"

namespace cachalot {

struct AttentionArguments;
struct GemmArguments;
struct PrefillArguments;

class CudaOps : public Ops {
 public:
  // Unimplemented for dimensions that the attention kernels are not made for. `device`, `stream` and `loader` must
  // outlive the result. Workspace is allocated by the first FinishWeights: until then nothing large is.
  static absl::StatusOr<std::unique_ptr<CudaOps>> Make(const BackendOptions& options, Device* device,
                                                       CudaStream* stream, WeightLoader* loader);

  std::unique_ptr<Weight> MakeVector(const Tensor& source) override;
  std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& row_stacked) override;
  std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) override;
  std::unique_ptr<Weight> MakeExperts(const std::vector<std::vector<WeightPart>>& row_stacked_per_slot) override;
  absl::Status FinishWeights() override;
  int64_t MeasureWeights(const std::function<void()>& make) override;
  int64_t weight_bytes_copied() const override { return loader_.bytes_copied(); }

  void UpdateBlockTables(const SlotState& state, const Tensor& updates) override;
  void UpdateTokenBiases(const SlotState& state, const Tensor& updates) override;
  void BeginStep(const StepRows& rows, const SlotState& state, const StepInput& input) override;
  void CountTokens(const SlotState& state, const Tensor& tokens) override;

  void Beside(absl::FunctionRef<void()> work) override;
  void JoinBeside() override { stream_.Join(); }

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
  CudaOps(const BackendOptions& options, Device* device, CudaStream* stream, WeightLoader* loader)
      : options_(options), device_(*device), stream_(*stream), loader_(*loader) {}

  // Workspace. Every kind is made once, for the maxima of OpLimits (workspace.cc); verbs run one after the other on the
  // stream, so each may use all of its own.
  struct Workspace {
    float* router_logits = nullptr;  // [T,E]
    // Absorbed queries [T,H,C+R] bf16 and, behind them, means of latents [T,H,C] bf16; then, in the same memory, what
    // long chunks take: PlacePrefillWorkspace.
    void* attention = nullptr;
    size_t latent_out_offset = 0;
    int prefill_window = 0;          // key tiles; 0: this model has no attention of long chunks
    void* attention_out = nullptr;   // [T,H*V] bf16, before quantisation
    void* attention_plan = nullptr;  // attention_kernels.h: AttentionPlan's arrays
    float* attention_partials = nullptr;
    float* processed_logits = nullptr;  // [L,W], of rows that Sample reads more than once
    void* draft_samples = nullptr;      // SampleOutput of [S] drafts, which only tokens are taken of
  };
  absl::Status MakeWorkspace();

  // Attention's plan depends on a step's rows alone, and on which of them are left to long chunks: the first layer
  // makes it, the others find it in the workspace.
  struct StepRowsKey {
    const void *positions = nullptr, *slots = nullptr, *seq_slot = nullptr, *query_start = nullptr;
    int64_t num_tokens = 0, num_sequences = 0;
    bool operator==(const StepRowsKey&) const = default;
  };
  struct PlanKey {
    int num_heads = 0, num_tokens = 0, max_rows = 0;
    bool operator==(const PlanKey&) const = default;
  };
  static StepRowsKey KeyOf(const StepRows& rows, const StepInput& input);
  // Whether the workspace has the plan; from now on it has. Rows that BeginStep did not write may change unseen.
  bool HasPlan(const StepRows& rows, const StepInput& input, const AttentionArguments& a);

  // kernels/cuda/gemm/gemm.cc: y = x * w^T for every group; `offsets` null: all rows of x for each group.
  void Multiply(const Tensor& y, int64_t y_group_stride, const Activation& x, int64_t x_group_stride,
                const WeightRef& w, const int32_t* offsets);
  GemmArguments ProductOf(const ActivationRef& y, int64_t y_group_stride, const Activation& x, int64_t x_group_stride,
                          const WeightRef& w) const;
  void Launch(const GemmArguments& product);
  // The same in e4m3 of what bf16 leaves; false, and nothing done, where no kernel can.
  bool MultiplyQuantised(const Activation& y, int64_t y_group_stride, const Activation& x, int64_t x_group_stride,
                         const WeightRef& w);

  // kernels/cuda/attention.cc
  bool TakesLongChunks(const LongChunks& chunks, const AttentionArguments& a, const Activation& out, const Tensor& q,
                       const CudaKvUp& up, const RopeTable& rope, PrefillArguments* prefill);
  void Absorb(const Activation& out, const Tensor& q, const CudaKvUp& up, const RopeTable& rope,
              AttentionArguments attention);

  // kernels/cuda/weights.cc: groups of alike parts, stacked by rows. Without data when there is no room, or
  // when they are only measured.
  std::unique_ptr<CudaLinear> MakeMatrices(const std::vector<std::vector<WeightPart>>& groups);
  Buffer AllocateWeight(int64_t bytes);
  void CopyPart(const WeightRef& w, const WeightPart& part, int64_t group, int64_t first_row, int64_t scale_row);
  void CopyFromHost(void* dst, const void* src, int64_t bytes);

  const BackendOptions options_;
  Device& device_;
  CudaStream& stream_;
  WeightLoader& loader_;
  int num_sms_ = 0;
  Workspace workspace_;
  StepRowsKey step_rows_;  // of the last BeginStep
  // Those of rows that the kernel before has read, which therefore are there when the next begins, before that one
  // ends.
  const int32_t* old_offsets_ = nullptr;
  PlanKey planned_;  // of the plan for them; no heads: none
  std::vector<Buffer> buffers_;
  PendingWeights pending_;
  int64_t* measured_ = nullptr;  // MeasureWeights' count, while it runs
};

// Conversions that every verb needs (cuda_ops.cc). CHECK that the weight was made by the right Make.
MatrixRef RefOf(const Tensor& tensor);
ActivationRef RefOf(const Activation& activation, ScaleRule rule);
void CheckActivation(const Activation& x, int64_t rows, int64_t cols);
const float* VectorValues(const Weight& w, int64_t size);
const WeightRef& LinearRef(const Weight& w);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CUDA_CUDA_OPS_H_
