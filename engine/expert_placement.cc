// ExpertPlacement: copies by load, then bins of equal numbers.
#include "engine/expert_placement.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

// A thing to be put into a bin: a copy of an expert, or a group of experts.
struct Item {
  int id = 0;
  double load = 0;
};

struct Bin {
  std::vector<Item> items;
  double load = 0;

  bool Has(int id) const {
    return std::any_of(items.begin(), items.end(), [id](const Item& item) { return item.id == id; });
  }
  void Put(const Item& item) {
    items.push_back(item);
    load += item.load;
  }
  Item Take(size_t index) {
    const Item item = items[index];
    items.erase(items.begin() + static_cast<std::ptrdiff_t>(index));
    load -= item.load;
    return item;
  }
};

// All bins that have room have the item already: one that is full takes it, and gives one of its own that the lightest
// with room lacks, so that the heavier of the two is as light as can be. NOTE: there is such a pair. There are no more
// copies than bins, so that a bin lacks this item; it is full and the other is not, so that it has something that the
// other lacks.
void PutBySwap(const Item& item, size_t capacity, std::vector<Bin>* bins) {
  Bin* roomy = nullptr;
  for (Bin& bin : *bins) {
    if (bin.items.size() < capacity && (roomy == nullptr || bin.load < roomy->load)) roomy = &bin;
  }
  Bin* giver = nullptr;
  size_t given = 0;
  double best = std::numeric_limits<double>::infinity();
  for (Bin& bin : *bins) {
    if (bin.Has(item.id)) continue;
    for (size_t i = 0; i < bin.items.size(); ++i) {
      if (roomy->Has(bin.items[i].id)) continue;
      const double most = std::max(bin.load - bin.items[i].load + item.load, roomy->load + bin.items[i].load);
      if (most >= best) continue;
      best = most;
      giver = &bin;
      given = i;
    }
  }
  CHECK(giver != nullptr, "more copies of {} than bins", item.id);
  roomy->Put(giver->Take(given));
  giver->Put(item);
}

// The heaviest first, each to the bin with the least load that has room and lacks it: bins of `capacity` items, which
// `items` fill.
std::vector<Bin> Pack(std::vector<Item> items, size_t capacity) {
  std::vector<Bin> bins(items.size() / capacity);
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.load > b.load; });
  for (const Item& item : items) {
    Bin* lightest = nullptr;
    for (Bin& bin : bins) {
      if (bin.items.size() == capacity || bin.Has(item.id)) continue;
      if (lightest == nullptr || bin.load < lightest->load) lightest = &bin;
    }
    if (lightest != nullptr) {
      lightest->Put(item);
    } else {
      PutBySwap(item, capacity, &bins);
    }
  }
  return bins;
}

// `num_slots` copies of `experts`, one of each at least and `max_copies` at most.
std::vector<Item> Replicate(const std::vector<int>& experts, absl::Span<const double> loads, int num_slots,
                            int max_copies) {
  std::vector<int> copies(experts.size(), 1);
  for (int spare = num_slots - static_cast<int>(experts.size()); spare > 0; --spare) {
    int most = -1;
    for (size_t i = 0; i < experts.size(); ++i) {
      if (copies[i] == max_copies) continue;
      if (most < 0 || loads[experts[i]] * copies[most] > loads[experts[most]] * copies[i]) most = static_cast<int>(i);
    }
    ++copies[most];
  }
  std::vector<Item> items;
  for (size_t i = 0; i < experts.size(); ++i) {
    items.insert(items.end(), copies[i], {experts[i], loads[experts[i]] / copies[i]});
  }
  return items;
}

// The experts of each node: whole groups, as many in each.
std::vector<std::vector<int>> ExpertsOfNodes(const PlacementShape& shape, absl::Span<const double> loads) {
  const int group_size = shape.num_experts / shape.num_groups;
  std::vector<Item> groups;
  for (int g = 0; g < shape.num_groups; ++g) {
    const auto begin = loads.begin() + g * group_size;
    groups.push_back({g, std::accumulate(begin, begin + group_size, 0.0)});
  }
  std::vector<std::vector<int>> nodes;
  for (const Bin& bin : Pack(groups, shape.num_groups / shape.num_nodes)) {
    std::vector<int>& experts = nodes.emplace_back();
    for (const Item& group : bin.items) {
      for (int i = 0; i < group_size; ++i) experts.push_back(group.id * group_size + i);
    }
    std::sort(experts.begin(), experts.end());
  }
  return nodes;
}

std::vector<std::vector<int>> OneNode(const PlacementShape& shape) {
  std::vector<int> experts(shape.num_experts);
  std::iota(experts.begin(), experts.end(), 0);
  return {experts};
}

// A rank of a node must be able to hold as many experts as it has slots, none twice.
bool HasStages(const PlacementShape& shape) {
  return shape.num_nodes > 1 && shape.num_groups % shape.num_nodes == 0 && shape.num_experts % shape.num_groups == 0 &&
         shape.num_ranks % shape.num_nodes == 0 && shape.num_experts / shape.num_nodes >= shape.slots_per_rank();
}

}  // namespace

