// prefill_bench: MlaAttention of one prefill chunk at DeepSeek-V3's dimensions on one GPU, absorbed and as a long
// chunk.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>

#include "kernels/backend.h"
#include "tests/bench/cuda_ceilings.h"
#include "tests/bench/device_arrays.h"

namespace cachalot::bench {
namespace {

constexpr int kGroupCalls = 5;
constexpr int kNopeDim = 128, kRopeDim = 64, kValueDim = 128, kLatentDim = 512;

struct Options {
  std::string kv_dtype = "bf16", cells = "1024x0,4096x0,8192x0,128x4096,256x4096,512x4096,2048x8192,4096x32768";
  int heads = 128, repetitions = 5;
};

struct Cell {
  int rows = 0, context = 0;
};

std::vector<Cell> Cells(const std::string& text) {
  std::vector<Cell> cells;
  std::stringstream list(text);
  for (std::string cell; std::getline(list, cell, ',');) {
    const size_t x = cell.find('x');
    if (x != std::string::npos) cells.push_back({std::atoi(cell.c_str()), std::atoi(cell.c_str() + x + 1)});
  }
  return cells;
}

class PrefillBench : DeviceArrays {
 public:
  PrefillBench(const Options& options, const Cell& largest, Backend& backend)
      : DeviceArrays(backend.device()), options_(options), device_(backend.device()), ops_(backend.ops()) {
    const int64_t H = options.heads, T = largest.rows, keys = largest.rows + largest.context;
    const KvDType dtype = options.kv_dtype == "fp8" ? KvDType::kFP8 : KvDType::kBF16;
    const int64_t pages = (keys + kBlockTokens - 1) / kBlockTokens;
    kv_up_ = ops_.MakeKvUp({Tensor(nullptr, DType::kBF16, {H * (kNopeDim + kValueDim), kLatentDim}), Tensor()},
                           options.heads, kNopeDim, kValueDim);
    Must(ops_.FinishWeights());
    q_ = New(DType::kBF16, {T, H * (kNopeDim + kRopeDim)});
    FillNormalBf16(q_.data, q_.num_elements(), 1, 1.0f);
    out_ = {New(DType::kF8E4M3, {T, H * kValueDim}), New(DType::kF32, {T, H})};
    cache_ = {New(DType::kU8, {pages, kBlockTokens, KvTokenBytes(dtype, kLatentDim, kRopeDim)}), dtype};
    if (dtype == KvDType::kFP8) {
      FillFp8Entries(cache_.blocks.data, pages * kBlockTokens, 2);
    } else {
      FillNormalBf16(cache_.blocks.data, cache_.blocks.num_bytes() / 2, 2, 1.0f);
    }
    std::vector<int32_t> table(pages);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(7));
    state_.block_table = Put(DType::kI32, {1, pages}, table.data());
    std::vector<float> angles(keys * kRopeDim);
    for (size_t i = 0; i < angles.size(); ++i) {
      const int64_t column = i % kRopeDim, pair = column % (kRopeDim / 2);
      const double angle = std::pow(1e4, -2.0 * pair / kRopeDim) * static_cast<double>(i / kRopeDim);
      angles[i] = static_cast<float>(column == pair ? std::cos(angle) : std::sin(angle));
    }
    rope_ = {Put(DType::kF32, {keys, kRopeDim}, angles.data())};
  }

  void Run(const Cell& cell) {
    std::vector<int32_t> positions(cell.rows), slots(cell.rows, 0);
    std::iota(positions.begin(), positions.end(), cell.context);
    const int32_t query_start[] = {0, cell.rows}, slot = 0;
    StepInput input;
    input.seq_slot = Put(DType::kI32, {1}, &slot);
    input.query_start = Put(DType::kI32, {2}, query_start);
    const StepRows rows = {Tensor(), Put(DType::kI32, {cell.rows}, positions.data()),
                           Put(DType::kI32, {cell.rows}, slots.data())};
    const double absorbed = Seconds(cell, input, rows);
    LongChunkFinder finder(cell.rows);
    finder.Add(cell.context, cell.rows);
    input.long_chunks = finder.found();
    const double chunk = Seconds(cell, input, rows);
    const double H = options_.heads, T = cell.rows, pairs = T * cell.context + T * (T + 1) / 2;
    const double attention = 2 * pairs * H * (kNopeDim + kRopeDim + kValueDim);
    const double product = 2 * (T + cell.context) * H * kLatentDim * (kNopeDim + kValueDim);
    fmt::print("| {} | {} | {:.0f} | {:.0f} | {:.2f} | {:.0f} | {:.0f} |\n", cell.rows, cell.context, absorbed * 1e6,
               chunk * 1e6, absorbed / chunk, attention / chunk * 1e-12, (attention + product) / chunk * 1e-12);
    std::fflush(stdout);
  }

