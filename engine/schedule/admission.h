// Admission: who waits, who runs, and who gives way to whom.
#ifndef CACHALOT_ENGINE_SCHEDULE_ADMISSION_H_
#define CACHALOT_ENGINE_SCHEDULE_ADMISSION_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "engine/schedule/block_pool.h"
#include "engine/schedule/sequence.h"

namespace cachalot {

inline int BlocksFor(int num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

// A client's part in the queue.
struct ClientShare {
  int num_running = 0;                                               // and not ended
  std::set<std::tuple<int, absl::Time, RequestId>> waiting;          // by class and order
  std::tuple<int, int, absl::Time, RequestId> turn = {0, 0, {}, 0};  // in Admission's turns, while any wait
};

// One thread: the step thread.
//
// Order. A sequence stands where one would that came kPriorityStep later for each unit of its priority, kLongestDelay
// later at most; a priority below 0 puts it kRaise forward, and does nothing else. So everybody is overtaken for a
// bounded time only, whatever others ask for.
//
// Admission is by turns: now the first of all that wait, in order; now one of the best priority whose client has the
// fewest running. Nobody else is admitted before whose turn it is has a slot, the blocks of its tokens and a spare one
// for each that runs. What the prefix cache has of them is shared and need not be fed.
//
// Of several that could take the second turn it is the one of which the prefix cache has the most, before it is evicted
// and beside others that share it; of kChoices, and no more once kChoiceBlocks of their blocks have been hashed or
// found. The choice stands until it has been admitted, unless somebody comes of a better priority or of a client that
// has fewer running.
//
// Giving way. For want of a slot or blocks, whose turn it is preempts sequences of lower priority that stand behind it;
// failing that, a client that has nothing running and has waited for kPatience preempts sequences of a client that has
// several, and takes its turn at once. Who has been preempted kMaxGivingWay times does not give way any more. When a
// decoding sequence finds no block, one of the lowest priority of the client with the most running is preempted, last
// in order first, but never the first of all that run. Preempted sequences queue where they stood and are recomputed.
//
// No starvation: let F be the first of all, in order. When it runs it is preempted kMaxGivingWay times at most, every
// step has a row for it, and others are preempted for its blocks: it ends. When it waits, one is admitted before its
// turn, whatever the cache has of that one, and one for each that runs and gives way to another client, at most; then
// nobody is until it has room, and those that run end one after the other, the first of them as F would. Time makes
// everybody the first: of those that stand in front of a sequence one leaves with every second admission.
class Admission {
 public:
  static constexpr absl::Duration kPriorityStep = absl::Seconds(10), kLongestDelay = absl::Hours(1);
  static constexpr absl::Duration kRaise = absl::Seconds(2), kPatience = absl::Seconds(1);
  static constexpr int kMaxGivingWay = 2, kChoices = 64, kChoiceBlocks = 1024;

  using Order = std::pair<absl::Time, RequestId>;

  // Why whose turn it is is not admitted; kTurn: one in front of it is preempted and about to queue again.
  enum class Lack { kNothing, kTurn, kSlot, kBlocks };

  // `max_drafts`: tokens beyond a sequence's own that a step may write.
  Admission(int num_slots, int max_drafts, BlockPool* pool);

  void Add(std::unique_ptr<Sequence> sequence);

  // Admits those that there is room for, each with the blocks of its tokens; marks those that give way.
  void Admit(absl::Time now);

  // Blocks for the first `num_tokens` of one that runs. False when there are none: somebody is preempted for it then,
  // or is about to give blocks back.
  bool ReserveBlocks(Sequence* sequence, int num_tokens);

  // Its last delta has been made. One that waited is destroyed; one that runs keeps slot and blocks until ReleaseEnded.
  void End(Sequence* sequence);

  // Takes back slot and blocks of all that ended or were preempted and that no step in flight names; false: of none.
  bool ReleaseEnded();

  void Clear();

  const std::vector<std::unique_ptr<Sequence>>& running() const { return running_; }  // in order
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  uint64_t num_preemptions() const { return num_preemptions_; }
  Lack lack() const { return lack_; }

  static Order OrderOf(const Sequence& s) { return {s.standing, s.id}; }
  // Raising oneself is a matter of order alone.
  static int ClassOf(const Sequence& s) { return std::max(s.priority, 0); }

 private:
  Sequence* Next();
  Sequence* FirstInShare() const;
  Sequence* ChooseInShare() const;
  Lack LackOf(Sequence* next) const;
  int BlocksToAdmit(const Sequence& next) const {
    return BlocksFor(static_cast<int>(next.tokens.size()) + max_drafts_);
  }
  // Blocks in the prefix cache that hold its first tokens. Of BlocksToAdmit, those that are in use cost nothing: what
  // MissingAtLeast says of the rest is exact after FindShared, which finds these.
  std::vector<int32_t> FindPrefix(Sequence* sequence) const;
  std::vector<int32_t> FindShared(Sequence* next) const;
  int64_t MissingAtLeast(const Sequence& next) const {
    return next.num_missing - static_cast<int64_t>(pool_->num_gains() - next.num_gains);
  }
  bool LacksBlocks(Sequence* next) const;
  void TakeBlocks(Sequence* sequence);
  void MakeRoomForShare(absl::Time now);
  bool MakeRoom(Sequence* next, bool by_share);
  static bool GivesWay(const Sequence& sequence, const Sequence& next, int num_leaving, bool by_share);
  void Preempt(Sequence* sequence);
  void PreemptForBlock();

  void Queue(std::unique_ptr<Sequence> sequence);
  std::unique_ptr<Sequence> Unqueue(Sequence* sequence);
  void StopRunning(Sequence* sequence);
  void LeaveTurns(ClientShare* client);
  void TakeTurn(ClientShare* client);

  const int max_drafts_;
  BlockPool* const pool_;
  std::map<Order, std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // NOTE: a step goes over it several times
  std::map<std::string, ClientShare> clients_;      // that have anything waiting or running
  // Of each client that has anything waiting: the class of its best, how many it has running, the order of its best.
  std::set<std::tuple<int, int, absl::Time, RequestId>> turns_;
  std::vector<int> free_slots_;
  bool is_fair_turn_ = false;
  Sequence* chosen_ = nullptr;  // whose fair turn it is; none: to be chosen
  Lack lack_ = Lack::kNothing;
  uint64_t num_preemptions_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_ADMISSION_H_
