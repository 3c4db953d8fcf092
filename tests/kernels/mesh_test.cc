// Meshes: everybody gets what everybody gave, in rounds; who is awaited is told; nobody waits after an abort.
#include "kernels/mesh.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "tests/kernels/loopback.h"

namespace cachalot {
namespace {

std::string Text(Mesh::Bytes bytes) { return std::string(bytes.data(), bytes.size()); }

struct MeshKind {
  const char* name;
  std::vector<std::unique_ptr<Mesh>> (*make)(int num_ranks);
};
std::vector<std::unique_ptr<Mesh>> MakeTcpMesh(int num_ranks) { return MakeLoopbackMesh({.num_nodes = num_ranks}); }
// Each other two ranks in a process.
std::vector<std::unique_ptr<Mesh>> MakePairs(int num_ranks) {
  const int num_local = num_ranks % 2 == 0 ? 2 : 1;
  return MakeLoopbackMesh({.num_nodes = num_ranks / num_local, .ranks_per_node = num_local});
}

class MeshTest : public testing::TestWithParam<MeshKind> {};
INSTANTIATE_TEST_SUITE_P(Kind, MeshTest,
                         testing::Values(MeshKind{"threads", MakeThreadMesh}, MeshKind{"tcp", MakeTcpMesh},
                                         MeshKind{"pairs", MakePairs}),
                         [](const auto& info) { return std::string(info.param.name); });

template <typename Body>
void OnAllRanks(std::vector<std::unique_ptr<Mesh>>& ranks, Body body) {
  std::vector<std::thread> threads;
  for (auto& rank : ranks) threads.emplace_back([&body, &rank] { body(*rank); });
  for (std::thread& thread : threads) thread.join();
}

TEST_P(MeshTest, GivesEverybodyWhatEverybodyGave) {
  for (int num_ranks : {1, 2, 5, 8}) {
    auto ranks = GetParam().make(num_ranks);
    OnAllRanks(ranks, [num_ranks](Mesh& mesh) {
      std::mt19937 random(mesh.rank());
      for (int round = 0; round < 200; ++round) {
        for (int r = 0; r < num_ranks; ++r) {
          const std::string text =
              absl::StrCat(round, " ", mesh.rank(), " to ", r, std::string((round + r) % 7 * 100, '.'));
          mesh.outbox(r).assign(text.begin(), text.end());
        }
        if (random() % 8 == 0) std::this_thread::yield();
        const auto came = mesh.Exchange();
        ASSERT_TRUE(came.ok());
        for (int r = 0; r < num_ranks; ++r) {
          const std::string expected =
              absl::StrCat(round, " ", r, " to ", mesh.rank(), std::string((round + mesh.rank()) % 7 * 100, '.'));
          ASSERT_EQ(Text((*came)[r]), expected);
        }
      }
    });
  }
}

TEST_P(MeshTest, CallsThoseWhoAreAwaited) {
  auto ranks = GetParam().make(2);
  std::atomic<uint64_t> awaited = 0;
  absl::Notification called;
  ranks[1]->OnAwaited([&](uint64_t num_begun) {
    awaited = num_begun;
    if (!called.HasBeenNotified()) called.Notify();
  });
  for (uint64_t round = 1; round <= 2; ++round) {
    std::thread other([&] { EXPECT_TRUE(ranks[0]->Exchange().ok()); });
    if (round == 1) called.WaitForNotification();
    while (awaited < round) std::this_thread::yield();
    EXPECT_EQ(awaited, round);
    EXPECT_TRUE(ranks[1]->Exchange().ok());
    other.join();
  }
  ranks[1]->OnAwaited(nullptr);
  ranks[0]->Abort(absl::AbortedError("gone"));
  EXPECT_EQ(awaited, 2u);
}

TEST_P(MeshTest, NobodyWaitsAfterAnAbort) {
  for (int i = 0; i < 20; ++i) {
    auto ranks = GetParam().make(4);
    std::atomic<int> num_told = 0;
    ranks[2]->OnAwaited([&](uint64_t num_begun) { num_told += num_begun == 0 ? 1 : 0; });
    std::thread aborting([&] {
      if (i % 2 == 0) std::this_thread::yield();
      ranks[3]->Abort(absl::AbortedError("rank 3 is gone"));
    });
    std::vector<std::thread> waiting;
    for (int r = 0; r < 3; ++r) {
      waiting.emplace_back([&, r] {
        for (int round = 0; round < 2; ++round) {
          EXPECT_EQ(ranks[r]->Exchange().status(), absl::AbortedError("rank 3 is gone"));
          ranks[r]->Abort(absl::AbortedError("a later reason"));
        }
      });
    }
    for (std::thread& thread : waiting) thread.join();
    aborting.join();
    while (num_told == 0) std::this_thread::yield();
    EXPECT_EQ(num_told, 1);
  }
}

TEST_P(MeshTest, EndsMayGoInAnyOrder) {
  for (int i = 0; i < 10; ++i) {
    auto ranks = GetParam().make(4);
    OnAllRanks(ranks, [&](Mesh& mesh) {
      for (int r = 0; r < 4; ++r) mesh.outbox(r).assign(1000 * mesh.rank(), 'x');
      const auto came = mesh.Exchange();
      ASSERT_TRUE(came.ok()) << came.status();
      ASSERT_EQ((*came)[3].size(), 3000u);
      if (mesh.rank() == i % 4) ranks[i % 4].reset();
    });
  }
}

}  // namespace
}  // namespace cachalot
