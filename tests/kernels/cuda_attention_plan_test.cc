// Attention's plan is made once a step: layers after the first find it, and a step that follows, in the same memory and
// replayed, has its own.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>

#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

constexpr int64_t kHeads = 16, kNope = 128, kRope = 64, kValue = 128, kLatent = 512, kContext = 2048;
constexpr int64_t kSequences = 3, kRowsEach = 2, kTokens = kSequences * kRowsEach;
constexpr int64_t kPages = kContext / kBlockTokens;

class CudaAttentionPlanTest : public ::testing::Test {
 protected:
  void SetUp() override {
    BackendOptions options = testing::CpuOptions();
    options.device = "cuda";
    options.activation = ActivationFormat::kBF16;
    OpLimits& limits = options.limits;
    limits.num_heads = kHeads;
    limits.qk_nope_head_dim = kNope, limits.qk_rope_head_dim = kRope;
    limits.v_head_dim = kValue, limits.kv_lora_rank = kLatent;
    limits.max_context = kContext;
    auto backend = MakeBackend(options);
    if (!backend.ok() && !std::filesystem::exists("/dev/nvidiactl")) GTEST_SKIP() << "no GPU: did not run";
    ASSERT_TRUE(backend.ok()) << "a driver, but no backend: " << backend.status();
    backend_ = *std::move(backend);
    kv_up_ = backend_->ops().MakeKvUp({Tensor(nullptr, DType::kBF16, {kHeads * (kNope + kValue), kLatent}), Tensor()},
                                      kHeads, kNope, kValue);
    ASSERT_TRUE(backend_->ops().FinishWeights().ok());
    MakeStep();
  }

  Tensor Make(DType dtype, const std::vector<int64_t>& shape) {
    int64_t bytes = DTypeBytes(dtype);
    for (int64_t n : shape) bytes *= n;
    buffers_.push_back(*backend_->device().Allocate(bytes, Device::Memory::kDevice));
    return shape.size() == 1   ? Tensor(buffers_.back().data(), dtype, {shape[0]})
           : shape.size() == 2 ? Tensor(buffers_.back().data(), dtype, {shape[0], shape[1]})
                               : Tensor(buffers_.back().data(), dtype, {shape[0], shape[1], shape[2]});
  }
  template <typename T>
  void Put(const Tensor& tensor, const std::vector<T>& values) {
    Buffer pinned = *backend_->device().Allocate(values.size() * sizeof(T), Device::Memory::kPinnedHost);
    std::memcpy(pinned.data(), values.data(), values.size() * sizeof(T));
    backend_->device().Upload(tensor, pinned.data());
    Wait();
  }
  std::vector<uint16_t> Get(const Tensor& tensor) {
    Buffer pinned = *backend_->device().Allocate(tensor.num_bytes(), Device::Memory::kPinnedHost);
    backend_->device().Download(pinned.data(), tensor);
    Wait();
    const auto* values = static_cast<const uint16_t*>(pinned.data());
    return {values, values + tensor.num_elements()};
  }
  void Wait() { ASSERT_TRUE(backend_->device().Wait(backend_->device().Record(), absl::Seconds(10)).ok()); }

