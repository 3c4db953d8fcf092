// Dispatch and combine between GPUs of this host, as a decode step of DeepSeek-V3 has them: graphs of 32 layers.
//   peer_bench [RANKS]
#include <fmt/core.h>

#include <algorithm>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "kernels/backend.h"
#include "tests/bench/device_arrays.h"

namespace cachalot {
namespace {

constexpr int kHidden = 7168, kExperts = 256, kChoices = 8, kLayers = 32, kReplays = 20;
constexpr std::initializer_list<int> kTokens = {1, 8, 64, 128, 512, 4096};

class Rank : DeviceArrays {
 public:
  Rank(Mesh* mesh, Backend* backend)
      : DeviceArrays(backend->device()), mesh_(*mesh), backend_(*backend), device_(backend->device()) {}

  // Microseconds of a layer, medians; the first that waits for another waits from the same moment on.
  double Run(int num_tokens, bool has_combine) {
    const int64_t T = num_tokens, M = T * mesh_.num_ranks() * kChoices, G = kExperts / mesh_.num_ranks();
    std::mt19937 random(mesh_.rank() + 1);
    std::vector<int32_t> slots;
    for (int64_t t = 0; t < T; ++t) {
      std::vector<int32_t> all(kExperts);
      for (int i = 0; i < kExperts; ++i) all[i] = i;
      std::shuffle(all.begin(), all.end(), random);
      slots.insert(slots.end(), all.begin(), all.begin() + kChoices);
    }
    std::vector<float> weights(T * kChoices, 0.3f);
    const Activation x = {New(DType::kF8E4M3, {T, kHidden}), New(DType::kF32, {T, kHidden / kQuantGroup})};
    const ExpertRows rows = {{New(DType::kF8E4M3, {M, kHidden}), New(DType::kF32, {M, kHidden / kQuantGroup})},
                             New(DType::kI32, {G + 1})};
    const Tensor y = New(DType::kBF16, {M, kHidden}), out = New(DType::kBF16, {T, kHidden});
    const Tensor topk_slots = New(DType::kI32, {T, kChoices}), topk_weights = New(DType::kF32, {T, kChoices});
    Put(topk_slots, slots.data());
    Put(topk_weights, weights.data());
    PutNoise(x.values, 0x77, &random);
    PutNoise(x.scales, 0x3f, &random);
    PutNoise(y, 0x3f, &random);
    Must(mesh_.Exchange().status());
    const StepKey key = {num_tokens, 0, 0, has_combine ? 1 : 0, {}};
    Must(device_.Prepare(key, [&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        backend_.communicator().Dispatch(rows, x, topk_slots, topk_weights);
        if (has_combine) backend_.communicator().Combine(out, y, out);
      }
    }));
    std::vector<double> times;
    for (int i = 0; i < kReplays; ++i) {
      Must(mesh_.Exchange().status());
      const absl::Time begin = absl::Now();
      device_.Submit(key, nullptr);
      Must(device_.Wait(device_.Record(), absl::Seconds(30)));
      times.push_back(absl::ToDoubleMicroseconds(absl::Now() - begin) / kLayers);
    }
    Clear();
    std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
    return times[kReplays / 2];
  }

 private:
  // Bytes with none but these bits: of every type small numbers.
  void PutNoise(const Tensor& tensor, uint8_t mask, std::mt19937* random) {
    std::vector<uint8_t> noise(tensor.num_bytes());
    for (uint8_t& byte : noise) byte = (*random)() & mask;
    Put(tensor, noise.data());
  }

  Mesh& mesh_;
  Backend& backend_;
  Device& device_;
};

void RunRank(int num_ranks, Mesh* mesh, Mesh* device_mesh) {
  BackendOptions options;
  options.device = "cuda";
  options.activation = ActivationFormat::kFP8;
  options.ordinal = mesh->rank();
  options.mesh = device_mesh;
  OpLimits& l = options.limits;
  l.max_tokens = *std::max_element(kTokens.begin(), kTokens.end());
  l.max_sequences = l.max_rows = 16;
  l.max_context = 1024;
  l.hidden_size = kHidden;
  l.num_heads = 128;
  l.q_lora_rank = 1536;
  l.kv_lora_rank = 512;
  l.qk_rope_head_dim = 64;
  l.qk_nope_head_dim = l.v_head_dim = 128;
  l.num_experts = kExperts;
  l.num_experts_per_tok = kChoices;
  l.num_ranks = num_ranks;
  l.num_local_experts = kExperts / num_ranks;
  l.max_ffn_width = 2048;
  l.vocab_size = 1024;
  const auto backend = Must(MakeBackend(options));
  Rank rank(mesh, backend.get());
  if (mesh->rank() == 0)
    fmt::print("{} ranks, {}\n{:>8} {:>12} {:>12}\n", num_ranks, backend->name(), "tokens", "dispatch us",
               "combine us");
  for (int num_tokens : kTokens) {
    const double dispatch = rank.Run(num_tokens, false), both = rank.Run(num_tokens, true);
    if (mesh->rank() == 0) fmt::print("{:>8} {:>12.1f} {:>12.1f}\n", num_tokens, dispatch, both - dispatch);
  }
  Must(mesh->Exchange().status());
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) {
  const int num_ranks = argc > 1 ? std::atoi(argv[1]) : 2;
  if (num_ranks < 2 || cachalot::kExperts % num_ranks != 0) {
    fmt::print(stderr, "usage: peer_bench [RANKS], which divide {} experts [2]\n", cachalot::kExperts);
    return 2;
  }
  auto meshes = cachalot::MakeThreadMesh(num_ranks), device_meshes = cachalot::MakeThreadMesh(num_ranks);
  std::vector<std::thread> ranks;
  for (int r = 0; r < num_ranks; ++r) {
    ranks.emplace_back([&, r] { cachalot::RunRank(num_ranks, meshes[r].get(), device_meshes[r].get()); });
  }
  for (std::thread& rank : ranks) rank.join();
}
