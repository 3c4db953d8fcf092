// A backend whose verbs take tensors in host memory.
#include "tests/kernels/on_device.h"

#include <gtest/gtest.h>

#include <utility>

#include "tests/kernels/device_call.h"

namespace cachalot::testing {
namespace {

class OnDeviceOps : public Ops {
 public:
  explicit OnDeviceOps(Backend* backend) : ops_(backend->ops()), memory_(&backend->device()) {
    EXPECT_TRUE(ops_.FinishWeights().ok());  // a test may use no weights
  }

  std::unique_ptr<Weight> MakeVector(const Tensor& source) override { return Finished(ops_.MakeVector(source)); }
  std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& row_stacked) override {
    return Finished(ops_.MakeLinear(row_stacked));
  }
  std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) override {
    return Finished(ops_.MakeKvUp(kv_b, num_heads, nope_dim, v_dim));
  }
  std::unique_ptr<Weight> MakeExperts(const std::vector<std::vector<WeightPart>>& row_stacked_per_slot) override {
    return Finished(ops_.MakeExperts(row_stacked_per_slot));
  }
  absl::Status FinishWeights() override { return ops_.FinishWeights(); }

  void UpdateBlockTables(const SlotState& state, const Tensor& updates) override {
    DeviceCall at;
    at.Out(state).In(updates);
    memory_.Run(&at, [&] { ops_.UpdateBlockTables(at(state), at(updates)); });
  }
  void UpdateTokenBiases(const SlotState& state, const Tensor& updates) override {
    DeviceCall at;
    at.Out(state).In(updates);
    memory_.Run(&at, [&] { ops_.UpdateTokenBiases(at(state), at(updates)); });
  }
  void BeginStep(const StepRows& rows, const SlotState& state, const StepInput& input) override {
    DeviceCall at;
    at.Out(rows).Out(state).In(input);
    memory_.Run(&at, [&] { ops_.BeginStep(at(rows), at(state), at(input)); });
  }
  void CountTokens(const SlotState& state, const Tensor& tokens) override {
    DeviceCall at;
    at.Out(state).In(tokens);
    memory_.Run(&at, [&] { ops_.CountTokens(at(state), at(tokens)); });
  }

  void Embed(const Tensor& h, const Weight& embed_tokens, const StepRows& rows) override {
    DeviceCall at;
    at.Out(h).In(rows);
    memory_.Run(&at, [&] { ops_.Embed(at(h), embed_tokens, at(rows)); });
  }
  void AddRmsNorm(const Tensor& h, const Activation& x, const Tensor& plain, const Tensor& delta, const Weight& weight,
                  float eps) override {
    DeviceCall at;
    at.Out(h).Out(x).Out(plain).In(delta);
    memory_.Run(&at, [&] { ops_.AddRmsNorm(at(h), at(x), at(plain), at(delta), weight, eps); });
  }
  void Linear(const Tensor& y, const Activation& x, const Weight& w) override {
    DeviceCall at;
    at.Out(y).In(x);
    memory_.Run(&at, [&] { ops_.Linear(at(y), at(x), w); });
  }
  void LatentNormRopeWrite(const KvCache& cache, const SlotState& state, const Activation& q_latent, const Tensor& q_a,
                           const Tensor& kv, const Weight* q_a_layernorm, const Weight& kv_a_layernorm,
                           const StepRows& rows, const RopeTable& rope, float eps) override {
    DeviceCall at;
    at.Out(cache.blocks).In(state).Out(q_latent).In(q_a).In(kv).In(rows).In(rope.cos_sin);
    memory_.Run(&at, [&] {
      ops_.LatentNormRopeWrite(at(cache), at(state), at(q_latent), at(q_a), at(kv), q_a_layernorm, kv_a_layernorm,
                               at(rows), at(rope), eps);
    });
  }
  void MlaAttention(const Activation& out, const Tensor& q, const Weight& kv_up, const KvCache& cache,
                    const SlotState& state, const StepInput& input, const StepRows& rows, const RopeTable& rope,
                    float softmax_scale, int first_key) override {
    DeviceCall at;
    at.Out(out).In(q).In(cache.blocks).In(state).In(input).In(rows).In(rope.cos_sin);
    memory_.Run(&at, [&] {
      ops_.MlaAttention(at(out), at(q), kv_up, at(cache), at(state), at(input), at(rows), at(rope), softmax_scale,
                        first_key);
    });
  }
  void SiluMul(const Activation& out, const Tensor& gate_up) override {
    DeviceCall at;
    at.Out(out).In(gate_up);
    memory_.Run(&at, [&] { ops_.SiluMul(at(out), at(gate_up)); });
  }
  void Router(const Tensor& topk_slots, const Tensor& topk_weights, const Tensor& x, const Weight& gate,
              const Weight* correction_bias, const ExpertTable& experts, const StepRows& rows,
              const RouterOptions& options) override {
    DeviceCall at;
    at.Out(topk_slots).Out(topk_weights).In(x).In(experts.slots).Out(experts.counts).In(rows);
    memory_.Run(&at, [&] {
      ops_.Router(at(topk_slots), at(topk_weights), at(x), gate, correction_bias,
                  {at(experts.slots), at(experts.counts)}, at(rows), options);
    });
  }
  void GroupedLinear(const Tensor& y, const Activation& x, const Weight& experts, const Tensor& offsets) override {
    DeviceCall at;
    at.Out(y).In(x).In(offsets);
    memory_.Run(&at, [&] { ops_.GroupedLinear(at(y), at(x), experts, at(offsets)); });
  }
  void GroupedSiluMul(const Activation& out, const Tensor& gate_up, const Tensor& offsets) override {
    DeviceCall at;
    at.Out(out).In(gate_up).In(offsets);
    memory_.Run(&at, [&] { ops_.GroupedSiluMul(at(out), at(gate_up), at(offsets)); });
  }
  void GatherRows(const Activation& out, const Activation& x, const Tensor& row_token) override {
    DeviceCall at;
    at.Out(out).In(x).In(row_token);
    memory_.Run(&at, [&] { ops_.GatherRows(at(out), at(x), at(row_token)); });
  }
  void PreviousHidden(const Tensor& out, const Tensor& hidden, const Tensor& borders, const SlotState& state,
                      const StepRows& rows) override {
    DeviceCall at;
    at.Out(out).In(hidden).In(borders).In(state).In(rows);
    memory_.Run(&at, [&] { ops_.PreviousHidden(at(out), at(hidden), at(borders), at(state), at(rows)); });
  }
  void KeepBorders(const Tensor& borders, const Tensor& hidden, const SlotState& state, const StepRows& rows) override {
    DeviceCall at;
    at.Out(borders).In(hidden).In(state).In(rows);
    memory_.Run(&at, [&] { ops_.KeepBorders(at(borders), at(hidden), at(state), at(rows)); });
  }
  void BeginDrafts(const StepRows& rows, const StepInput& drafts, const SlotState& state, const StepInput& input,
                   const Tensor& num_accepted) override {
    DeviceCall at;
    at.Out(rows).Out(drafts).In(state).In(input).In(num_accepted);
    memory_.Run(&at, [&] { ops_.BeginDrafts(at(rows), at(drafts), at(state), at(input), at(num_accepted)); });
  }
  void ProposeDrafts(const Tensor& proposed, const StepRows& rows, const SlotState& state, const Tensor& logits,
                     const StepInput& drafts, int index, int num_valid_tokens) override {
    DeviceCall at;
    at.Out(proposed).Out(rows).Out(state).In(logits).In(drafts);
    memory_.Run(&at, [&] {
      ops_.ProposeDrafts(at(proposed), at(rows), at(state), at(logits), at(drafts), index, num_valid_tokens);
    });
  }
  void Sample(const SampleOutput& out, const SlotState& state, const Tensor& logits, const Tensor& mask,
              const StepInput& input, const StepRows& rows, int num_valid_tokens) override {
    DeviceCall at;
    at.Out(out).Out(state).In(logits).In(mask).In(input).In(rows);
    memory_.Run(&at,
                [&] { ops_.Sample(at(out), at(state), at(logits), at(mask), at(input), at(rows), num_valid_tokens); });
  }

