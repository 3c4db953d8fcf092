// The part of Highway's library that dynamic dispatch calls.
//
// NOTE: Debian ships libhwy as a shared object only, and our binary needs nothing but libc. The kernels use Highway's
// headers; the two functions that those leave to the library, GetChosenTarget and SupportedTargets, are defined here.
#include "kernels/cpu/highway_targets.h"

#include <atomic>

#include "hwy/highway.h"
#include "kernels/check.h"

namespace hwy {
namespace {

// Zero: all that the machine has.
std::atomic<int64_t>& ForcedTarget() {
  static std::atomic<int64_t> target{0};
  return target;
}

int64_t MachineTargets() {
  int64_t targets = HWY_STATIC_TARGET;
#if HWY_ARCH_X86
  __builtin_cpu_init();
  // NOTE: Highway's AVX2 also uses F16C, which every processor with AVX2 has and clang 14 cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  if (avx2) targets |= HWY_AVX2;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    targets |= HWY_AVX3;
  }
#endif
  return targets & HWY_TARGETS;
}

}  // namespace

ChosenTarget& GetChosenTarget() {
  static ChosenTarget chosen;
  return chosen;
}

int64_t SupportedTargets() {
  const int64_t forced = ForcedTarget().load();
  return forced != 0 ? forced : MachineTargets();
}

}  // namespace hwy

namespace cachalot {

std::string SimdTargetName() {
  // NOTE: a better target is a lower bit.
  const int64_t targets = hwy::SupportedTargets();
  return hwy::TargetName(targets & -targets);
}

std::vector<std::string> SupportedSimdTargets() {
  std::vector<std::string> names;
  for (int64_t targets = hwy::MachineTargets(); targets != 0; targets &= targets - 1) {
    names.push_back(hwy::TargetName(targets & -targets));
  }
  return names;
}

void ForceSimdTarget(const std::string& name) {
  int64_t forced = 0;
  for (int64_t targets = hwy::MachineTargets(); targets != 0; targets &= targets - 1) {
    if (name == hwy::TargetName(targets & -targets)) forced = targets & -targets;
  }
  CHECK(name.empty() || forced != 0, "this machine cannot run {}", name);
  hwy::ForcedTarget().store(forced);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace cachalot
