// gemm_bench: every product of DeepSeek-V3 by every plan that fits it: checked against double precision, then timed by
// graph replay over weights rotated past the second-level cache. See Usage().
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gemm/gemm.h"
#include "tests/bench/cuda_ceilings.h"

namespace cachalot::bench {
namespace {

void Usage() {
  std::puts(
      "usage: gemm_bench [--check] [--plans] [--only NAME] [--json FILE]\n"
      "  --check      compare with double precision instead of timing\n"
      "  --plans      time every plan that fits, not only the one that is chosen\n"
      "  --only NAME  products whose name contains NAME\n"
      "  --json FILE  write the times there, an object a line");
}

void Must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gemm_bench: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* Allocate(size_t count) {
  void* p = nullptr;
  Must(cudaMalloc(&p, std::max<size_t>(count * sizeof(T), 16)), "cudaMalloc");
  return static_cast<T*>(p);
}

__device__ uint64_t Hash(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__global__ void FillE4m3(uint8_t* p, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    const uint64_t r = Hash(i * 0x9e3779b97f4a7c15ull + seed);
    p[i] = static_cast<uint8_t>((r & 0x87) | ((4 + ((r >> 3) & 3)) << 3));
  }
}
__global__ void FillBf16(bf16* p, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    p[i] = __float2bfloat16(
        static_cast<float>(static_cast<int64_t>(Hash(i * 0x9e3779b97f4a7c15ull + seed) >> 40)) / 8388608.0f - 1.0f);
  }
}
__global__ void FillScale(float* p, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
    p[i] = 0.5f + static_cast<float>(Hash(i * 0x9e3779b97f4a7c15ull + seed) >> 40) / 16777216.0f;
  }
}

struct Product {
  std::string name;
  int32_t rows = 0, cols = 0, groups = 1;
  bool is_fp8 = true, has_offsets = false;
  bool is_f32 = false;                   // y
  std::vector<int64_t> tokens;           // without offsets
  std::vector<std::vector<int>> counts;  // with offsets: of every group
  std::vector<std::string> count_names;
};

std::vector<int> Drawn(int experts, int tokens, int top_k, double skew) {
  std::mt19937_64 random(tokens * 7 + static_cast<int>(skew * 10));
  std::vector<double> weight(experts);
  std::vector<int> order(experts), counts(experts);
  for (int e = 0; e < experts; ++e) order[e] = e;
  std::shuffle(order.begin(), order.end(), random);
  for (int e = 0; e < experts; ++e) weight[order[e]] = std::pow(1.0 + e, -skew);
  for (int t = 0; t < tokens; ++t) {
    std::vector<double> left = weight;
    for (int k = 0; k < top_k; ++k) {
      std::discrete_distribution<int> draw(left.begin(), left.end());
      const int e = draw(random);
      ++counts[e];
      left[e] = 0;
    }
  }
  return counts;
}

std::vector<Product> Products() {
  const std::vector<int64_t> few = {1, 8, 16, 32, 64, 128, 256, 1024, 4096};
  std::vector<Product> all;
  const auto dense = [&](const char* name, int rows, int cols) {
    all.push_back({.name = name, .rows = rows, .cols = cols, .tokens = few});
  };
  dense("q_a_kv_a", 2112, 7168);
  dense("q_b", 24576, 1536);
  dense("o", 7168, 16384);
  dense("shared_gate_up", 4096, 7168);
  dense("shared_down", 7168, 2048);
  dense("dense_gate_up", 36864, 7168);
  dense("dense_down", 7168, 18432);
  for (const auto& [name, rows, cols] : {std::tuple{"gate_up", 4096, 7168}, std::tuple{"down", 7168, 2048}}) {
    for (int groups : {8, 32}) {
      Product p = {.name = std::string("grouped") + std::to_string(groups) + "_" + name,
                   .rows = rows,
                   .cols = cols,
                   .groups = groups,
                   .has_offsets = true};
      for (int m : {1, 4, 8, 16, 32, 64, 128, 256, 512}) {
        if (groups == 32 && m != 8 && m != 32 && m != 256) continue;
        p.counts.push_back(std::vector<int>(groups, m));
        p.count_names.push_back(std::to_string(m) + " each");
      }
      // What a rank of many has: of experts that all ranks' tokens are routed to, some.
      for (int mean : {64, 96, 128}) {
        std::vector<int> counts = Drawn(256, 32 * mean, 8, 0);
        counts.resize(groups);
        p.counts.push_back(counts);
        p.count_names.push_back("about " + std::to_string(mean));
      }
      all.push_back(p);
    }
    Product p = {
        .name = std::string("grouped256_") + name, .rows = rows, .cols = cols, .groups = 256, .has_offsets = true};
    for (double skew : {0.0, 0.8}) {
      for (int batch : {8, 64, 128, 256, 512, 4096}) {
        p.counts.push_back(Drawn(256, batch, 8, skew));
        p.count_names.push_back("B=" + std::to_string(batch) + (skew > 0 ? " skewed" : ""));
      }
    }
    all.push_back(p);
  }
  all.push_back({.name = "lm_head",
                 .rows = 129280,
                 .cols = 7168,
                 .is_fp8 = false,
                 .is_f32 = true,
                 .tokens = {1, 8, 64, 128, 256}});
  all.push_back({.name = "router",
                 .rows = 256,
                 .cols = 7168,
                 .is_fp8 = false,
                 .is_f32 = true,
                 .tokens = {1, 8, 64, 128, 256, 4096}});
  all.push_back(
      {.name = "w_uk", .rows = 512, .cols = 128, .groups = 128, .is_fp8 = false, .tokens = {1, 8, 64, 128, 256, 4096}});
  all.push_back(
      {.name = "w_uv", .rows = 128, .cols = 512, .groups = 128, .is_fp8 = false, .tokens = {1, 8, 64, 128, 256, 4096}});
  return all;
}

