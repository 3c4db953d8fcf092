// Times by kind of step, shares by place, and the best of them.
#include "engine/schedule/draft_length.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>

#include "kernels/check.h"

namespace cachalot {
namespace {

// A later measurement's weight; what an outlier counts as at most, of what is known; drafts that a share remembers.
constexpr double kWeight = 0.1, kMostOfKnown = 1.5, kMemory = 2000;
// A change must promise as much.
constexpr double kWorthAChange = 1.01;
// Kinds farther apart tell nothing of each other: three buckets of sequences.
constexpr int kFarthest = 12;
// The first steps of a trial were planned with others under way.
constexpr int kFirstSteps = 3;

// Whole numbers up to 8, then four to an octave: as a GPU's buckets are spaced.
int Bucket(int64_t n) {
  if (n <= 8) return static_cast<int>(std::max<int64_t>(n, 0));
  return static_cast<int>(std::ceil(4 * std::log2(static_cast<double>(n)))) - 4;
}

}  // namespace

DraftLength::Key DraftLength::KeyOf(int num_sequences, int64_t num_keys) {
  const auto keys = static_cast<uint64_t>(num_keys / std::max(num_sequences, 1));
  return {Bucket(num_sequences), std::bit_width(keys / 256)};
}

DraftLength::Kind& DraftLength::KindOf(const Key& key) {
  const auto [found, is_new] = kinds_.try_emplace(key);
  Kind& kind = found->second;
  if (!is_new) return kind;
  kind.times.resize(max_drafts_ + 1);
  kind.best = max_drafts_;
  // NOTE: distance in sequences counts more: what drafts cost depends on how many rows share a weight. One that knows
  // less lends too: where sequences end all the while, no kind lasts long enough to know all.
  std::pair<int64_t, int> nearest = {max_drafts_ + 1, 0};
  for (const auto& [other, known] : kinds_) {
    const int distance = 4 * std::abs(other.first - key.first) + std::abs(other.second - key.second);
    const int64_t num_unknown =
        std::count_if(known.times.begin(), known.times.end(), [](const Time& t) { return t.seconds == 0; });
    if (other == key || distance > kFarthest || std::pair(num_unknown, distance) >= nearest) continue;
    nearest = {num_unknown, distance};
    kind = known;
  }
  for (Time& time : kind.times) time.num_steps = 0;
  kind.trial = -1;
  kind.num_steps = 0;
  return kind;
}

double DraftLength::TokensOf(int num_drafts) const {
  double tokens = 1, all_right = 1;
  for (int i = 0; i < num_drafts; ++i) tokens += all_right *= right_[i].right / right_[i].of;
  return tokens;
}

double DraftLength::Rate(const Kind& kind, int num_drafts) const {
  return TokensOf(num_drafts) / kind.times[num_drafts].seconds;
}

int DraftLength::Untried(const Kind& kind, int most) const {
  for (int k = most; k >= 0; --k) {
    if (kind.times[k].seconds == 0) return k;
  }
  return -1;
}

int DraftLength::Best(const Kind& kind, int most) const {
  const int present = std::min(kind.best, most);
  int best = present;
  for (int k = 0; k <= most; ++k) {
    if (Rate(kind, k) > Rate(kind, best)) best = k;
  }
  return Rate(kind, best) > kWorthAChange * Rate(kind, present) ? best : present;
}

int DraftLength::Next(int num_sequences, int64_t num_keys, int most) {
  CHECK(most >= 0 && most <= max_drafts_, "{} of {} drafts", most, max_drafts_);
  if (most == 0 || num_sequences == 0) return most;
  Kind& kind = KindOf(KeyOf(num_sequences, num_keys));
  ++kind.num_steps;
  const bool is_on_trial = kind.trial >= 0;
  if (is_on_trial && kind.num_steps <= kTrialSteps) return std::min(kind.trial, most);
  if (is_on_trial) kind.num_steps = 1;
  kind.trial = Untried(kind, most);
  if (kind.trial < 0) {
    kind.best = Best(kind, most);
    if (kind.num_steps < kStepsBetweenTrials) return kind.best;
    // The others in turn.
    kind.last_trial = (kind.last_trial + 1) % (most + 1);
    if (kind.last_trial == kind.best) kind.last_trial = (kind.last_trial + 1) % (most + 1);
    kind.trial = kind.last_trial;
  }
  kind.num_steps = 1;
  return kind.trial;
}

void DraftLength::TookBeforehand(int num_sequences, int64_t num_keys, int num_drafts, absl::Duration time) {
  CHECK(num_drafts >= 0 && num_drafts <= max_drafts_, "{} of {} drafts", num_drafts, max_drafts_);
  const double seconds = absl::ToDoubleSeconds(time);
  if (seconds > 0) KindOf(KeyOf(num_sequences, num_keys)).times[num_drafts] = {seconds, 0};
}

void DraftLength::Took(int num_sequences, int64_t num_keys, int num_drafts, absl::Duration time) {
  CHECK(num_drafts >= 0 && num_drafts <= max_drafts_, "{} of {} drafts", num_drafts, max_drafts_);
  const double seconds = absl::ToDoubleSeconds(time);
  if (max_drafts_ == 0 || !(seconds > 0)) return;
  Kind& kind = KindOf(KeyOf(num_sequences, num_keys));
  Time& known = kind.times[num_drafts];
  const double before = known.seconds;
  if (known.num_steps == 0) {
    known.seconds = seconds;
  } else if (known.num_steps < kFirstSteps) {
    known.seconds = std::min(known.seconds, seconds);
  } else {
    known.seconds += kWeight * (std::min(seconds, kMostOfKnown * known.seconds) - known.seconds);
  }
  ++known.num_steps;
  // What another kind has lent, or was measured beforehand, is right but for a factor, which is known as soon as one
  // time is the kind's own.
  int num_own = 0;
  for (const Time& t : kind.times) num_own += t.num_steps > 0 ? 1 : 0;
  if (before == 0 || num_own > 1) return;
  for (Time& t : kind.times) {
    if (&t != &known) t.seconds *= known.seconds / before;
  }
}

void DraftLength::Verified(int num_drafts, int num_accepted) {
  for (int i = 0; i < num_drafts && i <= num_accepted; ++i) {
    Share& share = right_.at(i);
    const double kept = share.of < kMemory ? 1 : 1 - 1 / kMemory;
    share.right = share.right * kept + (i < num_accepted ? 1 : 0);
    share.of = share.of * kept + 1;
  }
}

}  // namespace cachalot