absl::Status CheckPlacement(const PlacementShape& shape) {
  const int E = shape.num_experts, N = shape.num_ranks, R = shape.num_redundant;
  if (R > 0 && N == 1) {
    return absl::InvalidArgumentError(absl::StrFormat("redundant-experts: found %d, but there is one rank", R));
  }
  const int less = R - shape.num_slots() % N, more = less + N;  // what would do
  if (R == 0 && less < 0) {
    std::vector<int> possible;
    for (int n = 1; n <= std::min(E, kMaxRanks); ++n) {
      if (E % n == 0) possible.push_back(n);
    }
    return absl::InvalidArgumentError(absl::StrFormat(
        "ranks: found %d, which do not divide the model's %d experts, expected one of %s, or --redundant-experts %d", N,
        E, absl::StrJoin(possible, ", "), more));
  }
  if (less != R) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "redundant-experts: found %d, which with the model's %d experts do not divide among %d ranks, expected %s%d", R,
        E, N, less >= 0 ? absl::StrCat(less, " or ") : "", more));
  }
  if (shape.slots_per_rank() > E) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "redundant-experts: found %d, expected at most %d, with which each of %d ranks has all of the model's %d", R,
        E * N - E, N, E));
  }
  return absl::OkStatus();
}

ExpertPlacement DefaultPlacement(const PlacementShape& shape) {
  const int N = shape.num_ranks;
  if (shape.num_experts % N != 0) return BalancedPlacement(shape, std::vector<double>(shape.num_experts, 1.0));
  const int own = shape.num_experts / N;
  ExpertPlacement placement;
  for (int r = 0; r < N; ++r) {
    for (int i = 0; i < own; ++i) placement.push_back(r * own + i);
    // The copies of a rank's expert i are on ranks that differ, and of its next experts on others than those.
    for (int i = 0; i < shape.slots_per_rank() - own; ++i) {
      const int expert = i % own, source = (r + 1 + (expert + i / own) % (N - 1)) % N;
      placement.push_back(source * own + expert);
    }
  }
  return placement;
}

ExpertPlacement BalancedPlacement(const PlacementShape& shape, absl::Span<const double> loads) {
  CHECK(CheckPlacement(shape).ok() && static_cast<int>(loads.size()) == shape.num_experts, "{} loads of {} experts",
        loads.size(), shape.num_experts);
  const std::vector<std::vector<int>> nodes = HasStages(shape) ? ExpertsOfNodes(shape, loads) : OneNode(shape);
  const int num_nodes = static_cast<int>(nodes.size());
  ExpertPlacement placement;
  for (const std::vector<int>& experts : nodes) {
    const std::vector<Item> copies =
        Replicate(experts, loads, shape.num_slots() / num_nodes, shape.num_ranks / num_nodes);
    for (Bin& rank : Pack(copies, shape.slots_per_rank())) {
      std::sort(rank.items.begin(), rank.items.end(), [](const Item& a, const Item& b) { return a.id < b.id; });
      for (const Item& item : rank.items) placement.push_back(item.id);
    }
  }
  return placement;
}

std::vector<double> RankLoads(const PlacementShape& shape, const ExpertPlacement& placement,
                              absl::Span<const double> loads) {
  std::vector<int> copies(shape.num_experts);
  for (int expert : placement) ++copies[expert];
  std::vector<double> ranks(shape.num_ranks);
  for (size_t slot = 0; slot < placement.size(); ++slot) {
    ranks[slot / shape.slots_per_rank()] += loads[placement[slot]] / copies[placement[slot]];
  }
  return ranks;
}

PlacementShape ServedPlacement(const ModelConfig& config, const EngineOptions& options) {
  return {.num_experts = config.n_routed_experts,
          .num_redundant = options.num_redundant_experts,
          .num_ranks = options.num_ranks * options.num_nodes};
}

RankExperts ExpertsOfRank(const PlacementShape& shape, absl::Span<const ExpertPlacement> layers, int rank) {
  const int G = shape.slots_per_rank();
  RankExperts experts;
  experts.num_copies = std::min(shape.num_redundant + 1, shape.num_ranks);
  for (const ExpertPlacement& placement : layers) {
    experts.held.emplace_back(placement.begin() + rank * G, placement.begin() + (rank + 1) * G);
    std::vector<std::vector<int>> copies(shape.num_experts);
    for (int slot = 0; slot < shape.num_slots(); ++slot) copies[placement[slot]].push_back(slot);
    for (std::vector<int>& slots : copies) {
      const auto own = std::find_if(slots.begin(), slots.end(), [&](int slot) { return slot / G == rank; });
      if (own != slots.end()) {
        slots = {*own};
      } else {  // so many ranks before this one have none either
        const auto next = std::find_if(slots.begin(), slots.end(), [&](int slot) { return slot / G > rank; });
        const std::ptrdiff_t turn = rank - (next - slots.begin());
        std::rotate(slots.begin(), slots.begin() + turn % static_cast<std::ptrdiff_t>(slots.size()), slots.end());
      }
      experts.slots.push_back(static_cast<int32_t>(slots.size()));
      slots.resize(experts.num_copies, -1);
      experts.slots.insert(experts.slots.end(), slots.begin(), slots.end());
    }
  }
  return experts;
}

RankExperts DefaultExperts(const ModelConfig& config, const PlacementShape& shape, int rank) {
  return ExpertsOfRank(shape, std::vector(config.num_hidden_layers + 1, DefaultPlacement(shape)), rank);
}

double Imbalance(absl::Span<const double> rank_loads) {
  const double sum = std::accumulate(rank_loads.begin(), rank_loads.end(), 0.0);
  if (sum <= 0) return 1;
  return *std::max_element(rank_loads.begin(), rank_loads.end()) * static_cast<double>(rank_loads.size()) / sum;
}

}  // namespace cachalot
