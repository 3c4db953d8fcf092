// Admission: the queue's two orders, and what is taken from whom when there is no room.
#include "engine/schedule/admission.h"

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

// Of those that run, by who gives way first: priority, what the client has, order.
bool GivesWayBefore(const Sequence* a, const Sequence* b) {
  const auto rank = [](const Sequence* s) {
    return std::tuple(Admission::ClassOf(*s), s->share->num_running, Admission::OrderOf(*s));
  };
  return rank(a) > rank(b);
}

// What there is for one that waits, once others have left.
class Room {
 public:
  Room(const BlockPool& pool, int num_slots, int num_needed)
      : pool_(pool), num_slots_(num_slots), num_needed_(num_needed), num_blocks_(pool.num_free()) {}

  void Leave(const Sequence& sequence) {
    ++num_slots_;
    for (int32_t block : sequence.blocks) {
      if (--num_users_.try_emplace(block, pool_.num_users(block)).first->second > 0) continue;
      ++num_blocks_;
      shared_.erase(block);
    }
  }
  // Of the blocks needed it has these in common with others: they cost nothing while others use them.
  void Share(const std::vector<int32_t>& blocks) {
    for (int32_t block : blocks) {
      const auto left = num_users_.find(block);
      if (left == num_users_.end() || left->second > 0) shared_.insert(block);
    }
  }
  // A spare block for each that stays.
  bool IsEnough(int num_staying) const {
    return num_slots_ > 0 && num_blocks_ + static_cast<int>(shared_.size()) >= num_needed_ + num_staying;
  }

 private:
  const BlockPool& pool_;
  int num_slots_;
  const int num_needed_;
  int num_blocks_;
  absl::flat_hash_map<int32_t, int> num_users_;  // left, of blocks of those that have left
  absl::flat_hash_set<int32_t> shared_;
};

}  // namespace

Admission::Admission(int num_slots, int max_drafts, BlockPool* pool) : max_drafts_(max_drafts), pool_(pool) {
  for (int slot = num_slots; slot-- > 0;) free_slots_.push_back(slot);
}

// ---- The queue ----

void Admission::Add(std::unique_ptr<Sequence> sequence) {
  const int priority = std::clamp(sequence->priority, -1, static_cast<int>(kLongestDelay / kPriorityStep));
  sequence->standing = sequence->submitted + (priority < 0 ? -kRaise : priority * kPriorityStep);
  Queue(std::move(sequence));
}

void Admission::Queue(std::unique_ptr<Sequence> sequence) {
  ClientShare* client = sequence->share = &clients_[sequence->client];
  sequence->num_missing = 0;
  LeaveTurns(client);
  client->waiting.emplace(ClassOf(*sequence), sequence->standing, sequence->id);
  TakeTurn(client);
  const Order order = OrderOf(*sequence);
  waiting_.emplace(order, std::move(sequence));
}

std::unique_ptr<Sequence> Admission::Unqueue(Sequence* sequence) {
  LeaveTurns(sequence->share);
  sequence->share->waiting.erase({ClassOf(*sequence), sequence->standing, sequence->id});
  TakeTurn(sequence->share);
  return std::move(waiting_.extract(OrderOf(*sequence)).mapped());
}

void Admission::LeaveTurns(ClientShare* client) {
  if (!client->waiting.empty()) turns_.erase(client->turn);
}

void Admission::TakeTurn(ClientShare* client) {
  if (client->waiting.empty()) return;
  const auto& [priority, standing, id] = *client->waiting.begin();
  client->turn = {priority, client->num_running, standing, id};
  turns_.insert(client->turn);
}

Sequence* Admission::FirstInShare() const {
  const auto& [priority, num_running, standing, id] = *turns_.begin();
  return waiting_.at({standing, id}).get();
}

// NOTE: without a slot there is nothing to choose yet, and the cache is not asked at every step.
Sequence* Admission::Next() {
  if (!is_fair_turn_) return waiting_.begin()->second.get();
  Sequence* first = FirstInShare();
  const auto turn = [](const Sequence& s) { return std::pair(ClassOf(s), s.share->num_running); };
  if (chosen_ != nullptr && turn(*chosen_) <= turn(*first)) return chosen_;
  chosen_ = free_slots_.empty() ? nullptr : ChooseInShare();
  return chosen_ != nullptr ? chosen_ : first;
}

