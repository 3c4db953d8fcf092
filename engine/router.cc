// Router: costs compared, prefixes remembered in two generations.
#include "engine/router.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/hash/hash.h"
#include "kernels/check.h"
#include "kernels/ops_types.h"

namespace cachalot {
namespace {

// Of the prompt up to the end of each of its full blocks.
std::vector<uint64_t> PrefixHashes(std::string_view salt, absl::Span<const int32_t> prompt) {
  std::vector<uint64_t> hashes;
  uint64_t hash = absl::HashOf(salt);
  for (size_t begin = 0; begin + kBlockTokens <= prompt.size(); begin += kBlockTokens) {
    hash = absl::HashOf(hash, prompt.subspan(begin, kBlockTokens));
    hashes.push_back(hash);
  }
  return hashes;
}

}  // namespace

Router::Route Router::Choose(std::string_view salt, absl::Span<const int32_t> prompt) {
  static_assert(kMaxRanks <= 64, "a bit each");
  const bool has_choice = ranks_.size() > 1;
  const std::vector<uint64_t> hashes = has_choice ? PrefixHashes(salt, prompt) : std::vector<uint64_t>();
  std::lock_guard lock(mutex_);
  std::vector<int64_t> known(ranks_.size());  // tokens of the prompt, by rank
  uint64_t everywhere_so_far = ~uint64_t{0};
  std::vector<uint64_t> holders;
  for (size_t i = 0; i < hashes.size() && everywhere_so_far != 0; ++i) {
    uint64_t ranks = 0;
    for (const auto* generation : {&young_, &old_}) {
      if (const auto it = generation->find(hashes[i]); it != generation->end()) ranks |= it->second;
    }
    everywhere_so_far &= ranks;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      if ((everywhere_so_far >> r & 1) != 0) known[r] += kBlockTokens;
    }
    holders.push_back(ranks);
  }
  const auto cost = [&](size_t r) {
    const int64_t tokens = ranks_[r].tokens + static_cast<int64_t>(prompt.size()) - known[r];
    return std::tuple(tokens + kSequenceTokens * ranks_[r].sequences, ranks_[r].last_chosen);
  };
  size_t best = 0;
  for (size_t r = 1; r < ranks_.size(); ++r) best = cost(r) < cost(best) ? r : best;

  if (young_.size() + hashes.size() > kMaxPrefixes / 2) old_ = std::exchange(young_, {});
  for (size_t i = 0; i < hashes.size(); ++i) {
    young_[hashes[i]] |= (i < holders.size() ? holders[i] : 0) | uint64_t{1} << best;
  }
  const Route route = {static_cast<int>(best), static_cast<int64_t>(prompt.size()) - known[best]};
  ranks_[best].tokens += route.tokens;
  ++ranks_[best].sequences;
  ranks_[best].last_chosen = ++num_chosen_;
  return route;
}

void Router::HasBegun(const Route& route) {
  std::lock_guard lock(mutex_);
  ranks_[route.rank].tokens -= route.tokens;
}

void Router::HasEnded(const Route& route, bool has_begun) {
  std::lock_guard lock(mutex_);
  if (!has_begun) ranks_[route.rank].tokens -= route.tokens;
  --ranks_[route.rank].sequences;
  CHECK(ranks_[route.rank].sequences >= 0 && ranks_[route.rank].tokens >= 0);
}

void Router::Forget() {
  std::lock_guard lock(mutex_);
  young_.clear();
  old_.clear();
}

}  // namespace cachalot
