// Placement: all experts are there, no rank has one twice, and skewed loads come out even.
#include "engine/expert_placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <string>

namespace cachalot {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// Expert of rank i in popularity has 1 / (i + 1)^exponent of the tokens; which expert that is, is drawn.
std::vector<double> ZipfLoads(int num_experts, double exponent, uint32_t seed) {
  std::vector<double> loads(num_experts);
  for (int e = 0; e < num_experts; ++e) loads[e] = 1e6 * std::pow(e + 1, -exponent);
  std::mt19937 random(seed);
  for (int e = num_experts - 1; e > 0; --e) std::swap(loads[e], loads[random() % static_cast<uint32_t>(e + 1)]);
  return loads;
}

void ExpectSound(const PlacementShape& shape, const ExpertPlacement& placement) {
  ASSERT_EQ(placement.size(), static_cast<size_t>(shape.num_slots()));
  std::set<int> all;
  for (int r = 0; r < shape.num_ranks; ++r) {
    const auto begin = placement.begin() + r * shape.slots_per_rank();
    const std::set<int> held(begin, begin + shape.slots_per_rank());
    EXPECT_EQ(held.size(), static_cast<size_t>(shape.slots_per_rank())) << "rank " << r << " has one twice";
    all.insert(held.begin(), held.end());
  }
  EXPECT_EQ(all.size(), static_cast<size_t>(shape.num_experts));
  EXPECT_EQ(*all.begin(), 0);
  EXPECT_EQ(*all.rbegin(), shape.num_experts - 1);
}

TEST(ExpertPlacement, DefaultIsInOrder) {
  EXPECT_THAT(DefaultPlacement({.num_experts = 6, .num_ranks = 1}), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(DefaultPlacement({.num_experts = 6, .num_ranks = 3}), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(DefaultPlacement({.num_experts = 6, .num_redundant = 3, .num_ranks = 3}),
              ElementsAre(0, 1, 2, 2, 3, 4, 4, 5, 0));
  EXPECT_THAT(DefaultPlacement({.num_experts = 4, .num_redundant = 4, .num_ranks = 2}),
              ElementsAre(0, 1, 2, 3, 2, 3, 0, 1));
}

// Whatever the shape is and the loads are: none at all, one expert with everything, skewed, the same.
TEST(ExpertPlacement, EveryShapeIsSound) {
  int num_shapes = 0, num_staged = 0;
  for (const int num_experts : {1, 4, 16, 30, 64, 256}) {
    for (const int num_ranks : {1, 2, 3, 4, 7, 8, 16}) {
      for (const int num_redundant : {0, 1, 2, 5, 8, 16, 32, 64, 3 * num_experts, (num_ranks - 1) * num_experts}) {
        for (const auto& [num_nodes, num_groups] : {std::pair(1, 1), std::pair(2, 4), std::pair(4, 8)}) {
          const PlacementShape shape = {num_experts, num_redundant, num_ranks, num_nodes, num_groups};
          if (!CheckPlacement(shape).ok()) continue;
          ++num_shapes;
          ExpectSound(shape, DefaultPlacement(shape));
          std::vector<double> one(num_experts, 0.0);
          one[num_experts / 2] = 7;
          const std::vector<double> even(num_experts, 1.0), none(num_experts, 0.0);
          for (const auto& loads : {none, one, even, ZipfLoads(num_experts, 1.5, num_shapes)}) {
            const ExpertPlacement placement = BalancedPlacement(shape, loads);
            ExpectSound(shape, placement);
            const std::vector<double> ranks = RankLoads(shape, placement, loads);
            EXPECT_NEAR(std::accumulate(ranks.begin(), ranks.end(), 0.0),
                        std::accumulate(loads.begin(), loads.end(), 0.0), 1e-3);
          }
          num_staged += num_nodes > 1 ? 1 : 0;
        }
      }
    }
  }
  EXPECT_GT(num_shapes, 300);
  EXPECT_GT(num_staged, 200);
}

TEST(ExpertPlacement, EvenLoadsStayEven) {
  for (const int num_redundant : {0, 32, 64, 512}) {
    const PlacementShape shape = {.num_experts = 256, .num_redundant = num_redundant, .num_ranks = 8};
    const std::vector<double> even(256, 3.0);
    EXPECT_NEAR(Imbalance(RankLoads(shape, DefaultPlacement(shape), even)), 1.0, 1e-9) << num_redundant;
    EXPECT_NEAR(Imbalance(RankLoads(shape, BalancedPlacement(shape, even), even)), 1.0, 1e-9) << num_redundant;
  }
}

// Where nothing better exists by sight: 8 is shared by two ranks, and 3 + 1 stands against 2 + 2.
TEST(ExpertPlacement, TheBusiestIsCopied) {
  const PlacementShape shape = {.num_experts = 5, .num_redundant = 1, .num_ranks = 2};
  const std::vector<double> loads = {1, 2, 8, 3, 2};
  const ExpertPlacement placement = BalancedPlacement(shape, loads);
  EXPECT_EQ(std::count(placement.begin(), placement.end(), 2), 2);
  EXPECT_THAT(RankLoads(shape, placement, loads), ElementsAre(8, 8));
}

TEST(ExpertPlacement, SkewedLoadsComeOutEven) {
  for (const double exponent : {0.5, 0.8, 1.0, 1.2}) {
    double before = 0, packed = 0, after = 0;  // the worst of ten
    for (uint32_t seed = 0; seed < 10; ++seed) {
      const std::vector<double> loads = ZipfLoads(256, exponent, seed);
      PlacementShape shape = {.num_experts = 256, .num_ranks = 8};
      before = std::max(before, Imbalance(RankLoads(shape, DefaultPlacement(shape), loads)));
      packed = std::max(packed, Imbalance(RankLoads(shape, BalancedPlacement(shape, loads), loads)));
      shape.num_redundant = 32;
      after = std::max(after, Imbalance(RankLoads(shape, BalancedPlacement(shape, loads), loads)));
    }
    std::printf(
        "[ measured ] Zipf %.1f, 256 experts, 8 ranks, max/mean: in order %.3f, packed %.3f, 32 redundant %.3f\n",
        exponent, before, packed, after);
    EXPECT_LE(packed, before);
    EXPECT_LT(after, 1.02);
    EXPECT_GT(before, 1.15);
  }
}

// Nodes keep whole groups, and as many; what that costs is seen.
TEST(ExpertPlacement, GroupsStayInANode) {
  const PlacementShape shape = {
      .num_experts = 256, .num_redundant = 32, .num_ranks = 16, .num_nodes = 4, .num_groups = 8};
  for (uint32_t seed = 0; seed < 10; ++seed) {
    const std::vector<double> loads = ZipfLoads(256, 0.8, seed);
    const ExpertPlacement placement = BalancedPlacement(shape, loads);
    std::vector<std::set<int>> nodes_of(shape.num_groups);
    const int slots_per_node = shape.num_slots() / shape.num_nodes;
    for (int slot = 0; slot < shape.num_slots(); ++slot) {
      nodes_of[placement[slot] / (shape.num_experts / shape.num_groups)].insert(slot / slots_per_node);
    }
    for (const std::set<int>& nodes : nodes_of) EXPECT_EQ(nodes.size(), 1u);
    PlacementShape flat = shape;
    flat.num_nodes = 1;
    const double staged = Imbalance(RankLoads(shape, placement, loads));
    const double global = Imbalance(RankLoads(flat, BalancedPlacement(flat, loads), loads));
    const double in_order = Imbalance(RankLoads(shape, DefaultPlacement(shape), loads));
    EXPECT_LE(global, staged + 1e-9);
    EXPECT_LT(staged, in_order);
    if (seed == 0) {
      std::printf(
          "[ measured ] Zipf 0.8, 16 ranks of 4 nodes, 32 redundant, max/mean: in order %.3f, groups in a node "
          "%.3f, global %.3f\n",
          in_order, staged, global);
    }
  }
}

// Each rank's table: a copy of its own alone, else all copies, in turns that begin evenly.
TEST(ExpertPlacement, RanksSendToTheirOwnCopyOrInTurns) {
  const PlacementShape shape = {.num_experts = 4, .num_redundant = 4, .num_ranks = 4};
  const ExpertPlacement first = {0, 1, 0, 2, 1, 3, 3, 2}, second = {0, 1, 2, 3, 0, 1, 0, 2};  // slot / 2 is the rank
  const std::vector<ExpertPlacement> layers = {first, second};
  const RankExperts experts = ExpertsOfRank(shape, layers, 2);
  EXPECT_THAT(experts.held, ElementsAre(ElementsAre(1, 3), ElementsAre(0, 1)));
  EXPECT_EQ(experts.num_copies, 4);
  const std::vector<int32_t> expected = {2, 0, 2,  -1, -1, 1, 4, -1, -1, -1, 2, 7, 3, -1, -1, 1, 5, -1, -1, -1,
                                         1, 4, -1, -1, -1, 1, 5, -1, -1, -1, 2, 7, 2, -1, -1, 1, 3, -1, -1, -1};
  EXPECT_EQ(experts.slots, expected);
  // The other rank without expert 0 begins with the other copy.
  const RankExperts last = ExpertsOfRank(shape, layers, 3);
  EXPECT_THAT(std::vector<int32_t>(last.slots.begin(), last.slots.begin() + 5), ElementsAre(2, 2, 0, -1, -1));
}

TEST(ExpertPlacement, RefusesWhatDoesNotDivide) {
  const auto message = [](int num_experts, int num_redundant, int num_ranks) {
    return std::string(CheckPlacement({num_experts, num_redundant, num_ranks}).message());
  };
  EXPECT_THAT(message(16, 3, 4),
              HasSubstr("redundant-experts: found 3, which with the model's 16 experts do not divide "
                        "among 4 ranks, expected 0 or 4"));
  EXPECT_THAT(message(16, 1, 3), HasSubstr("expected 2"));
  EXPECT_THAT(message(16, 0, 3),
              HasSubstr("ranks: found 3, which do not divide the model's 16 experts, expected one of "
                        "1, 2, 4, 8, 16, or --redundant-experts 2"));
  EXPECT_THAT(message(16, 4, 3), HasSubstr("expected 2 or 5"));
  EXPECT_THAT(message(16, 4, 1), HasSubstr("but there is one rank"));
  EXPECT_THAT(message(16, 20, 2), HasSubstr("expected at most 16"));
  EXPECT_EQ(message(16, 16, 2), "");
  EXPECT_EQ(message(16, 2, 3), "");
  EXPECT_EQ(message(16, 0, 1), "");
}

}  // namespace
}  // namespace cachalot