// The first of those of which the prefix cache has the most.
Sequence* Admission::ChooseInShare() const {
  const auto& [priority, num_running, first_standing, first_id] = *turns_.begin();
  Sequence* chosen = nullptr;
  size_t most = 0, num_choices = 0, num_blocks = 0;
  for (const auto& [client_priority, client_running, client_standing, client_id] : turns_) {
    if (client_priority != priority || client_running != num_running) break;
    for (const auto& [own_priority, standing, id] : waiting_.at({client_standing, client_id})->share->waiting) {
      if (own_priority != priority) break;
      if (num_choices++ == kChoices || num_blocks > kChoiceBlocks) return chosen;
      Sequence* sequence = waiting_.at({standing, id}).get();
      const size_t num_hashed = sequence->keys.size(), num_cached = FindPrefix(sequence).size();
      num_blocks += sequence->keys.size() - num_hashed + num_cached;
      if (chosen != nullptr && num_cached <= most) continue;
      chosen = sequence;
      most = num_cached;
    }
  }
  return chosen;
}

// ---- Admission ----

void Admission::Admit(absl::Time now) {
  for (lack_ = Lack::kNothing; !waiting_.empty();) {
    Sequence* next = Next();
    lack_ = LackOf(next);
    if (lack_ == Lack::kTurn) return;
    if (lack_ != Lack::kNothing) {
      if (!MakeRoom(next, false)) MakeRoomForShare(now);
      // A preempted sequence that no step in flight names gives way at once.
      if (!ReleaseEnded()) return;
      continue;
    }
    std::unique_ptr<Sequence> admitted = Unqueue(next);
    next->slot = free_slots_.back();
    free_slots_.pop_back();
    TakeBlocks(next);
    LeaveTurns(next->share);
    ++next->share->num_running;
    TakeTurn(next->share);
    const auto stands_before = [](const Order& order, const auto& s) { return order < OrderOf(*s); };
    running_.insert(std::upper_bound(running_.begin(), running_.end(), OrderOf(*next), stands_before),
                    std::move(admitted));
    is_fair_turn_ = !is_fair_turn_;
    chosen_ = nullptr;
  }
}

std::vector<int32_t> Admission::FindPrefix(Sequence* sequence) const {
  pool_->ExtendKeys(sequence->cache_salt, sequence->tokens, &sequence->keys);
  return pool_->Find(sequence->keys, sequence->tokens, 0, sequence->max_cached_blocks());
}

std::vector<int32_t> Admission::FindShared(Sequence* next) const {
  std::vector<int32_t> shared = FindPrefix(next);
  const auto is_idle = [this](int32_t block) { return pool_->num_users(block) == 0; };
  shared.erase(std::remove_if(shared.begin(), shared.end(), is_idle), shared.end());
  next->num_missing = BlocksToAdmit(*next) - static_cast<int>(shared.size());
  next->num_gains = pool_->num_gains();
  return shared;
}

// NOTE: asked at every step while `next` waits, and a long prompt's lookup takes longer than all other scheduling: it
// is looked up again only where enough of its blocks may have come into use since.
bool Admission::LacksBlocks(Sequence* next) const {
  const int num_left = pool_->num_free() - static_cast<int>(running_.size());
  if (num_left >= BlocksToAdmit(*next)) return false;
  if (num_left >= MissingAtLeast(*next)) FindShared(next);
  return num_left < MissingAtLeast(*next);
}

// NOTE: shared ones first, lest they be evicted for the others.
void Admission::TakeBlocks(Sequence* sequence) {
  sequence->blocks = FindPrefix(sequence);
  pool_->Share(sequence->blocks);
  sequence->num_published = static_cast<int>(sequence->blocks.size());
  sequence->published = sequence->blocks.empty() ? BlockPool::kRoot : pool_->serial(sequence->blocks.back());
  sequence->num_fed = sequence->num_published * kBlockTokens;
  CHECK(pool_->Allocate(BlocksToAdmit(*sequence) - sequence->num_published, &sequence->blocks));
}

Admission::Lack Admission::LackOf(Sequence* next) const {
  for (auto it = running_.begin(); !is_fair_turn_ && it != running_.end() && OrderOf(**it) < OrderOf(*next); ++it) {
    if ((*it)->is_preempted) return Lack::kTurn;
  }
  if (free_slots_.empty()) return Lack::kSlot;
  return LacksBlocks(next) ? Lack::kBlocks : Lack::kNothing;
}

void Admission::MakeRoomForShare(absl::Time now) {
  Sequence* next = FirstInShare();
  if (next->share->num_running == 0 && now - next->submitted >= kPatience) MakeRoom(next, true);
}

