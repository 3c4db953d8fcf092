// Router: which rank a request goes to.
#ifndef CACHALOT_ENGINE_ROUTER_H_
#define CACHALOT_ENGINE_ROUTER_H_

#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/types/span.h"
#include "engine/options.h"

namespace cachalot {

// A request goes where it costs least: the prompt tokens that the rank has yet to read, this prompt's among them as far
// as the rank has not been sent them before, and kSequenceTokens for each request that it has. So prompts that begin
// alike stay together until their rank has so much to do that another reads the prompt from its start sooner; from then
// on both have it. Any thread.
class Router {
 public:
  // A request under way weighs as much as so many tokens to be read: the step that all ranks run together takes as long
  // as the one that has most of them.
  static constexpr int64_t kSequenceTokens = 256;
  // What is remembered of prompts is forgotten from so many blocks of 64 tokens on, the oldest half at a time.
  static constexpr size_t kMaxPrefixes = size_t{1} << 18;

  explicit Router(int num_ranks) : ranks_(num_ranks) {}  // 1 to kMaxRanks

  // Where a request went, and what it was thought to cost there.
  struct Route {
    int rank = 0;
    int64_t tokens = 0;  // to be read
  };
  Route Choose(std::string_view salt, absl::Span<const int32_t> prompt);
  void HasBegun(const Route& route);                  // its prompt has been read
  void HasEnded(const Route& route, bool has_begun);  // once
  void Forget();                                      // all prompts

 private:
  struct Load {
    int64_t tokens = 0, sequences = 0;
    uint64_t last_chosen = 0;
  };
  std::mutex mutex_;
  std::vector<Load> ranks_;
  uint64_t num_chosen_ = 0;
  // Hash of a prompt up to a block's end -> the ranks, a bit each, that were sent it. Those that were seen last, and
  // what went before.
  absl::flat_hash_map<uint64_t, uint64_t> young_, old_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_ROUTER_H_
