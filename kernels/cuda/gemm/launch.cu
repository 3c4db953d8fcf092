// Which kernel a product takes.
#include "kernels/cuda/gemm/gemm.h"

namespace cachalot {
namespace {

bool IsAligned(const GemmArguments& g, int element_bytes) {
  return reinterpret_cast<uintptr_t>(g.x.values.data) % 16 == 0 && g.x.values.row_stride * element_bytes % 16 == 0 &&
         g.x_group_stride * element_bytes % 16 == 0 && g.w.num_groups <= gemm::kMaxGroups;
}

}  // namespace

cudaError_t PrepareGemm() {
  const cudaError_t error = gemm::PrepareFewRows();
  return error != cudaSuccess ? error : gemm::PrepareManyRows();
}

GemmPlan ChooseGemm(const GemmArguments& g) {
  const NumberType x = g.x.values.type, w = g.w.type;
  const bool is_fp8 = w == NumberType::kE4M3;
  if (x != w || !(is_fp8 || w == NumberType::kBF16) || !IsAligned(g, is_fp8 ? 1 : 2)) return {};
  if (is_fp8 && g.x_group_stride != 0) return {};
  const int64_t step = kInnerBlockBytes / (is_fp8 ? 1 : 2);
  return PlanGemm({.num_rows = g.offsets != nullptr ? g.expected_rows : g.num_rows,
                   .num_groups = g.w.num_groups,
                   .weight_rows = g.w.rows,
                   .num_steps = (g.w.cols + step - 1) / step,
                   .is_fp8 = is_fp8,
                   .has_offsets = g.offsets != nullptr,
                   .has_even_tiles = g.w.has_even_tiles});
}

bool QuantisesProduct(const GemmArguments& g) {
  const GemmPlan plan = ChooseGemm(g);
  return plan.kernel == GemmPlan::Kernel::kFewRows && plan.splits == 1 && g.w.type == NumberType::kBF16 &&
         g.w.rows % gemm::kQuantisedRows == 0 && g.w.has_even_tiles && g.y_group_stride % gemm::kQuantisedRows == 0;
}

bool LaunchGemm(cudaStream_t stream, const GemmArguments& g, const GemmPlan& plan) {
  switch (plan.kernel) {
    case GemmPlan::Kernel::kFewRows: return gemm::LaunchFewRows(stream, g, plan);
    case GemmPlan::Kernel::kManyRows: return gemm::LaunchManyRows(stream, g, plan);
    case GemmPlan::Kernel::kPlain: break;
  }
  gemm::LaunchPlain(stream, g);
  return true;
}

}  // namespace cachalot
