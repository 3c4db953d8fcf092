// Speed of the CPU verbs beside what the machine can do: a plain read loop and a loop of fused multiply-adds.
//
// cpu_bench [linear|attention] [threads]; every figure is the best of several runs, so that a busy machine disturbs
// less.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>

#include "kernels/cpu/thread_pool.h"
#include "tests/kernels/machine_rates.h"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::Owned;
using testing::Random;

// Seconds of the fastest of several calls.
double Best(int calls, const std::function<void()>& call) {
  double best = 1e9;
  for (int i = 0; i < calls; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

// Bytes per second that all threads together read of a buffer far larger than the caches.
double ReadRate(ThreadPool& pool, const std::vector<uint8_t>& memory) {
  constexpr int64_t kPiece = int64_t{4} << 20;
  std::vector<float> sinks(pool.num_threads());
  const double seconds = Best(5, [&] {
    pool.Run(static_cast<int64_t>(memory.size()) / kPiece,
             [&](int64_t i, int worker) { sinks[worker] += testing::ReadAll(memory.data() + i * kPiece, kPiece); });
  });
  return static_cast<double>(memory.size()) / seconds;
}

double FmaRate(ThreadPool& pool) {
  constexpr int64_t kLoops = 500'000;
  double operations = 0;
  const double seconds = Best(10, [&] {
    pool.Run(pool.num_threads(), [&](int64_t i, int) {
      const double done = testing::MultiplyAdd(kLoops);
      if (i == 0) operations = done;
    });
  });
  return operations * pool.num_threads() / seconds;
}

void BenchLinear(Ops& ops, double read_rate, double fma_rate) {
  Random random(1);
  constexpr size_t kWorkingSet = size_t{1} << 30;
  for (DType dtype : {DType::kF8E4M3, DType::kBF16, DType::kF32}) {
    for (auto [out, in] : std::vector<std::pair<int64_t, int64_t>>{{2048, 2048}, {8192, 7168}, {7168, 16384}}) {
      const size_t weight_bytes = out * in * DTypeBytes(dtype);
      // Copies of a weight one after another, so that each is read from memory.
      const int64_t copies = std::max<int64_t>(1, kWorkingSet / weight_bytes);
      std::vector<uint8_t> memory(copies * weight_bytes + 64, 0x33);
      Owned scale(DType::kF32, {out / 128, in / 128});
      scale.Fill(std::vector<double>(out / 128 * (in / 128), 0.01));
      std::vector<std::unique_ptr<Weight>> weights;
      for (int64_t i = 0; i < copies; ++i) {
        WeightPart part = {Tensor(memory.data() + i * weight_bytes, dtype, {out, in}), Tensor()};
        if (dtype == DType::kF8E4M3) part.scale = scale;
        weights.push_back(ops.MakeLinear({part}));
      }
      for (int64_t rows : {1, 2, 4, 8, 64, 512}) {
        Owned x(DType::kF32, {rows, in}), y(DType::kF32, {rows, out});
        x.Fill(std::vector<double>(rows * in, 0.5));
        const int64_t uses = rows <= 8 ? copies : std::max<int64_t>(1, std::min<int64_t>(copies, 512 / rows));
        const double seconds = Best(rows <= 8 ? 5 : 3,
                                    [&] {
                                      for (int64_t i = 0; i < uses; ++i)
                                        ops.Linear(y, Activation{x, Tensor()}, *weights[i]);
                                    }) /
                               static_cast<double>(uses);
        const double bytes = static_cast<double>(weight_bytes), flops = 2.0 * rows * out * in;
        std::printf("linear %-6s %5ldx%-5ld T=%-4ld %9.1f us %7.1f GB/s (%3.0f %%) %8.1f GFLOP/s (%3.0f %%)\n",
                    DTypeName(dtype), out, in, rows, seconds * 1e6, bytes / seconds * 1e-9,
                    100 * bytes / seconds / read_rate, flops / seconds * 1e-9, 100 * flops / seconds / fma_rate);
      }
    }
  }
}

void BenchAttention(Ops& ops, double fma_rate) {
  constexpr int64_t kHeads = 128, kNope = 128, kRope = 64, kValue = 128, kLatent = 512;
  Random random(2);
  Owned kv_b(DType::kF8E4M3, {kHeads * (kNope + kValue), kLatent});
  std::memset(kv_b->data, 0x33, kv_b->num_bytes());
  Owned scale(DType::kF32, {kHeads * (kNope + kValue) / 128, kLatent / 128});
  scale.Fill(std::vector<double>(scale->num_elements(), 0.01));
  const auto kv_up = ops.MakeKvUp({kv_b, scale}, kHeads, kNope, kValue);
  const Owned rope = testing::MakeRopeTable(8192, kRope);
  struct Case {
    int64_t sequences, rows_each, context;
  };
  for (KvDType dtype : {KvDType::kF32, KvDType::kBF16, KvDType::kFP8}) {
    for (const Case& c : {Case{1, 1, 128}, Case{1, 1, 4096}, Case{16, 1, 1024}, Case{1, 64, 1024}, Case{1, 256, 256}}) {
      const int64_t rows = c.sequences * c.rows_each, pages = (c.context + 63) / 64;
      Owned blocks(DType::kU8, {c.sequences * pages, kBlockTokens, KvTokenBytes(dtype, kLatent, kRope)});
      std::memset(blocks->data, 0x11, blocks->num_bytes());
      Owned table(DType::kI32, {c.sequences, pages}), slots(DType::kI32, {rows}), positions(DType::kI32, {rows});
      for (int64_t i = 0; i < c.sequences * pages; ++i) table.data<int32_t>()[i] = static_cast<int32_t>(i);
      for (int64_t t = 0; t < rows; ++t) {
        slots.data<int32_t>()[t] = static_cast<int32_t>(t / c.rows_each);
        positions.data<int32_t>()[t] = static_cast<int32_t>(c.context - c.rows_each + t % c.rows_each);
      }
      Owned q(DType::kF32, {rows, kHeads * (kNope + kRope)}), out(DType::kF32, {rows, kHeads * kValue});
      q.FillNormal(random);
      SlotState state;
      state.block_table = table;
      const double seconds = Best(4, [&] {
        ops.MlaAttention(Activation{out, Tensor()}, q, *kv_up, {blocks, dtype}, state, StepInput(),
                         StepRows{Tensor(), positions, slots}, RopeTable{rope}, 0.13f, 0);
      });
      const double keys = static_cast<double>(rows) * (static_cast<double>(c.context) - (c.rows_each - 1) / 2.0);
      const double flops = 2.0 * kHeads * (keys * (2 * kLatent + kRope) + rows * (kNope + kValue) * kLatent);
      std::printf("attention %s: %ld sequences x %ld rows at %ld: %9.1f us %8.1f GFLOP/s (%3.0f %%)\n",
                  dtype == KvDType::kF32    ? "f32"
                  : dtype == KvDType::kBF16 ? "bf16"
                                            : "fp8",
                  c.sequences, c.rows_each, c.context, seconds * 1e6, flops / seconds * 1e-9,
                  100 * flops / seconds / fma_rate);
    }
  }
}

int Main(const std::string& what, int num_threads) {
  const BackendOptions options = testing::CpuOptions(num_threads);
  const auto backend = testing::MakeCpu(options);
  ThreadPool pool(num_threads);
  std::vector<uint8_t> memory(size_t{1} << 30, 1);
  const double read_rate = ReadRate(pool, memory), fma_rate = FmaRate(pool);
  memory = {};
  std::printf("%s: plain read %.1f GB/s, fp32 fused multiply-add %.1f GFLOP/s\n", backend->name().c_str(),
              read_rate * 1e-9, fma_rate * 1e-9);
  if (what.empty() || what == "linear") BenchLinear(backend->ops(), read_rate, fma_rate);
  if (what.empty() || what == "attention") BenchAttention(backend->ops(), fma_rate);
  return 0;
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) { return cachalot::Main(argc > 1 ? argv[1] : "", argc > 2 ? std::atoi(argv[2]) : 0); }
