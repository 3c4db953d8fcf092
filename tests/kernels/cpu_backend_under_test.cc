// kernels_test runs the tests of the verbs on the CPU backend.
#include "kernels/cpu/highway_targets.h"
#include "tests/kernels/testing.h"

namespace cachalot::testing {

std::unique_ptr<Backend> MakeTestBackend(const BackendOptions& options) { return MakeCpu(options); }
bool TestsOnGpu() { return false; }
std::vector<std::string> TestTargets() { return SupportedSimdTargets(); }
void UseTarget(const std::string& target) { ForceSimdTarget(target); }

}  // namespace cachalot::testing
