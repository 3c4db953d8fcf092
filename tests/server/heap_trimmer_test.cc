// HeapTrimmer: what was freed goes back to the system, what is in use costs nothing.
#include "server/heap_trimmer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace cachalot {
namespace {

constexpr size_t kPieceBytes = 1000, kNumPieces = 128'000;

size_t ResidentBytes() {
  size_t size = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

// 128 MB in small pieces, made by a thread of its own, as calls are: in a heap of its own, which outlives it.
class Pieces {
 public:
  Pieces() {
    std::thread([this] {
      for (size_t i = 0; i < kNumPieces; ++i) pieces_.push_back(std::make_unique<std::string>(kPieceBytes, 'x'));
    }).join();
  }
  // All but the last, which holds the heap's end.
  void Free() { pieces_.erase(pieces_.begin(), pieces_.end() - 1); }

 private:
  std::vector<std::unique_ptr<std::string>> pieces_;
};

TEST(HeapTrimmerTest, WhatIsInUseIsLeftAloneAndWhatIsFreedGoesBack) {
  HeapTrimmer heap;
  EXPECT_FALSE(heap.Look());
  Pieces pieces;
  EXPECT_FALSE(heap.Look());
  const size_t full = ResidentBytes();
  pieces.Free();
  EXPECT_GT(ResidentBytes(), full - 20'000'000) << "malloc gave it back by itself: this shows nothing";
  EXPECT_TRUE(heap.Look());
  EXPECT_LT(ResidentBytes(), full - 100'000'000);
  EXPECT_FALSE(heap.Look());
}

TEST(HeapTrimmerTest, EachTimeAnew) {
  HeapTrimmer heap;
  EXPECT_FALSE(heap.Look());
  for (int i = 0; i < 3; ++i) {
    Pieces pieces;
    EXPECT_FALSE(heap.Look());
    pieces.Free();
    EXPECT_TRUE(heap.Look());
  }
}

}  // namespace
}  // namespace cachalot