 private:
  std::unique_ptr<Weight> Finished(std::unique_ptr<Weight> weight) {
    const absl::Status status = ops_.FinishWeights();
    EXPECT_TRUE(status.ok()) << status;
    return weight;
  }

  Ops& ops_;
  DeviceMemory memory_;
};

// NOTE: in a step the routing stays where it is until Combine, so Dispatch has memory of its own.
class OnDeviceCommunicator : public Communicator {
 public:
  explicit OnDeviceCommunicator(Backend* backend)
      : communicator_(backend->communicator()), dispatch_(&backend->device()), combine_(&backend->device()) {}

  int rank() const override { return communicator_.rank(); }
  int num_ranks() const override { return communicator_.num_ranks(); }
  void Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                const Tensor& topk_weights) override {
    DeviceCall at;
    at.Out(rows.x).Out(rows.offsets).In(x).In(topk_slots).In(topk_weights);
    dispatch_.Run(&at, [&] {
      communicator_.Dispatch({at(rows.x), at(rows.offsets)}, at(x), at(topk_slots), at(topk_weights));
    });
  }
  void Combine(const Tensor& out, const Tensor& y, const Tensor& shared) override {
    DeviceCall at;
    at.Out(out).In(y).In(shared);
    combine_.Run(&at, [&] { communicator_.Combine(at(out), at(y), at(shared)); });
  }

 private:
  Communicator& communicator_;
  DeviceMemory dispatch_, combine_;
};

class OnDeviceBackend : public Backend {
 public:
  explicit OnDeviceBackend(std::unique_ptr<Backend> backend)
      : backend_(std::move(backend)), ops_(backend_.get()), communicator_(backend_.get()) {}

  std::string name() const override { return backend_->name(); }
  DType value_dtype() const override { return backend_->value_dtype(); }
  bool is_gpu() const override { return backend_->is_gpu(); }
  Device& device() override { return backend_->device(); }
  Ops& ops() override { return ops_; }
  Communicator& communicator() override { return communicator_; }

 private:
  // NOTE: destroyed from the last to the first: memory goes before its device.
  std::unique_ptr<Backend> backend_;
  OnDeviceOps ops_;
  OnDeviceCommunicator communicator_;
};

}  // namespace

std::unique_ptr<Backend> MakeOnDevice(const BackendOptions& options) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend(options);
  EXPECT_TRUE(backend.ok()) << backend.status();
  if (!backend.ok()) return nullptr;
  return std::make_unique<OnDeviceBackend>(*std::move(backend));
}

}  // namespace cachalot::testing
