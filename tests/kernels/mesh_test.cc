// Meshes: everybody gets what everybody gave, in rounds; who is awaited is told; nobody waits after an abort.
#include "kernels/mesh.h"

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"

namespace cachalot {
namespace {

std::string Text(Mesh::Bytes bytes) { return std::string(bytes.data(), bytes.size()); }

template <typename Body>
void OnAllRanks(std::vector<std::unique_ptr<Mesh>>& ranks, Body body) {
  std::vector<std::thread> threads;
  for (auto& rank : ranks) threads.emplace_back([&body, &rank] { body(*rank); });
  for (std::thread& thread : threads) thread.join();
}

TEST(ThreadMesh, GivesEverybodyWhatEverybodyGave) {
  for (int num_ranks : {1, 2, 5, 8}) {
    auto ranks = MakeThreadMesh(num_ranks);
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

TEST(ThreadMesh, CallsThoseWhoAreAwaited) {
  auto ranks = MakeThreadMesh(2);
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

TEST(ThreadMesh, NobodyWaitsAfterAnAbort) {
  for (int i = 0; i < 20; ++i) {
    auto ranks = MakeThreadMesh(4);
    std::atomic<int> num_told = 0;
    ranks[2]->OnAwaited([&](uint64_t num_begun) { num_told += num_begun == 0 ? 1 : 0; });
    std::thread aborting([&] {
      if (i % 2 == 0) std::this_thread::yield();
      ranks[3]->Abort(absl::AbortedError("rank 3 is gone"));
      ranks[2]->Abort(absl::AbortedError("a later reason"));
    });
    std::vector<std::thread> waiting;
    for (int r = 0; r < 3; ++r) {
      waiting.emplace_back([&, r] {
        for (int round = 0; round < 2; ++round) {
          EXPECT_EQ(ranks[r]->Exchange().status(), absl::AbortedError("rank 3 is gone"));
        }
      });
    }
    for (std::thread& thread : waiting) thread.join();
    aborting.join();
    EXPECT_EQ(num_told, 1);
  }
}

}  // namespace
}  // namespace cachalot
