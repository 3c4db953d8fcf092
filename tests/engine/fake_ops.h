// FakeOps: a backend that only makes weights, and remembers what of.
#ifndef CACHALOT_TESTS_ENGINE_FAKE_OPS_H_
#define CACHALOT_TESTS_ENGINE_FAKE_OPS_H_

#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/safetensors.h"
#include "kernels/ops.h"

namespace cachalot {

struct FakeWeight : Weight {
  FakeWeight(int64_t rows, int64_t cols, std::string made) : Weight(rows, cols), made(std::move(made)) {}
  std::string made;  // "linear lm_head.weight"
};

// Makes weights that say what they are made of; every other verb is unused.
class FakeOps : public Ops {
 public:
  explicit FakeOps(const Checkpoint& checkpoint) {
    for (const auto& [name, tensor] : checkpoint.tensors()) names_[tensor.data] = name;
  }

  std::unique_ptr<Weight> MakeVector(const Tensor& source) override {
    float first = 0;
    if (source.dtype == DType::kF32) std::memcpy(&first, source.data, sizeof first);
    vectors.emplace_back(Name(source), source, first);
    return std::make_unique<FakeWeight>(1, source.dim(0), absl::StrCat("vector ", Name(source)));
  }
  std::unique_ptr<Weight> MakeLinear(const std::vector<WeightPart>& parts) override {
    return std::make_unique<FakeWeight>(Rows(parts), parts[0].weight.dim(1), absl::StrCat("linear ", Names(parts)));
  }
  std::unique_ptr<Weight> MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) override {
    return std::make_unique<FakeWeight>(num_heads * (nope_dim + v_dim), kv_b.weight.dim(1),
                                        absl::StrCat("kv_up ", Names({kv_b})));
  }
  std::unique_ptr<Weight> MakeExperts(const std::vector<std::vector<WeightPart>>& experts) override {
    std::string made = "experts";
    for (const auto& parts : experts) absl::StrAppend(&made, " ", Names(parts));
    return std::make_unique<FakeWeight>(Rows(experts[0]), experts[0][0].weight.dim(1), made);
  }

  absl::Status FinishWeights() override { return absl::OkStatus(); }

  void UpdateBlockTables(const SlotState&, const Tensor&) override { Unused(); }
  void UpdateTokenBiases(const SlotState&, const Tensor&) override { Unused(); }
  void BeginStep(const StepRows&, const SlotState&, const StepInput&) override { Unused(); }
  void CountTokens(const SlotState&, const Tensor&) override { Unused(); }
  void Embed(const Tensor&, const Weight&, const StepRows&) override { Unused(); }
  void AddRmsNorm(const Tensor&, const Activation&, const Tensor&, const Tensor&, const Weight&, float) override {
    Unused();
  }
  void Linear(const Tensor&, const Activation&, const Weight&) override { Unused(); }
  void LatentNormRopeWrite(const KvCache&, const SlotState&, const Activation&, const Tensor&, const Tensor&,
                           const Weight*, const Weight&, const StepRows&, const RopeTable&, float) override {
    Unused();
  }
  void MlaAttention(const Activation&, const Tensor&, const Weight&, const KvCache&, const SlotState&, const StepInput&,
                    const StepRows&, const RopeTable&, float, int) override {
    Unused();
  }
  void SiluMul(const Activation&, const Tensor&) override { Unused(); }
  void Router(const Tensor&, const Tensor&, const Tensor&, const Weight&, const Weight*, const ExpertTable&,
              const StepRows&, const RouterOptions&) override {
    Unused();
  }
  void GroupedLinear(const Tensor&, const Activation&, const Weight&, const Tensor&) override { Unused(); }
  void GroupedSiluMul(const Activation&, const Tensor&, const Tensor&) override { Unused(); }
  void GatherRows(const Activation&, const Activation&, const Tensor&) override { Unused(); }
  void PreviousHidden(const Tensor&, const Tensor&, const Tensor&, const SlotState&, const StepRows&) override {
    Unused();
  }
  void KeepBorders(const Tensor&, const Tensor&, const SlotState&, const StepRows&) override { Unused(); }
  void BeginDrafts(const StepRows&, const StepInput&, const SlotState&, const StepInput&, const Tensor&) override {
    Unused();
  }
  void ProposeDrafts(const Tensor&, const StepRows&, const SlotState&, const Tensor&, const StepInput&, int,
                     int) override {
    Unused();
  }
  void Sample(const SampleOutput&, const SlotState&, const Tensor&, const Tensor&, const StepInput&, const StepRows&,
              int) override {
    Unused();
  }

  struct Vector {
    Vector(std::string name, Tensor source, float first) : name(std::move(name)), source(source), first(first) {}
    std::string name;
    Tensor source;
    float first;
  };
  std::vector<Vector> vectors;
  std::set<std::string> used;  // tensors of the checkpoint that became weights

 private:
  [[noreturn]] static void Unused() { CheckFailed("unused", "", __FILE__, __LINE__); }
  std::string Name(const Tensor& tensor) {
    auto it = names_.find(tensor.data);
    if (it == names_.end()) return "converted";
    used.insert(it->second);
    return it->second;
  }
  // Names joined by "|"; a scale's presence is a "*".
  std::string Names(const std::vector<WeightPart>& parts) {
    std::string names;
    for (const WeightPart& part : parts) {
      absl::StrAppend(&names, names.empty() ? "" : "|", Name(part.weight));
      EXPECT_EQ(part.weight.dtype == DType::kF8E4M3, !part.scale.empty());
      if (part.scale.empty()) continue;
      EXPECT_EQ(Name(part.scale), Name(part.weight) + "_scale_inv");
      EXPECT_EQ(part.scale.dtype, DType::kF32);
      EXPECT_EQ(part.scale.dim(0), (part.weight.dim(0) + 127) / 128);
      EXPECT_EQ(part.scale.dim(1), (part.weight.dim(1) + 127) / 128);
      names += "*";
    }
    return names;
  }
  static int64_t Rows(const std::vector<WeightPart>& parts) {
    int64_t rows = 0;
    for (const WeightPart& part : parts) rows += part.weight.dim(0);
    return rows;
  }

  std::map<const void*, std::string> names_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_ENGINE_FAKE_OPS_H_