std::string Text(const GemmPlan& p) {
  if (p.kernel == GemmPlan::Kernel::kPlain) return "plain";
  return std::string(p.kernel == GemmPlan::Kernel::kFewRows ? "few" : "many") + " " + std::to_string(p.tokens) + "x" +
         std::to_string(p.rows) + (p.splits > 1 ? "/" + std::to_string(p.splits) : "");
}

// Weights of a product, in as many copies as keep them out of the second-level cache.
struct Weights {
  std::vector<WeightRef> copies;
  std::vector<void*> memory;
  Weights(const Product& p, size_t total_bytes) {
    const int64_t element = p.is_fp8 ? 1 : 2, bytes = int64_t{1} * p.groups * p.rows * p.cols * element;
    const int count = static_cast<int>(std::clamp<int64_t>(total_bytes / bytes, 1, 24));
    const int tiles = (p.rows + 127) / 128, scale_cols = (p.cols + 127) / 128;
    std::vector<RowTile> host;
    for (int i = 0; i < tiles; ++i) host.push_back({i * 128, std::min(128, p.rows - i * 128), i});
    for (int i = 0; i < count; ++i) {
      WeightRef w;
      w.num_groups = p.groups;
      w.rows = p.rows;
      w.cols = p.cols;
      w.row_bytes = p.cols * element;
      w.group_bytes = w.row_bytes * p.rows;
      w.num_tiles = tiles;
      w.scale_cols = scale_cols;
      w.group_scales = int64_t{1} * tiles * scale_cols;
      w.has_even_tiles = true;
      w.type = p.is_fp8 ? NumberType::kE4M3 : NumberType::kBF16;
      void* data = Allocate<uint8_t>(bytes);
      float* scales = Allocate<float>(p.groups * w.group_scales);
      RowTile* list = Allocate<RowTile>(tiles);
      Must(cudaMemcpy(list, host.data(), tiles * sizeof(RowTile), cudaMemcpyHostToDevice), "copy");
      if (p.is_fp8) {
        FillE4m3<<<1024, 256>>>(static_cast<uint8_t*>(data), bytes, 17 + i);
      } else {
        FillBf16<<<1024, 256>>>(static_cast<bf16*>(data), bytes / 2, 17 + i);
      }
      FillScale<<<64, 256>>>(scales, p.groups * w.group_scales, 5 + i);
      w.data = data;
      w.scales = scales;
      w.tiles = list;
      copies.push_back(w);
      memory.insert(memory.end(), {data, scales, list});
    }
  }
  ~Weights() {
    for (void* p : memory) cudaFree(p);
  }
};

// One call of a product: its tokens, its result, and rows a group.
struct Call {
  GemmArguments arguments;
  std::vector<int64_t> first_row;  // of every group, and the end
  int64_t y_elements = 0;
  std::vector<void*> memory;

