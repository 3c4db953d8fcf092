// FakeDevice: what a device makes of steps, with a made-up model; expects of each that it can be run.
#ifndef CACHALOT_TESTS_ENGINE_FAKE_DEVICE_H_
#define CACHALOT_TESTS_ENGINE_FAKE_DEVICE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/schedule/scheduler.h"

namespace cachalot {

inline constexpr int kFakeVocab = 1000;

// A salt and tokens folded into a number; the fake model's next token is a function of it.
struct Context {
  explicit Context(const std::string& salt = "") {
    for (char c : salt) Append(c);
  }
  uint64_t hash = 1469598103934665603u;
  void Append(int32_t token) { hash = (hash ^ static_cast<uint64_t>(token)) * 1099511628211u; }
  int32_t Next() const { return static_cast<int32_t>(3 + (hash >> 20) % (kFakeVocab - 3)); }
};

// Stands where the device stands: slots, block tables and a cache that remembers what was written, after what. Expects
// rows in order, a block for every position, drafts' included, in the cache what the sequence's tokens leave there,
// whoever fed them, and that penalties have counted every token once. Of its drafts four in five are right.
class FakeDevice {
 public:
  explicit FakeDevice(const SchedulerLimits& limits)
      : max_drafts_(limits.max_drafts),
        max_positions_(limits.max_model_len + DraftSlack(limits.max_drafts)),
        slots_(limits.max_sequences) {}
  StepResult Run(const StepPlan& plan);
  void SetSalt(RequestId id, const std::string& salt) { salts_[id] = salt; }

 private:
  struct Slot {
    SlotParams params;  // seed: the request's id
    std::vector<int32_t> tokens, blocks;
    Context context;
    uint64_t counted = 0;  // a sum over the tokens that penalties count
    int32_t last = -1;
    std::vector<int32_t> drafts;
  };
  struct Written {
    int position = -1;
    int32_t token = -1;
    uint64_t context = 0;  // of all tokens up to this one; 0: a draft's
    friend bool operator==(const Written&, const Written&) = default;
  };
  Context NewContext(const Slot& slot) { return Context(salts_[slot.params.seed]); }
  static uint64_t CountOf(int32_t token, bool is_generated);
  static uint64_t CountOf(const Slot& slot, int position);
  void Write(const Written& written, const Slot& slot);
  void ReadPrefix(int num_tokens, Slot* slot);
  void CheckCounts(const Slot& slot);
  void Feed(int32_t token, Slot* slot);
  std::vector<int32_t> FeedRows(const SequenceStep& step, Slot* slot);
  void Sample(const std::vector<int32_t>& next, bool is_decode, Slot* slot, int32_t* num_accepted);
  void Propose(Slot* slot);
  void CheckCache(const Slot& slot);

  const int max_drafts_, max_positions_;
  int num_proposed_ = 0;  // by the step that runs
  std::vector<Slot> slots_;
  std::map<int32_t, std::vector<Written>> cache_;  // by block
  std::map<RequestId, std::string> salts_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_ENGINE_FAKE_DEVICE_H_
