// A backend that computes nothing, so that every token is 1, and whose device dies after kSteps of them: a step fails,
// or (CACHALOT_HANGS) never ends. Touching it after that hangs, as it may with a real one. With another id than the
// program's (CACHALOT_BUILD_ID) it must not be used at all.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels/cuda_plugin.h"

namespace cachalot {
namespace {

constexpr Device::Event kSteps = 200;

#ifdef CACHALOT_HANGS
constexpr bool kHangs = true;
#else
constexpr bool kHangs = false;
#endif

bool is_dead = false;

void HangIfDead() {
  while (is_dead) pause();
}

class FaultyDevice : public Device {
 public:
  absl::StatusOr<Buffer> Allocate(size_t bytes, Memory) override {
    return Buffer(std::calloc(bytes + 64, 1), bytes, [](void* p) {
      HangIfDead();
      std::free(p);
    });
  }
  void Upload(const Tensor&, const void*) override { HangIfDead(); }
  void Download(void* dst, const Tensor& src) override {
    std::fill_n(static_cast<int32_t*>(dst), src.num_bytes() / 4, 1);  // a step's result: token 1, one accepted
  }
  void Submit(const StepKey&, std::function<void()> body) override {
    HangIfDead();
    body();
  }
  Event Record() override { return ++recorded_; }
  bool IsComplete(Event) override { return true; }
  absl::Status Wait(Event event, absl::Duration) override {
    if (kHangs && event > kSteps) {
      is_dead = true;
      usleep(100000);
      return absl::DeadlineExceededError("as it was told to");
    }
    HangIfDead();
    usleep(2000);
    is_dead = event > kSteps;
    return is_dead ? absl::InternalError("the GPU failed: as it was told to") : absl::OkStatus();
  }
  int Bucket(int n) const override { return n; }
  size_t FreeMemory() const override { return size_t{1} << 32; }

 private:
  Event recorded_ = 0;
};

class NoOps : public Ops {
 public:
  std::unique_ptr<Weight> MakeVector(const Tensor& source) override {
    return std::make_unique<Weight>(1, source.dim(0));
  }
  std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& parts) override {
    return std::make_unique<Weight>(0, parts[0].weight.dim(1));
  }
  std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int, int, int) override { return MakeLinear({kv_b}); }
  std::unique_ptr<Weight> MakeExperts(const std::vector<std::vector<WeightPart>>& slots) override {
    return MakeLinear(slots[0]);
  }
  absl::Status FinishWeights() override { return absl::OkStatus(); }
  void UpdateBlockTables(const SlotState&, const Tensor&) override {}
  void UpdateTokenBiases(const SlotState&, const Tensor&) override {}
  void BeginStep(const StepRows&, const SlotState&, const StepInput&) override {}
  void CountTokens(const SlotState&, const Tensor&) override {}
  void Embed(const Tensor&, const Weight&, const StepRows&) override {}
  void AddRmsNorm(const Tensor&, const Activation&, const Tensor&, const Tensor&, const Weight&, float) override {}
  void Linear(const Tensor&, const Activation&, const Weight&) override {}
  void LatentNormRopeWrite(const KvCache&, const SlotState&, const Activation&, const Tensor&, const Tensor&,
                           const Weight*, const Weight&, const StepRows&, const RopeTable&, float) override {}
  void MlaAttention(const Activation&, const Tensor&, const Weight&, const KvCache&, const SlotState&, const StepInput&,
                    const StepRows&, const RopeTable&, float, int) override {}
  void SiluMul(const Activation&, const Tensor&) override {}
  void Router(const Tensor&, const Tensor&, const Tensor&, const Weight&, const Weight*, const ExpertTable&,
              const StepRows&, const RouterOptions&) override {}
  void GroupedLinear(const Tensor&, const Activation&, const Weight&, const Tensor&) override {}
  void GroupedSiluMul(const Activation&, const Tensor&, const Tensor&) override {}
  void GatherRows(const Activation&, const Activation&, const Tensor&) override {}
  void PreviousHidden(const Tensor&, const Tensor&, const Tensor&, const SlotState&, const StepRows&) override {}
  void KeepBorders(const Tensor&, const Tensor&, const SlotState&, const StepRows&) override {}
  void BeginDrafts(const StepRows&, const StepInput&, const SlotState&, const StepInput&, const Tensor&) override {}
  void ProposeDrafts(const Tensor&, const StepRows&, const SlotState&, const Tensor&, const StepInput&, int,
                     int) override {}
  void Sample(const SampleOutput&, const SlotState&, const Tensor&, const Tensor&, const StepInput&, const StepRows&,
              int) override {}
};

class NoCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int num_ranks() const override { return 1; }
  void Dispatch(const ExpertRows&, const Activation&, const Tensor&, const Tensor&) override {}
  void Combine(const Tensor&, const Tensor&, const Tensor&) override {}
};

class FaultyBackend : public Backend {
 public:
  std::string name() const override { return "faulty"; }
  DType value_dtype() const override { return DType::kF32; }
  bool is_gpu() const override { return true; }
  Device& device() override { return device_; }
  Ops& ops() override { return ops_; }
  Communicator& communicator() override { return communicator_; }

 private:
  FaultyDevice device_;
  NoOps ops_;
  NoCommunicator communicator_;
};

}  // namespace
}  // namespace cachalot

#ifdef CACHALOT_BUILD_ID
const char cachalot::kBuildId[] = CACHALOT_BUILD_ID;
#endif

extern "C" {

__attribute__((visibility("default"))) const char* cachalot_cuda_build_id() { return cachalot::kBuildId; }

__attribute__((visibility("default"))) int cachalot_cuda_num_devices() { return 1; }

__attribute__((visibility("default"))) cachalot::Backend* cachalot_make_cuda_backend(const cachalot::BackendOptions*,
                                                                                     int* code, char*, size_t) {
  *code = 0;
  return new cachalot::FaultyBackend();
}
}