 private:
  using DeviceArrays::Put;
  Tensor Put(DType dtype, std::initializer_list<int64_t> dims, const void* bytes) {
    const Tensor tensor = New(dtype, dims);
    Put(tensor, bytes);
    return tensor;
  }

  // Of one call: the median over groups of calls that are waited for together.
  double Seconds(const Cell& cell, const StepInput& input, const StepRows& rows) {
    const Activation out = {out_.values.Rows(0, cell.rows), out_.scales.Rows(0, cell.rows)};
    std::vector<double> times;
    for (int i = 0; i < options_.repetitions + 1; ++i) {
      const absl::Time begin = absl::Now();
      for (int call = 0; call < kGroupCalls; ++call) {
        ops_.MlaAttention(out, q_.Rows(0, cell.rows), *kv_up_, cache_, state_, input, rows, rope_, 0.1352337789f, 0);
      }
      Finish();
      if (i > 0) times.push_back(absl::ToDoubleSeconds(absl::Now() - begin) / kGroupCalls);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  const Options& options_;
  Device& device_;
  Ops& ops_;
  std::unique_ptr<Weight> kv_up_;
  Tensor q_;
  Activation out_;
  KvCache cache_;
  SlotState state_;
  RopeTable rope_;
};

void Main(const Options& options) {
  const std::vector<Cell> cells = Cells(options.cells);
  Cell largest;
  for (const Cell& cell : cells) {
    largest = {std::max(largest.rows, cell.rows), std::max(largest.context, cell.context)};
  }
  const Ceilings ceilings = MeasureCeilings();
  fmt::print("{}\nread {:.2f} TB/s, bf16 8192^3 {:.0f} TFLOP/s; {} heads, {} cache\n\n", GpuName(),
             ceilings.read_bytes_per_s / 1e12, ceilings.bf16_flops_per_s / 1e12, options.heads, options.kv_dtype);
  BackendOptions backend_options;
  backend_options.device = "cuda";
  backend_options.activation = ActivationFormat::kFP8;
  OpLimits& limits = backend_options.limits;
  limits.max_tokens = largest.rows;
  limits.max_context = largest.rows + largest.context;
  limits.max_sequences = 1;
  limits.num_heads = options.heads;
  limits.kv_lora_rank = kLatentDim;
  limits.qk_rope_head_dim = kRopeDim;
  limits.qk_nope_head_dim = kNopeDim;
  limits.v_head_dim = kValueDim;
  const std::unique_ptr<Backend> backend = Must(MakeBackend(backend_options));
  PrefillBench bench(options, largest, *backend);
  fmt::print("| rows | behind | absorbed us | long chunk us | times | TFLOP/s of attention | and of the product |\n");
  fmt::print("|---|---|---|---|---|---|---|\n");
  for (const Cell& cell : cells) bench.Run(cell);
}

}  // namespace
}  // namespace cachalot::bench

int main(int argc, char** argv) {
  cachalot::bench::Options options;
  CLI::App app("Attention of one prefill chunk, random data at DeepSeek-V3's dimensions.");
  app.add_option("--cells", options.cells, "ROWSxCONTEXT,...")->capture_default_str();
  app.add_option("--heads", options.heads, "of the rank")->capture_default_str();
  app.add_option("--kv-cache-dtype", options.kv_dtype, "bf16 or fp8")->check(CLI::IsMember({"bf16", "fp8"}));
  app.add_option("--repetitions", options.repetitions, "groups of calls timed")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  cachalot::bench::Main(options);
  return 0;
}