  std::vector<uint16_t> RandomBf16(int64_t n) {
    std::vector<uint16_t> values(n);
    for (uint16_t& v : values) {
      const float x = static_cast<float>(random_.Normal());
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof(bits));
      v = static_cast<uint16_t>(bits >> 16);
    }
    return values;
  }

  void MakeStep() {
    rows_ = {Make(DType::kI32, {kTokens}), Make(DType::kI32, {kTokens}), Make(DType::kI32, {kTokens})};
    other_slots_ = Make(DType::kI32, {kTokens});
    input_.seq_slot = Make(DType::kI32, {kSequences});
    input_.seq_start = Make(DType::kI32, {kSequences});
    input_.query_start = Make(DType::kI32, {kSequences + 1});
    input_.seq_params = Make(DType::kU8, {kSequences, sizeof(SlotParams)});
    input_.tokens = Make(DType::kI32, {kTokens});
    state_.length = Make(DType::kI32, {kSequences});
    state_.last_token = Make(DType::kI32, {kSequences});
    state_.params = Make(DType::kU8, {kSequences, sizeof(SlotParams)});
    state_.block_table = Make(DType::kI32, {kSequences, kPages});
    cache_ = {Make(DType::kU8, {kSequences * kPages, kBlockTokens, KvTokenBytes(KvDType::kBF16, kLatent, kRope)}),
              KvDType::kBF16};
    q_ = Make(DType::kBF16, {kTokens, kHeads * (kNope + kRope)});
    rope_ = {Make(DType::kF32, {kContext, kRope})};
    for (Tensor& out : outs_) out = Make(DType::kBF16, {kTokens, kHeads * kValue});
    std::vector<int32_t> table(kSequences * kPages);
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    Put(state_.block_table, table);
    for (const Tensor& params : {input_.seq_params, state_.params}) {
      Put(params, std::vector<uint8_t>(params.num_bytes(), 0));
    }
    for (const Tensor& zeros : {input_.tokens, state_.length, state_.last_token}) {
      Put(zeros, std::vector<int32_t>(zeros.num_elements(), 0));
    }
    Put<int32_t>(input_.seq_slot, {0, 1, 2});
    Put<int32_t>(input_.query_start, {0, kRowsEach, 2 * kRowsEach, 3 * kRowsEach});
    Put<int32_t>(other_slots_, {0, 0, 1, 1, 2, 2});
    Put(cache_.blocks, RandomBf16(cache_.blocks.num_bytes() / 2));
    Put(q_, RandomBf16(q_.num_elements()));
    std::vector<float> angles(kContext * kRope);
    for (float& x : angles) x = static_cast<float>(random_.Uniform());
    Put(rope_.cos_sin, angles);
  }

  void Attend(const Tensor& out, const StepRows& rows) {
    backend_->ops().MlaAttention({out, Tensor()}, q_, *kv_up_, cache_, state_, input_, rows, rope_, 0.1f, 0);
  }

  testing::Random random_{5};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weight> kv_up_;
  std::vector<Buffer> buffers_;
  StepRows rows_;
  StepInput input_;
  SlotState state_;
  KvCache cache_;
  Tensor q_, other_slots_, outs_[3];
  RopeTable rope_;
};

TEST_F(CudaAttentionPlanTest, IsMadeOnceAStep) {
  const auto layers = [this](int count) {
    return [this, count] {
      backend_->ops().BeginStep(rows_, state_, input_);
      for (int i = 0; i < count; ++i) Attend(outs_[i], rows_);
    };
  };
  Device& device = backend_->device();
  int kernels[4];
  for (int count = 0; count < 4; ++count) {
    ASSERT_TRUE(device.Prepare({count, 1, 1, 7}, layers(count)).ok());
    kernels[count] = device.NumKernels({count, 1, 1, 7});
  }
  EXPECT_EQ(kernels[2] - kernels[1], kernels[1] - kernels[0] - 1) << "the second layer plans nothing";
  EXPECT_EQ(kernels[3] - kernels[2], kernels[2] - kernels[1]);

  std::vector<uint16_t> before;
  for (const std::vector<int32_t>& starts : {std::vector<int32_t>{0, 1900, 64}, {1200, 3, 700}, {5, 6, 7}}) {
    Put(input_.seq_start, starts);
    for (const Tensor& out : outs_) Put(out, std::vector<uint16_t>(out.num_elements(), 0x7fc0));
    device.Submit({3, 1, 1, 7}, nullptr);
    const std::vector<uint16_t> first = Get(outs_[0]), second = Get(outs_[1]), third = Get(outs_[2]);
    // Rows that no step began are planned for themselves.
    Attend(outs_[0], {rows_.tokens, rows_.positions, other_slots_});
    EXPECT_EQ(Get(outs_[0]), first);
    EXPECT_EQ(second, first);
    EXPECT_EQ(third, first);
    EXPECT_NE(first, before);
    before = first;
  }
}

}  // namespace
}  // namespace cachalot