  Call(const Product& p, int64_t tokens, const std::vector<int>* counts) {
    int64_t total = tokens;
    first_row = {0};
    if (counts != nullptr) {
      for (int count : *counts) first_row.push_back(first_row.back() + count);
      total = first_row.back();
      std::vector<int32_t> ends(first_row.begin(), first_row.end());
      int32_t* offsets = Allocate<int32_t>(ends.size());
      Must(cudaMemcpy(offsets, ends.data(), ends.size() * 4, cudaMemcpyHostToDevice), "copy");
      arguments.offsets = offsets;
      arguments.expected_rows = arguments.num_rows;
      memory.push_back(offsets);
    }
    GemmArguments& a = arguments;
    const bool is_batched = counts == nullptr && p.groups > 1;
    const int64_t x_width = is_batched ? int64_t{1} * p.cols * p.groups : p.cols;
    const int64_t y_width = is_batched ? int64_t{1} * p.rows * p.groups : p.rows;
    a.num_rows = total;
    a.num_sms = 132;
    a.x.values = {nullptr, x_width, p.is_fp8 ? NumberType::kE4M3 : NumberType::kBF16};
    const int64_t elements = total * x_width;
    if (p.is_fp8) {
      a.x.values.data = Allocate<uint8_t>(elements);
      FillE4m3<<<1024, 256>>>(static_cast<uint8_t*>(a.x.values.data), elements, 99);
      a.x.scale_stride = p.cols / 128;
      a.x.scales = Allocate<float>(total * a.x.scale_stride);
      FillScale<<<64, 256>>>(a.x.scales, total * a.x.scale_stride, 3);
      memory.push_back(a.x.scales);
    } else {
      a.x.values.data = Allocate<bf16>(elements);
      FillBf16<<<1024, 256>>>(static_cast<bf16*>(a.x.values.data), elements, 99);
    }
    if (is_batched) {
      a.x_group_stride = p.cols;
      a.y_group_stride = p.rows;
    }
    y_elements = total * y_width;
    a.y.values = {Allocate<float>(y_elements), y_width, p.is_f32 ? NumberType::kF32 : NumberType::kBF16};
    memory.insert(memory.end(), {a.x.values.data, a.y.values.data});
  }
  ~Call() {
    for (void* p : memory) cudaFree(p);
  }
};

std::vector<GemmPlan> PlansFor(const Product& p, int64_t rows_a_group) {
  using Kernel = GemmPlan::Kernel;
  std::vector<GemmPlan> plans;
  const bool has_splits = !p.has_offsets && p.groups == 1 && rows_a_group <= 512;
  const auto add = [&](Kernel kernel, int tokens, int rows, bool can_split) {
    for (int s = 1; s <= (has_splits && can_split ? kMaxInnerSplits : 1); ++s) {
      plans.push_back({kernel, static_cast<int16_t>(tokens), static_cast<int16_t>(rows), static_cast<int16_t>(s)});
    }
  };
  if (rows_a_group <= 16) add(Kernel::kFewRows, 16, 128, true);
  if (rows_a_group <= 256) add(Kernel::kFewRows, 64, 128, true);
  for (int rows : {96, 128, 192}) {
    if (rows != 128 && !p.is_fp8) continue;
    if (rows_a_group > 16) add(Kernel::kManyRows, 128, rows, true);
    if (rows_a_group > 64 && rows != 192) add(Kernel::kManyRows, 256, rows, true);
  }
  return plans;
}

__device__ double ValueOf(const void* data, int64_t i, NumberType type) { return LoadNumber(data, i, type); }

// The largest error of sampled elements, over what rounding explains; a poisoned element gives infinity.
__global__ void Compare(GemmArguments a, int64_t group_first, int64_t group_rows, int32_t group, int samples,
                        float* worst) {
  const int sample = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (sample >= samples || group_rows == 0) return;
  const uint64_t r = Hash(sample * 0x9e3779b97f4a7c15ull + group);
  // Ends of rows and columns first: they are where tiles end.
  const int64_t token = sample < 8 ? (sample & 1 ? group_rows - 1 : 0) : static_cast<int64_t>(r % group_rows);
  const int64_t row = sample < 8 ? (sample & 2 ? a.w.rows - 1 : 0) : static_cast<int64_t>((r >> 32) % a.w.rows);
  const int64_t x_group = a.offsets == nullptr ? group * a.x_group_stride : 0;
  const int64_t y_group = a.offsets == nullptr ? group * a.y_group_stride : 0;
  const uint8_t* w = static_cast<const uint8_t*>(a.w.data) + group * a.w.group_bytes + row * a.w.row_bytes;
  double sum = 0, magnitude = 0;
  for (int32_t k = lane; k < a.w.cols; k += 32) {
    double product =
        ValueOf(a.x.values.data, x_group + (group_first + token) * a.x.values.row_stride + k, a.x.values.type) *
        ValueOf(w, k, a.w.type);
    if (a.w.type == NumberType::kE4M3) {
      product *= static_cast<double>(a.x.scales[(group_first + token) * a.x.scale_stride + k / 128]) *
                 a.w.scales[group * a.w.group_scales + row / 128 * a.w.scale_cols + k / 128];
    }
    sum += product;
    magnitude += product * product;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    magnitude += __shfl_xor_sync(0xffffffffu, magnitude, offset);
  }
  if (lane != 0) return;
  const double got =
      LoadNumber(a.y.values.data, y_group + (group_first + token) * a.y.values.row_stride + row, a.y.values.type);
  const double bound = 4e-3 * fabs(sum) + 4e-3 * sqrt(magnitude);
  float error = static_cast<float>(fabs(got - sum) / bound);
  if (!(error == error)) error = INFINITY;
  atomicMax(reinterpret_cast<int*>(worst), __float_as_int(error));
}

