// SchedulerDriver: turns, and the invariants of every step.
#include "tests/engine/scheduler_driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>
#include <utility>

namespace cachalot {

// ---- Requests ----

RequestId SchedulerDriver::Add(int prompt_length, Options options) {
  std::mt19937 random(static_cast<uint32_t>(next_id_));
  auto sequence = std::make_unique<Sequence>();
  std::mt19937 family_random(static_cast<uint32_t>(1000000 + options.family));
  if (options.continues > 0) {
    const Record& before = records_.at(options.continues);
    sequence->tokens = before.prompt;
    sequence->tokens.insert(sequence->tokens.end(), before.tokens.begin(), before.tokens.end());
    options.salt = before.options.salt;
    prompt_length = std::min(prompt_length + static_cast<int>(sequence->tokens.size()), limits_.max_model_len - 1);
    if (static_cast<int>(sequence->tokens.size()) > prompt_length) sequence->tokens.resize(prompt_length);
    options.num_of_family = 0;
  }
  while (static_cast<int>(sequence->tokens.size()) < std::min(options.num_of_family, prompt_length)) {
    sequence->tokens.push_back(3 + static_cast<int>(family_random() % (kFakeVocab - 3)));
  }
  while (static_cast<int>(sequence->tokens.size()) < prompt_length)
    sequence->tokens.push_back(3 + static_cast<int>(random() % (kFakeVocab - 3)));
  sequence->num_prompt_tokens = prompt_length;
  sequence->priority = options.priority;
  sequence->client = options.client;
  sequence->sampling.max_tokens = options.max_tokens;
  sequence->cache_salt = options.salt;
  sequence->sampling.logprobs = options.num_top;
  if (options.scores) sequence->sampling.prompt_logprobs = std::max(options.num_top, 0);
  if (options.has_penalties) sequence->sampling.repetition_penalty = 1.5f;
  if (options.deadline_turns > 0) sequence->deadline = now_ + absl::Seconds(options.deadline_turns);
  const RequestId id = Add(std::move(sequence));
  records_[id].options = options;
  return id;
}

RequestId SchedulerDriver::Add(std::unique_ptr<Sequence> sequence) {
  const RequestId id = sequence->id = sequence->sampling.seed = next_id_++;
  sequence->submitted = now_;
  Record& r = records_[id];
  r.prompt = sequence->tokens;
  r.options.max_tokens = sequence->sampling.max_tokens;
  r.options.priority = sequence->priority;
  r.submitted = now_;
  r.deadline = sequence->deadline;
  r.context = Context(sequence->cache_salt);
  for (int32_t token : r.prompt) r.context.Append(token);
  device_.SetSalt(id, sequence->cache_salt);
  r.live = sequence.get();
  counts_.prompt_tokens += r.prompt.size();
  scheduler_.Add(std::move(sequence));
  r.order = Admission::OrderOf(*r.live);
  live_.insert(r.order);
  return id;
}

void SchedulerDriver::Cancel(RequestId id) {
  Record& r = records_.at(id);
  if (r.live != nullptr) r.is_cancelled = true;
  Scheduler::Deltas deltas;
  scheduler_.Cancel(id, now_, &deltas);
  EXPECT_EQ(deltas.size(), r.live != nullptr ? 1u : 0u);
  Take(deltas);
}

void SchedulerDriver::Take(const Scheduler::Deltas& deltas) {
  for (const auto& [id, delta] : deltas) {
    Record& r = records_.at(id);
    ASSERT_NE(r.live, nullptr) << "news of request " << id << " after its end";
    for (const TokenLogprob& l : delta.prompt_logprobs) {
      EXPECT_EQ(l.token, r.prompt[++r.num_scored]);
      EXPECT_EQ(static_cast<int>(l.top.size()), std::max(r.options.num_top, 0));
    }
    EXPECT_EQ(delta.logprobs.size(), r.options.num_top < 0 ? 0 : delta.tokens.size());
    for (const TokenLogprob& l : delta.logprobs) EXPECT_EQ(static_cast<int>(l.top.size()), r.options.num_top);
    for (int32_t token : delta.tokens) {
      EXPECT_EQ(token, r.context.Next()) << "request " << id;
      r.tokens.push_back(token);
      r.context.Append(token);
    }
    if (delta.finish_reason != FinishReason::kNone) TakeEnd(id, delta);
  }
}

void SchedulerDriver::TakeEnd(RequestId id, const Delta& delta) {
  Record& r = records_.at(id);
  EXPECT_EQ(delta.times.queued + delta.times.prefill + delta.times.decode, now_ - r.submitted);
  for (absl::Duration d : {delta.times.queued, delta.times.prefill, delta.times.decode}) EXPECT_GE(d, absl::Seconds(0));
  // NOTE: a sequence that waited was freed with its end.
  r.live = nullptr;
  live_.erase(r.order);
  r.reason = delta.finish_reason;
  r.error = delta.error;
  r.times = delta.times;
  r.num_cached_tokens = delta.num_cached_tokens;
  if (r.reason == FinishReason::kCancelled) {
    EXPECT_TRUE(r.is_cancelled);
    ++counts_.cancelled;
    return;
  }
  if (r.reason == FinishReason::kError) {
    EXPECT_EQ(r.error.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_LE(r.deadline, now_);
    ++counts_.expired;
    return;
  }
  EXPECT_FALSE(r.is_cancelled);
  counts_.prompt_tokens_ended += r.prompt.size();
  EXPECT_TRUE(!r.options.scores || r.num_scored + 1 == static_cast<int>(r.prompt.size()));
  if (r.reason == FinishReason::kStop) {
    EXPECT_EQ(delta.stop_token, limits_.eos_token_ids[0]);
    EXPECT_EQ(r.tokens.back(), delta.stop_token);
    return;
  }
  EXPECT_EQ(r.reason, FinishReason::kLength);
  const int room = limits_.max_model_len - static_cast<int>(r.prompt.size());
  EXPECT_EQ(static_cast<int>(r.tokens.size()), std::min(r.options.max_tokens, room));
}

// ---- Turns ----

bool SchedulerDriver::Turn(bool waits_early) {
  now_ += absl::Seconds(1);
  Scheduler::Deltas deltas;
  scheduler_.Expire(now_, &deltas);
  Take(deltas);
  for (const auto& [standing, id] : live_) EXPECT_GT(records_[id].deadline, now_) << "lives past its deadline";

  Before before;
  for (const auto& [standing, id] : live_) {
    const Sequence& s = *records_[id].live;
    before[id] = {s.slot >= 0, s.is_preempted};
  }
  const Waiting first_waiting = FirstWaiting();
  const uint64_t preemptions = stats().preemptions;
  const StepPlan plan = last_plan_ = scheduler_.Plan(now_);
  CheckAdmissions(before, first_waiting, stats().preemptions - preemptions);
  if (!plan.empty()) {
    CheckShape(plan);
    CheckOwnership(plan);
    CheckSharing();
    counts_.counted += plan.counted_tokens.size();
    in_flight_.back().result = device_.Run(plan);
    Serve(plan);
    CheckRows(plan, pool_.num_free() > 0 && stats().preemptions == preemptions);
    CheckWaits(before);
  }
  if (in_flight_.size() < (waits_early ? 1 : kMaxStepsInFlight) && !plan.empty()) return true;
  if (in_flight_.empty()) return false;
  deltas.clear();
  scheduler_.Commit(in_flight_.front().result, now_, &deltas);
  in_flight_.pop_front();
  Take(deltas);
  return true;
}

void SchedulerDriver::Drain(int max_turns) {
  while (Turn()) ASSERT_GT(max_turns--, 0) << "no end in sight: livelock";
  for (const auto& [id, r] : records_) EXPECT_NE(r.reason, FinishReason::kNone) << "request " << id << " starved";
  const EngineStats stats = scheduler_.stats();
  EXPECT_EQ(stats.blocks_used, 0) << "leaked blocks";
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.waiting_for_blocks + stats.waiting_for_slots, 0);
  EXPECT_EQ(stats.steps, stats.step_rows.count);
  EXPECT_LE(stats.prompt_tokens, counts_.prompt_tokens) << "a prompt was counted twice";
  EXPECT_GE(stats.prompt_tokens, counts_.prompt_tokens_ended);
  size_t generated = 0;
  for (const auto& [id, r] : records_) generated += r.tokens.size();
  EXPECT_EQ(stats.generated_tokens, generated);
}

std::map<RequestId, int> SchedulerDriver::LastRows() const {
  std::map<RequestId, int> rows;
  for (const auto& [id, r] : records_) {
    if (r.rows > 0) rows[id] = r.rows;
  }
  return rows;
}

void SchedulerDriver::Serve(const StepPlan& plan) {
  std::map<int, int> rows;  // by slot
  for (const SequenceStep& s : plan.sequences) rows[s.slot] = s.num_rows;
  for (auto& [id, r] : records_) r.rows = 0;
  for (const auto& [standing, id] : live_) {
    Record& r = records_[id];
    auto it = rows.find(r.live->slot);
    if (it == rows.end()) continue;
    r.rows = it->second;
    rows.erase(it);
  }
  EXPECT_TRUE(rows.empty()) << "rows for a sequence that has ended";
}

// ---- Invariants ----

bool SchedulerDriver::WantsRows(const Sequence& s) const {
  if (s.is_ended) return false;
  if (!s.is_decoding) return s.num_unfed() > 0;
  const int num_coming = s.num_generated() + s.num_sampling;
  return num_coming < std::min(s.sampling.max_tokens, limits_.max_model_len - s.num_prompt_tokens);
}

void SchedulerDriver::CheckShape(const StepPlan& plan) const {
  EXPECT_LE(plan.num_rows, limits_.max_batch_tokens);
  const auto scores = [](const LogitsRow& row) { return row.target >= 0; };
  EXPECT_TRUE(std::is_partitioned(plan.logits_rows.rbegin(), plan.logits_rows.rend(), scores));
  std::set<int> slots;
  int rows = 0;
  for (const SequenceStep& s : plan.sequences) {
    EXPECT_TRUE(slots.insert(s.slot).second) << "slot twice in one step";
    EXPECT_GT(s.num_rows, 0);
    EXPECT_EQ(s.token_biases.size(), s.params.num_banned + s.params.num_biased);
    EXPECT_TRUE(s.start >= 0 || s.num_rows <= 1 + limits_.max_drafts) << "more drafts than there are";
    rows += s.num_rows;
  }
  EXPECT_EQ(rows, plan.num_rows);
}

// Slots are one sequence's each, and those that a step in flight names nobody else's; so are blocks to be written to.
void SchedulerDriver::CheckOwnership(const StepPlan& plan) {
  std::map<int, const Sequence*> by_slot;
  std::set<int32_t> blocks;
  for (const auto& [standing, id] : live_) {
    const Sequence& s = *records_[id].live;
    EXPECT_TRUE(s.slot < 0 || by_slot.emplace(s.slot, &s).second) << "a slot of two sequences";
    blocks.insert(s.blocks.begin(), s.blocks.end());
  }
  EXPECT_LE(static_cast<int>(blocks.size()), pool_.num_used()) << "a block that is in use is free";
  InFlight step;
  std::map<int, int> last_rows;
  for (const SequenceStep& s : plan.sequences) {
    last_rows[s.slot] = s.num_rows;
    const auto it = by_slot.find(s.slot);
    EXPECT_NE(it, by_slot.end()) << "a row of nobody";
    if (it == by_slot.end()) continue;
    step.slots.insert(s.slot);
    const Sequence& sequence = *it->second;
    const int num_written =
        s.start < 0 || sequence.is_decoding ? static_cast<int>(sequence.blocks.size()) : BlocksFor(sequence.num_fed);
    step.blocks.insert(sequence.blocks.begin(), sequence.blocks.begin() + num_written);
    for (const InFlight& earlier : in_flight_) {
      EXPECT_FALSE(s.params.apply != 0 && earlier.slots.count(s.slot)) << "a slot was freed too early";
    }
  }
  for (const BlockUpdate& u : plan.block_updates) {
    const Sequence* s = by_slot[u.slot];
    if (s == nullptr || u.index < BlocksFor(s->num_fed - last_rows[u.slot])) continue;  // read only
    for (const InFlight& earlier : in_flight_) EXPECT_FALSE(earlier.blocks.count(u.block)) << "freed too early";
  }
  in_flight_.push_back(std::move(step));
}

// A block of several sequences is the same part of the same beginning, of one salt, and none of them will write to it.
void SchedulerDriver::CheckSharing() {
  std::map<int32_t, std::vector<std::pair<const Sequence*, int>>> users;  // by block: who, and where
  for (const auto& [standing, id] : live_) {
    const Sequence& s = *records_[id].live;
    for (int i = 0; i < static_cast<int>(s.blocks.size()); ++i) users[s.blocks[i]].emplace_back(&s, i);
  }
  for (const auto& [block, of] : users) {
    EXPECT_LE(static_cast<int>(of.size()), pool_.num_users(block));
    counts_.shared += of.size() - 1;
    const auto [first, index] = of.front();
    const int end = (index + 1) * kBlockTokens;
    for (size_t i = 1; i < of.size(); ++i) {
      const auto [s, at] = of[i];
      ASSERT_TRUE(at == index && s->cache_salt == first->cache_salt);
      ASSERT_TRUE(s->num_fed >= end && first->num_fed >= end) << "a shared block is not full";
      ASSERT_TRUE(std::equal(s->tokens.begin(), s->tokens.begin() + end, first->tokens.begin()));
    }
  }
}

SchedulerDriver::Waiting SchedulerDriver::FirstWaiting() const {
  for (const auto& [standing, id] : live_) {
    const Sequence& s = *records_.at(id).live;
    if (s.slot < 0) return {id, s.num_preemptions};
  }
  return {};
}

// The first that waits is overtaken once, and once for each that gives way to another client; no more run than a step
// has rows; the first of all is safe in time.
void SchedulerDriver::CheckAdmissions(const Before& before, Waiting first, uint64_t num_preempted) {
  int num_admitted = 0, num_running = 0;  // admitted: that stand behind the first that waited
  bool is_behind = false;
  std::set<std::pair<std::string, int>> waiting;  // by client and priority
  for (const auto& [standing, id] : live_) {
    const Sequence& s = *records_[id].live;
    const bool is_admitted = s.slot >= 0 && !before.at(id).has_slot;
    num_running += s.slot >= 0 && !s.is_ended ? 1 : 0;
    num_admitted += is_behind && is_admitted ? 1 : 0;
    is_behind |= id == first.id;
    const std::pair<std::string, int> alike = {s.client, Admission::ClassOf(s)};
    if (s.slot < 0 && !before.at(id).has_slot) waiting.insert(alike);
    counts_.preferred += is_admitted && waiting.count(alike) > 0 ? 1 : 0;
    const bool is_new_victim = s.is_preempted && !before.at(id).was_preempted;
    const bool is_first = id == live_.begin()->second;
    EXPECT_FALSE(is_first && is_new_victim && s.num_preemptions > Admission::kMaxGivingWay);
  }
  EXPECT_LE(num_running, std::min(limits_.max_batch_tokens, limits_.max_sequences));
  // NOTE: not one that was admitted and preempted in between.
  const bool still_waits = first.id != 0 && first == FirstWaiting();
  num_overtakers_ = still_waits ? num_overtakers_ + num_admitted : 0;
  num_giving_way_ = still_waits ? num_giving_way_ + num_preempted : 0;
  EXPECT_LE(num_overtakers_, 1 + num_giving_way_) << "request " << first.id << " is overtaken again and again";
  counts_.overtakes += still_waits ? num_admitted : 0;
}

// Decoding first; half of the rest to the first prompt, the other half by priority and turn. `had_blocks`: no sequence
// was left out for want of one.
void SchedulerDriver::CheckRows(const StepPlan& plan, bool had_blocks) {
  std::map<int, const SequenceStep*> steps;  // by slot
  int num_left = limits_.max_batch_tokens;
  for (const SequenceStep& s : plan.sequences) {
    steps[s.slot] = &s;
    num_left -= s.start < 0 ? s.num_rows : 0;
  }
  struct Prompt {
    int priority, num_unfed;  // before the step
    RequestId id;
    int rows;
    std::string client;
    bool may_wait;  // for what another computes, or for its penalties' turn
    int turn = 0;
  };
  std::vector<Prompt> prompts;
  for (const auto& [standing, id] : live_) {
    const Record& r = records_[id];
    const Sequence& s = *r.live;
    if (s.slot < 0 || s.is_ended) continue;
    const auto it = steps.find(s.slot);
    const bool is_chunk = it != steps.end() && it->second->start >= 0;
    if (is_chunk || (it == steps.end() && !s.is_decoding && s.num_unfed() > 0)) {
      const bool follows = r.rows == 0 && Follows(s);
      counts_.followed += follows ? 1 : 0;
      const bool may_wait = follows || (s.has_penalties() && !plan.counted_tokens.empty());
      prompts.push_back({std::max(s.priority, 0), s.num_unfed() + r.rows, id, r.rows, s.client, may_wait});
    } else if (it == steps.end()) {
      EXPECT_FALSE(had_blocks && WantsRows(s)) << "decodes without a row";
    }
  }
  if (prompts.empty()) return;
  EXPECT_GE(prompts[0].rows, std::min(prompts[0].num_unfed, (num_left + 1) / 2)) << "less than half for the first";
  prompts.erase(prompts.begin());
  std::sort(prompts.begin(), prompts.end(), [](const Prompt& a, const Prompt& b) {
    return std::tuple(a.priority, a.num_unfed, a.id) < std::tuple(b.priority, b.num_unfed, b.id);
  });
  std::map<std::string, int> turns;
  for (Prompt& prompt : prompts) prompt.turn = turns[prompt.client]++;
  for (const Prompt& a : prompts) {
    for (const Prompt& b : prompts) {
      const bool is_before = std::pair(a.priority, a.turn) < std::pair(b.priority, b.turn);
      EXPECT_FALSE(is_before && a.rows < a.num_unfed && b.rows > 0 && !(a.rows == 0 && a.may_wait)) << "out of turn";
    }
  }
}

// Whether another prompt is at the same block, of the same beginning.
bool SchedulerDriver::Follows(const Sequence& s) {
  const int index = s.num_fed / kBlockTokens, end = (s.num_fed / kBlockTokens + 1) * kBlockTokens;
  if (s.num_fed % kBlockTokens != 0 || end >= static_cast<int>(s.tokens.size())) return false;
  for (const auto& [standing, id] : live_) {
    const Record& r = records_[id];
    const Sequence& other = *r.live;
    if (&other == &s || other.slot < 0 || other.cache_salt != s.cache_salt) continue;
    if (static_cast<int>(other.tokens.size()) < end || (other.num_fed - r.rows) / kBlockTokens != index) continue;
    if (std::equal(s.tokens.begin(), s.tokens.begin() + end, other.tokens.begin())) return true;
  }
  return false;
}

// Steps without a row, of those that run and of the first of all.
void SchedulerDriver::CheckWaits(const Before& before) {
  for (const auto& [standing, id] : live_) {
    Record& r = records_[id];
    const bool is_first = id == live_.begin()->second;
    const bool wants = is_first || (before.at(id).has_slot && WantsRows(*r.live));
    r.num_unserved = wants && r.rows == 0 ? r.num_unserved + 1 : 0;
    const bool is_decoding = r.live->is_decoding;
    int& longest = is_first      ? counts_.longest_first_wait
                   : is_decoding ? counts_.longest_decode_wait
                                 : counts_.longest_prompt_wait;
    longest = std::max(longest, r.num_unserved);
    const int bound = is_decoding ? 4 * limits_.max_sequences : 2 * limits_.max_sequences * limits_.max_model_len;
    EXPECT_LE(r.num_unserved, bound) << (is_first ? "the first starves" : "a sequence starves");
  }
}

}  // namespace cachalot
