// StepWatch: how long a step may take before the device counts as hung.
#ifndef CACHALOT_ENGINE_STEP_WATCH_H_
#define CACHALOT_ENGINE_STEP_WATCH_H_

#include <array>
#include <cstdint>
#include <deque>

#include "absl/time/time.h"

namespace cachalot {

// One thread: the step thread. Steps are launched and completed in order.
//
// The limit of a step is kMargin times the slowest that took about as much work lately; of a size that none has had
// yet, in proportion to the next smaller one: time grows no faster than work. It is never less than `least`, and
// kUnknown before anything has been seen.
class StepWatch {
 public:
  static constexpr int kMargin = 10;
  static constexpr absl::Duration kUnknown = absl::Minutes(10);

  explicit StepWatch(absl::Duration least) : least_(least) {}

  // Of a step's rows and the keys that they attend to. NOTE: a token of DeepSeek-V3 at position 4,096 takes about twice
  // what it takes at position 0.
  static int64_t WorkOf(int64_t num_rows, int64_t num_keys) { return num_rows + num_keys / 4096; }

  void Launched(int64_t work, absl::Time now) { under_way_.push_back({work, now}); }
  absl::Duration Limit() const;  // of the oldest step under way
  void Completed(absl::Time now);

 private:
  struct Step {
    int64_t work;
    absl::Time launched;
  };
  const absl::Duration least_;
  std::deque<Step> under_way_;
  absl::Time last_completed_ = absl::InfinitePast();
  std::array<absl::Duration, 64> slowest_ = {};  // by the logarithm of the work; forgets a tenth with each step
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_STEP_WATCH_H_