class Bench {
 public:
  explicit Bench(FILE* json) : json_(json) {
    Must(cudaStreamCreate(&stream_), "stream");
    Must(cudaEventCreate(&begin_), "event");
    Must(cudaEventCreate(&end_), "event");
    worst_ = Allocate<float>(1);
  }

  // Of a launch, in us; below 0 where the plan does not fit.
  double Time(const Call& call, const Weights& weights, const GemmPlan& plan) {
    GemmArguments a = call.arguments;
    a.w = weights.copies[0];
    if (!LaunchGemm(stream_, a, plan)) return -1;
    const cudaError_t error = cudaStreamSynchronize(stream_);
    Must(error == cudaSuccess ? cudaGetLastError() : error, Text(plan).c_str());
    const double once = Replay(call, weights, plan, static_cast<int>(weights.copies.size()), 2);
    const int launches = std::clamp(static_cast<int>(2000 / once), 4, 40);
    return Replay(call, weights, plan, launches, 5);
  }

  // Whether every sampled element is within what rounding explains.
  bool Check(const Product& p, const Call& call, const Weights& weights, const GemmPlan& plan) {
    GemmArguments a = call.arguments;
    a.w = weights.copies[0];
    Must(cudaMemsetAsync(a.y.values.data, 0xff, call.y_elements * (p.is_f32 ? 4 : 2), stream_), "poison");
    if (!LaunchGemm(stream_, a, plan)) return true;
    Must(cudaMemsetAsync(worst_, 0, 4, stream_), "memset");
    for (int g = 0; g < p.groups; ++g) {
      const bool has_offsets = p.has_offsets;
      const int64_t first = has_offsets ? call.first_row[g] : 0;
      const int64_t rows = has_offsets ? call.first_row[g + 1] - first : a.num_rows;
      const int samples = p.groups > 8 ? 64 : 2048;
      Compare<<<(samples + 7) / 8, 256, 0, stream_>>>(a, first, rows, g, samples, worst_);
    }
    float worst = 0;
    Must(cudaMemcpyAsync(&worst, worst_, 4, cudaMemcpyDeviceToHost, stream_), "copy");
    Must(cudaStreamSynchronize(stream_), Text(plan).c_str());
    if (worst <= 1) return true;
    std::printf("WRONG %s M=%ld %s: %.2f times the bound\n", p.name.c_str(), static_cast<long>(a.num_rows),
                Text(plan).c_str(), worst);
    return false;
  }

  void Report(const Product& p, const std::string& what, double bytes, double flops, double us, const GemmPlan& plan,
              const std::string& others) {
    std::printf("%-18s %-16s %8.2f us %6.2f TB/s %6.0f TF  %-14s %s\n", p.name.c_str(), what.c_str(), us,
                bytes / us / 1e6, flops / us / 1e6, Text(plan).c_str(), others.c_str());
    std::fflush(stdout);
    if (json_ != nullptr) {
      std::fprintf(json_, "{\"product\": \"%s\", \"tokens\": \"%s\", \"us\": %.2f, \"plan\": \"%s\"}\n", p.name.c_str(),
                   what.c_str(), us, Text(plan).c_str());
    }
  }

 private:
  double Replay(const Call& call, const Weights& weights, const GemmPlan& plan, int launches, int repeats) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    Must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < launches; ++i) {
      GemmArguments a = call.arguments;
      a.w = weights.copies[i % weights.copies.size()];
      LaunchGemm(stream_, a, plan);
    }
    Must(cudaStreamEndCapture(stream_, &graph), "capture");
    Must(cudaGraphInstantiate(&exec, graph, 0), "graph");
    Must(cudaGraphLaunch(exec, stream_), "launch");
    std::vector<float> times;
    for (int i = 0; i < repeats; ++i) {
      Must(cudaEventRecord(begin_, stream_), "event");
      Must(cudaGraphLaunch(exec, stream_), "launch");
      Must(cudaEventRecord(end_, stream_), "event");
      Must(cudaEventSynchronize(end_), "graph");
      float ms = 0;
      Must(cudaEventElapsedTime(&ms, begin_, end_), "time");
      times.push_back(ms);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / launches;
  }

  FILE* json_;
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
  float* worst_;
};

