// DraftLength: how many drafts a step should verify, from what steps have taken and how many drafts were right.
#ifndef CACHALOT_ENGINE_SCHEDULE_DRAFT_LENGTH_H_
#define CACHALOT_ENGINE_SCHEDULE_DRAFT_LENGTH_H_

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace cachalot {

// A draft more makes a step longer and brings its token only if those before it were right too. What wins depends on
// the model, the machine, the number of sequences and their context, and changes with what they say: nothing of it is
// assumed, all of it is measured, what steps take from before the first request on (draft_step_times.h).
//
// Steps are alike that decode about as many sequences over about as many keys each. For every kind the least time of
// steps with k drafts is kept current for each k, and for all kinds together the share of drafts at each place that
// were right, of those that had only right ones before them. Next is the k that yields the most tokens a second. A k
// that a kind has no time of is tried at once, for a few steps; the others in turn, again and again, so that none is
// judged by what used to be. A new kind begins with the times of the nearest, and one that was measured beforehand with
// those: scaled by the first that it measures itself, for contexts were shorter then, and the machine was another's.
//
// One thread. Time is what the caller says it is. It chooses how fast tokens come, never which.
class DraftLength {
 public:
  // Steps of a trial; those between two trials of a kind. Together what trials may cost: at most 6 steps in 600.
  static constexpr int kTrialSteps = 6, kStepsBetweenTrials = 600;

  explicit DraftLength(int max_drafts) : max_drafts_(max_drafts), right_(max_drafts) {}

  // For a step that decodes so many sequences over so many keys in all, and has room for so many drafts of each.
  int Next(int num_sequences, int64_t num_keys, int most);
  // What such a step took before any was served.
  void TookBeforehand(int num_sequences, int64_t num_keys, int num_drafts, absl::Duration time);
  // What such a step has taken that verified `num_drafts` a sequence and proposed as many, and did nothing else.
  void Took(int num_sequences, int64_t num_keys, int num_drafts, absl::Duration time);
  // What became of a sequence's drafts.
  void Verified(int num_drafts, int num_accepted);

  // Tokens that a step with so many drafts brings a sequence.
  double TokensOf(int num_drafts) const;

 private:
  struct Time {
    double seconds = 0;  // 0: unknown
    int num_steps = 0;   // that it is of; 0: another kind's, or measured beforehand
  };
  struct Kind {
    std::vector<Time> times;  // by drafts
    int best = 0, trial = -1;
    int num_steps = 0;  // of the trial, or since the last
    int last_trial = 0;
  };
  struct Share {
    double right = 0.8, of = 1;  // a guess that the first drafts outweigh
  };
  using Key = std::pair<int, int>;
  static Key KeyOf(int num_sequences, int64_t num_keys);
  Kind& KindOf(const Key& key);
  double Rate(const Kind& kind, int num_drafts) const;
  int Best(const Kind& kind, int most) const;
  int Untried(const Kind& kind, int most) const;

  const int max_drafts_;
  std::vector<Share> right_;  // by place
  std::map<Key, Kind> kinds_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_DRAFT_LENGTH_H_
