// ExpertPlacement: which expert each physical slot holds, a layer's, and what a rank knows of it.
#ifndef CACHALOT_ENGINE_EXPERT_PLACEMENT_H_
#define CACHALOT_ENGINE_EXPERT_PLACEMENT_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/model/weights.h"
#include "engine/options.h"

namespace cachalot {

// E experts and as many copies more as there are redundant ones, over ranks of G slots each.
struct PlacementShape {
  int num_experts = 0, num_redundant = 0;
  int num_ranks = 1;
  // Placed in two stages where both are more than 1: the router's groups of experts are kept in a node each, so that a
  // token's experts, of few groups, are on few nodes. What does not divide is placed as on one node.
  int num_nodes = 1, num_groups = 1;

  int num_slots() const { return num_experts + num_redundant; }
  int slots_per_rank() const { return num_slots() / num_ranks; }
};

// InvalidArgument, which names the option to change and what would do: slots that ranks do not share evenly, more than
// a copy of each expert a rank.
absl::Status CheckPlacement(const PlacementShape& shape);

// [E + redundant] the expert of physical slot p, which is rank p / G's. All experts are there, no rank has one twice.
using ExpertPlacement = std::vector<int>;

// Nothing is known of loads: experts in their order, as many on each rank; then copies of as many of each rank's, on
// ranks that differ.
ExpertPlacement DefaultPlacement(const PlacementShape& shape);

// By the tokens that each expert is chosen for, [E], any unit. The idea is DeepSeek's EPLB (DeepSeek-V3 report, 3.4):
// who has the most tokens a copy gets another, until there are none left; then the heaviest copy first, each to the
// rank with the fewest tokens.
ExpertPlacement BalancedPlacement(const PlacementShape& shape, absl::Span<const double> loads);

// [ranks] tokens, when copies share an expert's evenly.
std::vector<double> RankLoads(const PlacementShape& shape, const ExpertPlacement& placement,
                              absl::Span<const double> loads);
// The most that one has over what one has on average: how much longer a layer takes than it need. 1 where none has any.
double Imbalance(absl::Span<const double> rank_loads);

// As a model is served, without nodes.
PlacementShape ServedPlacement(const ModelConfig& config, const EngineOptions& options);

// Of all layers. A copy of its own is the only one that a rank sends tokens to; the copies of others take turns, each
// rank that has none beginning with the next.
RankExperts ExpertsOfRank(const PlacementShape& shape, absl::Span<const ExpertPlacement> layers, int rank);
// The default placement in each layer of the model.
RankExperts DefaultExperts(const ModelConfig& config, const PlacementShape& shape, int rank);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_EXPERT_PLACEMENT_H_