struct Options {
  bool is_check = false, has_plans = false;
  std::string only, json;
};

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--check") {
      options.is_check = true;
    } else if (arg == "--plans") {
      options.has_plans = true;
    } else if (arg == "--only" && i + 1 < argc) {
      options.only = argv[++i];
    } else if (arg == "--json" && i + 1 < argc) {
      options.json = argv[++i];
    } else {
      Usage();
      std::exit(arg == "--help" ? 0 : 2);
    }
  }
  return options;
}

// Times one call by the chosen plan, and by all others when they are asked for.
void TimeCall(Bench& bench, const Product& p, const Call& call, const std::vector<int>* counts, const std::string& what,
              const Weights& weights, const GemmPlan& chosen, const std::vector<GemmPlan>& plans) {
  std::vector<std::pair<double, GemmPlan>> timed;
  for (const GemmPlan& plan : plans) {
    const double us = bench.Time(call, weights, plan);
    if (us > 0) timed.push_back({us, plan});
  }
  std::sort(timed.begin(), timed.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::string others;
  for (size_t i = 0; i < std::min<size_t>(timed.size(), 5); ++i) {
    char text[64];
    std::snprintf(text, sizeof text, "| %s %.2f ", Text(timed[i].second).c_str(), timed[i].first);
    others += text;
  }
  const int64_t touched =
      counts != nullptr ? std::count_if(counts->begin(), counts->end(), [](int n) { return n > 0; }) : p.groups;
  const double element = p.is_fp8 ? 1 : 2;
  const double all_rows = static_cast<double>(call.arguments.num_rows) * (counts != nullptr ? 1 : p.groups);
  const double bytes =
      element * touched * p.rows * p.cols + all_rows * (element * p.cols + (p.is_f32 ? 4 : 2) * p.rows);
  bench.Report(p, what, bytes, 2.0 * all_rows * p.rows * p.cols, bench.Time(call, weights, chosen), chosen, others);
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  Must(PrepareGemm(), "shared memory");
  FILE* json = options.json.empty() ? nullptr : std::fopen(options.json.c_str(), "w");
  Bench bench(json);
  if (!options.is_check) {
    const Ceilings ceilings = MeasureCeilings();
    std::printf("%s: read %.2f TB/s, bf16 8192^3 %.0f TFLOP/s\n", GpuName().c_str(), ceilings.read_bytes_per_s / 1e12,
                ceilings.bf16_flops_per_s / 1e12);
  }
  int num_wrong = 0, num_checked = 0;
  for (const Product& p : Products()) {
    if (p.name.find(options.only) == std::string::npos) continue;
    const Weights weights(p, options.is_check ? 1 : size_t{300} << 20);
    for (size_t c = 0; c < (p.has_offsets ? p.counts.size() : p.tokens.size()); ++c) {
      // NOTE: checked with a number of tokens that fills no tile.
      const int64_t tokens = p.has_offsets ? 0 : p.tokens[c] + (options.is_check && p.tokens[c] > 8 ? 3 : 0);
      const std::vector<int>* counts = p.has_offsets ? &p.counts[c] : nullptr;
      const Call call(p, tokens, counts);
      GemmArguments a = call.arguments;
      a.w = weights.copies[0];
      const GemmPlan chosen = ChooseGemm(a);
      const int64_t rows_a_group = p.has_offsets ? (a.num_rows + p.groups - 1) / p.groups : a.num_rows;
      std::vector<GemmPlan> plans;
      if (options.has_plans || options.is_check) plans = PlansFor(p, rows_a_group);
      if (!options.is_check) {
        TimeCall(bench, p, call, counts, p.has_offsets ? p.count_names[c] : "M=" + std::to_string(tokens), weights,
                 chosen, plans);
        continue;
      }
      plans.push_back(chosen);
      for (const GemmPlan& plan : plans) num_wrong += !bench.Check(p, call, weights, plan), ++num_checked;
    }
  }
  if (json != nullptr) std::fclose(json);
  if (!options.is_check) return 0;
  std::printf("%d of %d products wrong\n", num_wrong, num_checked);
  return num_wrong > 0 ? 1 : 0;
}

}  // namespace
}  // namespace cachalot::bench

int main(int argc, char** argv) { return cachalot::bench::Main(argc, argv); }
