// Ranks that are GPUs: what they send each other, and that nobody waits for one that is gone.
// NOTE: not on one GPU: what one rank allocates or frees waits for all of the GPU, another's waiting kernel too.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/synchronization/notification.h"
#include "tests/kernels/on_device.h"
#include "tests/kernels/testing.h"

namespace cachalot {
namespace {

using testing::Element;
using testing::Owned;
using testing::OwnedActivation;
using testing::Random;

constexpr int kExperts = 16, kMaxTokens = 128;
constexpr int64_t kChoices = 4;

BackendOptions Options(int num_ranks, int64_t cols) {
  BackendOptions options;
  options.device = "cuda";
  options.activation = ActivationFormat::kFP8;
  options.limits = testing::CpuOptions().limits;
  options.limits.max_tokens = kMaxTokens;
  options.limits.hidden_size = static_cast<int>(cols);
  options.limits.num_experts = kExperts;
  options.limits.num_experts_per_tok = kChoices;
  options.limits.num_ranks = num_ranks;
  options.limits.num_local_experts = kExperts / num_ranks;
  return options;
}

int NumGpus() {
  int num_gpus = 0;
  for (BackendOptions options = Options(1, 512); num_gpus < 8; ++num_gpus) {
    options.ordinal = num_gpus;
    if (!MakeBackend(options).ok()) break;
  }
  return num_gpus;
}

struct Part {
  Part(int64_t rows, int64_t cols, Random& random)
      : x(ActivationFormat::kFP8, rows, cols),
        shared(DType::kBF16, {rows, cols}),
        out(DType::kBF16, {rows, cols}),
        topk_slots(DType::kI32, {rows, kChoices}),
        weights(DType::kF32, {rows, kChoices}) {
    x.values.FillNormal(random);
    x.scales.FillNormal(random);
    shared.FillNormal(random);
    weights.FillNormal(random);
    std::vector<int32_t> slots(rows * kChoices);
    for (int64_t t = 0; t < rows; ++t) {
      const int32_t first = random.Below(kExperts), step = 1 + random.Below(kExperts / static_cast<int>(kChoices));
      for (int64_t k = 0; k < kChoices; ++k) {
        slots[t * kChoices + k] = t % 7 == 6 ? -1 : (first + static_cast<int32_t>(k) * step) % kExperts;
      }
    }
    topk_slots.Set(slots);
  }
  OwnedActivation x;
  Owned shared, out, topk_slots, weights;
};

// What expert `slot` makes of a value.
double Expert(int32_t slot, double value, double scale) { return (slot + 1) * 0.25 * value * scale; }

void RunLayer(Communicator& communicator, Part& part, bool has_shared) {
  const int num_local = kExperts / communicator.num_ranks(), first = communicator.rank() * num_local;
  const int64_t cols = part.out->dim(1), capacity = communicator.num_ranks() * part.out->dim(0) * kChoices;
  OwnedActivation rows(ActivationFormat::kFP8, capacity, cols);
  Owned y(DType::kBF16, {capacity, cols}), offsets(DType::kI32, {num_local + 1});
  communicator.Dispatch({rows.view(), offsets}, part.x.view(), part.topk_slots, part.weights);
  for (int g = 0; g < num_local; ++g) {
    for (int32_t row = offsets.data<int32_t>()[g]; row < offsets.data<int32_t>()[g + 1]; ++row) {
      for (int64_t c = 0; c < cols; ++c) {
        const double scale = Element(rows.scales, row, c / kQuantGroup);
        testing::SetElement(y, row, c, Expert(first + g, Element(rows.values, row, c), scale));
      }
    }
  }
  communicator.Combine(part.out, y, has_shared ? *part.shared : Tensor());
}

std::vector<double> Wanted(const Part& part, bool has_shared) {
  std::vector<double> want;
  for (int64_t t = 0; t < part.out->dim(0); ++t) {
    for (int64_t c = 0; c < part.out->dim(1); ++c) {
      double sum = has_shared ? Element(part.shared, t, c) : 0.0;
      for (int64_t k = 0; k < kChoices; ++k) {
        const int32_t slot = part.topk_slots->row<int32_t>(t)[k];
        if (slot < 0) continue;
        const double scale = Element(part.x.scales, t, c / kQuantGroup);
        sum += Element(part.weights, t, k) * Expert(slot, Element(part.x.values, t, c), scale);
      }
      want.push_back(sum);
    }
  }
  return want;
}

// Every value within two roundings to bf16 of the largest that is summed.
void ExpectClose(const Part& part, bool has_shared) {
  const std::vector<double> got = testing::Values(part.out), want = Wanted(part, has_shared);
  ASSERT_EQ(got.size(), want.size());
  double largest = 0, difference = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    difference = std::max(difference, std::abs(got[i] - want[i]));
  }
  EXPECT_LE(difference, largest / 64) << "largest " << largest;
}

TEST(CudaPeerTest, SumsComeBackToTheirTokens) {
  const int num_gpus = NumGpus();
  Random random(1);
  if (num_gpus < 2) GTEST_SKIP() << "one GPU: did not run";
  for (int num_ranks : {2, 4, 8}) {
    if (num_ranks > num_gpus) break;
    for (int64_t cols : {int64_t{512}, int64_t{7168}}) {
      std::vector<std::vector<Part>> layers;
      for (int64_t rows : {1, 2, 64, kMaxTokens, 5}) {
        auto& parts = layers.emplace_back();
        for (int r = 0; r < num_ranks; ++r) parts.emplace_back(rows, cols, random);
      }
      auto meshes = MakeThreadMesh(num_ranks);
      std::vector<std::thread> threads;
      for (int r = 0; r < num_ranks; ++r) {
        threads.emplace_back([&, r] {
          BackendOptions options = Options(num_ranks, cols);
          options.ordinal = r;
          options.mesh = meshes[r].get();
          const auto backend = testing::MakeOnDevice(options);
          ASSERT_NE(backend, nullptr);
          EXPECT_EQ(backend->communicator().rank(), r);
          for (size_t i = 0; i < layers.size(); ++i) RunLayer(backend->communicator(), layers[i][r], i % 2 == 0);
          EXPECT_TRUE(meshes[r]->Exchange().ok());  // nobody leaves while another may write to its memory
        });
      }
      for (std::thread& thread : threads) thread.join();
      for (size_t i = 0; i < layers.size(); ++i) {
        for (const Part& part : layers[i]) ExpectClose(part, i % 2 == 0);
      }
    }
  }
  std::printf("[ measured ] ranks on %d GPUs\n", num_gpus);
}

TEST(CudaPeerTest, NobodyWaitsForOneThatIsGone) {
  if (NumGpus() < 2) GTEST_SKIP() << "one GPU: did not run";
  auto meshes = MakeThreadMesh(2);
  absl::Notification waits;  // rank 0, and in vain
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      BackendOptions options = Options(2, 512);
      options.ordinal = r;
      options.mesh = meshes[r].get();
      const auto backend = MakeBackend(options);
      ASSERT_TRUE(backend.ok()) << backend.status();
      if (r == 1) {
        waits.WaitForNotification();
        meshes[1]->Abort(absl::AbortedError("rank 1: gone"));
        return;
      }
      Device& device = (*backend)->device();
      Buffer memory = *device.Allocate(1 << 20, Device::Memory::kDevice);
      char* base = static_cast<char*>(memory.data());
      const Activation x = {Tensor(base, DType::kF8E4M3, {4, 512}), Tensor(base + 4096, DType::kF32, {4, 4})};
      const Activation rows = {Tensor(base + 8192, DType::kF8E4M3, {32, 512}),
                               Tensor(base + 65536, DType::kF32, {32, 4})};
      device.Submit({}, [&] {
        (*backend)->communicator().Dispatch({rows, Tensor(base + 131072, DType::kI32, {kExperts / 2 + 1})}, x,
                                            Tensor(base + 262144, DType::kI32, {4, kChoices}),
                                            Tensor(base + 524288, DType::kF32, {4, kChoices}));
      });
      const Device::Event event = device.Record();
      EXPECT_TRUE(absl::IsDeadlineExceeded(device.Wait(event, absl::Milliseconds(20))));
      waits.Notify();
      EXPECT_EQ(device.Wait(event, absl::Seconds(5)), absl::InternalError("the GPU failed: another rank is gone"));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace cachalot
