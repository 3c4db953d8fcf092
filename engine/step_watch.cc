// StepWatch: sizes by powers of two.
#include "engine/step_watch.h"

#include <algorithm>
#include <bit>

namespace cachalot {
namespace {

int SizeOf(int64_t work) { return std::bit_width(static_cast<uint64_t>(std::max<int64_t>(work, 1))) - 1; }

}  // namespace

absl::Duration StepWatch::Limit() const {
  const int size = SizeOf(under_way_.front().work);
  for (int seen = size; seen >= 0; --seen) {
    if (slowest_[seen] == absl::ZeroDuration()) continue;
    return std::max(least_, kMargin * slowest_[seen] * static_cast<double>(int64_t{1} << (size - seen)));
  }
  return std::max(least_, kUnknown);
}

// A step begins when the one before it has ended.
void StepWatch::Completed(absl::Time now) {
  const Step step = under_way_.front();
  under_way_.pop_front();
  const absl::Duration took = std::max(now - std::max(step.launched, last_completed_), absl::Nanoseconds(1));
  last_completed_ = now;
  absl::Duration& slowest = slowest_[SizeOf(step.work)];
  slowest = std::max(took, 0.9 * slowest);
}

}  // namespace cachalot
