// Products of rows with weights: how a product is cut into tasks.
#include <algorithm>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/hopper.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/gemm_plan.h"

namespace cachalot {
namespace {

int64_t GpuInnerSplits(int64_t num_rows, const CpuLinear& w) {
  const std::vector<RowBlock>& blocks = w.blocks();
  const int64_t step = kInnerBlockBytes / DTypeBytes(blocks[0].dtype);
  return PlanGemm({.num_rows = num_rows,
                   .weight_rows = w.rows(),
                   .num_steps = (w.cols() + step - 1) / step,
                   .is_fp8 = blocks[0].dtype == DType::kF8E4M3,
                   .has_even_tiles = blocks.back().first_row == kQuantGroup * static_cast<int64_t>(blocks.size() - 1)})
      .splits;
}

// Multiply-adds worth a task of their own.
constexpr int64_t kTaskCost = 1 << 17;

const CpuLinear& AsLinear(const Weight& w) {
  const auto* linear = dynamic_cast<const CpuLinear*>(&w);
  CHECK(linear != nullptr, "this weight was not made by MakeLinear");
  return *linear;
}

void CheckProduct(const Tensor& y, const Activation& x, const Weight& w) {
  CHECK_SHAPE(x.values, -1, w.cols());
  CHECK_SHAPE(y, x.rows(), w.rows());
  CHECK(y.dtype == DType::kF32 || y.dtype == DType::kBF16, "a product in {}", DTypeName(y.dtype));
  if (x.values.dtype == DType::kF8E4M3) CHECK_SHAPE(x.scales, x.rows(), (w.cols() + kQuantGroup - 1) / kQuantGroup);
}

}  // namespace

// A task is a block of weight rows (or a part of one, when blocks are few) times up to kLinearRows rows of x.
void CpuOps::RunProducts(int64_t num_products, absl::FunctionRef<Product(int64_t)> product) {
  CHECK(num_products < static_cast<int64_t>(first_task_.size()), "{} products", num_products);
  const auto row_pieces = [](const Product& p) { return (p.x.rows() + kLinearRows - 1) / kLinearRows; };
  int64_t num_tasks = 0, cost = 0;
  for (int64_t i = 0; i < num_products; ++i) {
    const Product p = product(i);
    first_task_[i] = num_tasks;
    num_tasks += row_pieces(p) * static_cast<int64_t>(p.w->blocks().size());
    cost += p.x.rows() * p.w->rows() * p.w->cols();
  }
  first_task_[num_products] = num_tasks;
  int64_t splits = 1;
  while (splits < 4 && num_tasks * splits < 4 * pool_.num_threads()) splits *= 2;

  const auto run = [&](int64_t task, int worker) {
    const int64_t whole = task / splits, split = task % splits;
    const auto after = std::upper_bound(first_task_.begin(), first_task_.begin() + num_products + 1, whole);
    const int64_t i = after - first_task_.begin() - 1;
    const Product p = product(i);
    // Tasks of one block of weights are neighbours: it stays in the cache for all rows of x.
    const int64_t pieces = row_pieces(p), block_idx = (whole - first_task_[i]) / pieces;
    const int64_t t = (whole - first_task_[i]) % pieces * kLinearRows;
    const int64_t num_rows = std::min(kLinearRows, p.x.rows() - t);
    const RowBlock& block = p.w->blocks()[block_idx];
    const int64_t rows_per_split = (block.num_rows + 4 * splits - 1) / (4 * splits) * 4;
    const int64_t begin = std::min<int64_t>(block.num_rows, split * rows_per_split);
    const int64_t end = std::min<int64_t>(block.num_rows, begin + rows_per_split);
    if (begin == end) return;
    const RowBlock rows = block.Rows(begin, end - begin);
    const Activation x = p.x.Rows(t, num_rows);
    if (ImitatesGpu() && TensorCoresTake(rows, x)) {
      return TensorCoreBlock(rows, x, p.y.Rows(t, num_rows), p.is_grouped ? 1 : GpuInnerSplits(p.x.rows(), *p.w));
    }
    LinearBlock(rows, x, p.y.Rows(t, num_rows), WorkerArena(worker));
  };
  if (cost >= kTaskCost) return pool_.Run(num_tasks * splits, run);
  for (int64_t task = 0; task < num_tasks * splits; ++task) run(task, 0);
}

std::unique_ptr<Weight> CpuOps::MakeVector(const Tensor& source) { return std::make_unique<CpuVector>(source); }

std::unique_ptr<Weight> CpuOps::MakeLinear(const std::vector<WeightPart>& row_stacked) {
  return std::make_unique<CpuLinear>(row_stacked);
}

std::unique_ptr<Weight> CpuOps::MakeKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim) {
  const bool round_to_bf16 = ImitatesGpu() || options_.activation == ActivationFormat::kFP8;
  return std::make_unique<CpuKvUp>(kv_b, num_heads, nope_dim, v_dim, round_to_bf16, ImitatesGpu());
}

std::unique_ptr<Weight> CpuOps::MakeExperts(const std::vector<std::vector<WeightPart>>& row_stacked_per_slot) {
  std::vector<std::unique_ptr<CpuLinear>> slots;
  for (const auto& parts : row_stacked_per_slot) slots.push_back(std::make_unique<CpuLinear>(parts));
  return std::make_unique<CpuExperts>(std::move(slots));
}

void CpuOps::Linear(const Tensor& y, const Activation& x, const Weight& w) {
  CheckProduct(y, x, w);
  RunProducts(1, [&](int64_t) { return Product{&AsLinear(w), x, y, false}; });
}

void CpuOps::GroupedLinear(const Tensor& y, const Activation& x, const Weight& experts, const Tensor& offsets) {
  const auto* slots = dynamic_cast<const CpuExperts*>(&experts);
  CHECK(slots != nullptr, "this weight was not made by MakeExperts");
  CHECK_SHAPE(offsets, slots->num_slots() + 1);
  CheckProduct(y, x, experts);
  const int32_t* row = offsets.as<int32_t>();
  CHECK(row[slots->num_slots()] <= x.rows(), "{} rows of {}", row[slots->num_slots()], x.rows());
  RunProducts(slots->num_slots(), [&](int64_t g) {
    const int64_t count = row[g + 1] - row[g];
    return Product{&slots->slot(static_cast<int>(g)), x.Rows(row[g], count), y.Rows(row[g], count), true};
  });
}

}  // namespace cachalot