// Preempts if that lets `next` in, which is given what ended sequences are about to give back too.
bool Admission::MakeRoom(Sequence* next, bool by_share) {
  std::vector<Sequence*> ended, candidates;
  int64_t most = pool_->num_free();  // blocks that there can be
  for (const auto& sequence : running_) {
    // NOTE: this is asked at every step while somebody waits: mostly nobody gives way, and nothing is looked up.
    if (!sequence->is_ended && !GivesWay(*sequence, *next, 0, by_share)) continue;
    (sequence->is_ended ? ended : candidates).push_back(sequence.get());
    most += static_cast<int64_t>(sequence->blocks.size());
  }
  int num_staying = static_cast<int>(running_.size() - ended.size());
  const int num_others = num_staying - static_cast<int>(candidates.size());
  if ((ended.empty() && candidates.empty()) || most < MissingAtLeast(*next) + num_others) return false;

  Room room(*pool_, static_cast<int>(free_slots_.size()), BlocksToAdmit(*next));
  for (const Sequence* sequence : ended) room.Leave(*sequence);
  if (!room.IsEnough(num_staying)) room.Share(FindShared(next));
  std::sort(candidates.begin(), candidates.end(), GivesWayBefore);
  absl::flat_hash_map<const ClientShare*, int> num_leaving;
  std::vector<Sequence*> victims;
  for (auto it = candidates.begin(); it != candidates.end() && !room.IsEnough(num_staying); ++it) {
    if (!GivesWay(**it, *next, num_leaving[(*it)->share], by_share)) continue;
    victims.push_back(*it);
    ++num_leaving[(*it)->share];
    room.Leave(**it);
    --num_staying;
  }
  if (!room.IsEnough(num_staying) || (by_share && victims.empty())) return false;
  for (Sequence* victim : victims) Preempt(victim);
  // Others were preempted for it, whatever the cache has of somebody else.
  is_fair_turn_ |= by_share;
  if (is_fair_turn_ && !victims.empty()) chosen_ = next;
  return true;
}

// `num_leaving`: of the sequence's client, how many are giving way already.
bool Admission::GivesWay(const Sequence& sequence, const Sequence& next, int num_leaving, bool by_share) {
  if (sequence.num_preemptions >= kMaxGivingWay || ClassOf(sequence) < ClassOf(next)) return false;
  if (by_share) return sequence.share->num_running - num_leaving > 1;
  return ClassOf(sequence) > ClassOf(next) && OrderOf(sequence) > OrderOf(next);
}

// ---- Blocks, slots and ends ----

bool Admission::ReserveBlocks(Sequence* sequence, int num_tokens) {
  const int missing = BlocksFor(num_tokens) - static_cast<int>(sequence->blocks.size());
  if (missing <= 0 || pool_->Allocate(missing, &sequence->blocks)) return true;
  PreemptForBlock();
  return false;
}

void Admission::PreemptForBlock() {
  Sequence* victim = nullptr;
  bool is_first = true;
  for (const auto& sequence : running_) {
    if (sequence->is_ended) return;  // its blocks are on their way back: wait for those first
    if (!is_first && (victim == nullptr || GivesWayBefore(sequence.get(), victim))) victim = sequence.get();
    is_first = false;
  }
  CHECK(victim != nullptr, "one sequence alone finds no block");
  Preempt(victim);
}

void Admission::Preempt(Sequence* sequence) {
  StopRunning(sequence);
  sequence->is_ended = sequence->is_preempted = true;
  ++sequence->num_preemptions;
  ++num_preemptions_;
}

void Admission::StopRunning(Sequence* sequence) {
  ClientShare* client = sequence->share;
  LeaveTurns(client);
  --client->num_running;
  TakeTurn(client);
  sequence->share = nullptr;
  if (client->num_running == 0 && client->waiting.empty()) clients_.erase(sequence->client);
}

void Admission::End(Sequence* sequence) {
  if (sequence->slot < 0) {
    ClientShare* client = sequence->share;
    if (sequence == chosen_) chosen_ = nullptr;
    const std::unique_ptr<Sequence> ended = Unqueue(sequence);
    if (client->num_running == 0 && client->waiting.empty()) clients_.erase(sequence->client);
    return;
  }
  if (!sequence->is_ended) StopRunning(sequence);
  sequence->is_ended = true;
  sequence->is_preempted = false;
}

bool Admission::ReleaseEnded() {
  size_t num_left = 0;
  for (std::unique_ptr<Sequence>& sequence : running_) {
    if (!sequence->is_ended || sequence->num_in_flight > 0) {
      running_[num_left++] = std::move(sequence);
      continue;
    }
    pool_->Release(sequence->blocks);
    free_slots_.push_back(sequence->slot);
    if (!sequence->is_preempted) continue;
    if (sequence->is_decoding) sequence->num_ever_fed = std::max(sequence->num_ever_fed, sequence->num_fed);
    sequence->blocks.clear();
    sequence->slot = -1;
    sequence->num_fed = sequence->num_blocks_told = sequence->num_counted = sequence->num_published = 0;
    sequence->is_ended = sequence->is_preempted = sequence->is_decoding = sequence->is_in_slot = false;
    Queue(std::move(sequence));
  }
  const bool has_released = num_left < running_.size();
  running_.resize(num_left);
  return has_released;
}

void Admission::Clear() {
  chosen_ = nullptr;
  turns_.clear();
  clients_.clear();
  waiting_.clear();
  running_.clear();
}

}  // namespace cachalot
