// Scheduler: plans steps ahead of their results, and commits results in order.
#include "engine/schedule/scheduler.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

int BlocksFor(int num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

SlotParams MakeSlotParams(const Sequence& sequence) {
  const SamplingParams& s = sequence.sampling;
  SlotParams params;
  params.apply = 1;
  params.prompt_tokens = sequence.num_prompt_tokens;
  params.temperature = s.temperature;
  params.top_k = s.top_k;
  params.top_p = s.top_p;
  params.min_p = s.min_p;
  params.presence_penalty = s.presence_penalty;
  params.frequency_penalty = s.frequency_penalty;
  params.repetition_penalty = s.repetition_penalty;
  params.min_tokens = s.min_tokens;
  params.num_banned = static_cast<uint16_t>(sequence.num_banned);
  params.num_biased = static_cast<uint16_t>(sequence.token_biases.size() - sequence.num_banned);
  params.choice = s.choice;
  params.seed = s.seed;
  return params;
}

// The result of one logits row as the request asked for it: `num_top` alternatives.
TokenLogprob MakeLogprob(const StepResult& result, size_t row, int num_top) {
  TokenLogprob logprob{result.tokens[row], result.logprobs[row], {}};
  for (int i = 0; i < num_top; ++i) {
    const size_t at = row * kMaxTopLogprobs + i;
    if (result.top_tokens[at] >= 0) logprob.top.emplace_back(result.top_tokens[at], result.top_logprobs[at]);
  }
  return logprob;
}

// What banned and biased tokens the slot is told of: banned ones first.
void MakeTokenBiases(Sequence* sequence) {
  const SamplingParams& s = sequence->sampling;
  if (s.min_tokens > 0) {
    for (int32_t token : sequence->end_tokens) sequence->token_biases.push_back({token, 0.0f});
  }
  sequence->num_banned = static_cast<int>(sequence->token_biases.size());
  for (const auto& [token, bias] : s.logit_bias) sequence->token_biases.push_back({token, bias});
  CHECK(sequence->token_biases.size() <= kMaxTokenBiases);
}

// NOTE: the clock may have been set back in between.
absl::Duration Since(absl::Time begin, absl::Time end) { return std::max(end - begin, absl::ZeroDuration()); }

RequestTimes MakeTimes(const Sequence& s, absl::Time end) {
  const absl::Time first_step = std::min(s.first_step, end), first_token = std::min(s.first_token, end);
  return {Since(s.submitted, first_step), Since(first_step, first_token), Since(first_token, end), s.num_preemptions};
}

absl::Status DeadlineError(const Sequence& s) {
  if (s.first_step == absl::InfiniteFuture()) {
    return absl::DeadlineExceededError("the deadline passed before the request had its turn");
  }
  return absl::DeadlineExceededError(
      absl::StrCat("the deadline passed after ", s.num_generated(), " of at most ", s.sampling.max_tokens, " tokens"));
}

}  // namespace

Scheduler::Scheduler(SchedulerLimits limits, BlockPool* pool) : limits_(std::move(limits)), pool_(pool) {
  CHECK(limits_.max_logits_rows > limits_.max_sequences, "a prompt must be able to score beside full decoding");
  CHECK(BlocksFor(limits_.max_model_len) <= pool->num_blocks(), "one sequence must fit the pool");
  for (int slot = limits_.max_sequences; slot-- > 0;) free_slots_.push_back(slot);
}

void Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  sequence->end_tokens = EndTokens(sequence->sampling, limits_.eos_token_ids);
  MakeTokenBiases(sequence.get());
  by_id_[sequence->id] = sequence.get();
  if (sequence->deadline < absl::InfiniteFuture()) deadlines_.emplace(sequence->deadline, sequence->id);
  const Order order = OrderOf(*sequence);
  waiting_.emplace(order, std::move(sequence));
}

void Scheduler::Cancel(RequestId id, absl::Time now, Deltas* deltas) {
  auto it = by_id_.find(id);
  if (it == by_id_.end() || it->second->is_over()) return;
  EndEarly(it->second, FinishReason::kCancelled, absl::OkStatus(), now, deltas);
}

void Scheduler::Expire(absl::Time now, Deltas* deltas) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    Sequence* sequence = by_id_.at(deadlines_.begin()->second);
    EndEarly(sequence, FinishReason::kError, DeadlineError(*sequence), now, deltas);
  }
}

// ---- Planning ----

StepPlan Scheduler::Plan(absl::Time now) {
  NewStep next;
  next.now = now;
  do {
    Admit();
    PlanRows(&next);
  } while (ReleaseEnded() && next.plan.empty());
  if (next.plan.empty()) {
    CHECK(!in_flight_.empty() || by_id_.empty(), "{} sequences, and none can run", by_id_.size());
    return next.plan;
  }
  next.plan.step = next.record.step = next_step_++;
  next.record.rows = next.plan.logits_rows;
  counters_.step_rows.Add(next.plan.num_rows);
  in_flight_.push_back(std::move(next.record));
  return std::move(next.plan);
}

void Scheduler::Admit() {
  for (lack_ = Lack::kNothing; !waiting_.empty();) {
    auto first = waiting_.begin();
    Sequence* sequence = first->second.get();
    lack_ = LackOf(*sequence);
    if (lack_ == Lack::kSlot || lack_ == Lack::kBlocks) {
      MakeRoom(*sequence);
      // A preempted sequence that no step in flight names gives way at once.
      if (!ReleaseEnded()) return;
      continue;
    }
    if (lack_ != Lack::kNothing) return;
    sequence->slot = free_slots_.back();
    free_slots_.pop_back();
    CHECK(ReserveBlocks(sequence, static_cast<int>(sequence->tokens.size())));
    running_.insert(waiting_.extract(first));
  }
}

Scheduler::Lack Scheduler::LackOf(const Sequence& waiting) const {
  int num_ahead = 0;
  for (const auto& [order, sequence] : running_) {
    if (order.first > waiting.priority) break;
    if (sequence->is_preempted && order < OrderOf(waiting)) return Lack::kTurn;
    num_ahead += sequence->is_ended ? 0 : 1;
  }
  if (num_ahead >= limits_.max_batch_tokens) return Lack::kRows;
  if (free_slots_.empty()) return Lack::kSlot;
  // A spare block for each running sequence, lest the newcomer be preempted at once.
  const int needed = BlocksFor(static_cast<int>(waiting.tokens.size())) + static_cast<int>(running_.size());
  return pool_->num_free() < needed ? Lack::kBlocks : Lack::kNothing;
}

// Preempts sequences of strictly lower priority, last first, if that lets `waiting` in; what ended sequences are about
// to give back counts.
void Scheduler::MakeRoom(const Sequence& waiting) {
  size_t num_slots = free_slots_.size();
  int num_blocks = pool_->num_free(), num_staying = 0;
  const auto gives_back = [&](const Sequence& sequence) {
    ++num_slots;
    num_blocks += static_cast<int>(sequence.blocks.size());
  };
  for (const auto& [order, sequence] : running_) {
    if (sequence->is_ended) gives_back(*sequence);
    num_staying += sequence->is_ended ? 0 : 1;
  }
  const int needed = BlocksFor(static_cast<int>(waiting.tokens.size()));
  std::vector<Sequence*> victims;
  for (auto it = running_.rbegin(); num_slots == 0 || num_blocks < needed + num_staying; ++it) {
    if (it == running_.rend() || it->first.first <= waiting.priority) return;
    if (it->second->is_ended) continue;
    victims.push_back(it->second.get());
    gives_back(*it->second);
    --num_staying;
  }
  for (Sequence* victim : victims) Preempt(victim);
}

void Scheduler::PlanRows(NewStep* next) {
  std::vector<Sequence*> sequences;
  for (auto it = running_.begin(); it != running_.end() && RowsLeft(*next) > 0;) {
    const int priority = it->first.first;
    sequences.clear();
    for (; it != running_.end() && it->first.first == priority; ++it) {
      if (WantsRows(*it->second)) sequences.push_back(it->second.get());
    }
    PlanPriority(&sequences, next);
  }
}

bool Scheduler::WantsRows(const Sequence& sequence) const {
  if (sequence.is_ended) return false;
  if (!sequence.is_decoding) return sequence.num_unfed() > 0;
  // Nothing more to sample once the tokens under way reach a limit.
  const int num_coming = sequence.num_generated() + sequence.num_sampling;
  return num_coming < sequence.sampling.max_tokens && sequence.num_prompt_tokens + num_coming < limits_.max_model_len;
}

// The sequences of one priority that want rows, by arrival.
void Scheduler::PlanPriority(std::vector<Sequence*>* sequences, NewStep* next) {
  const size_t num_rows = RowsLeft(*next);
  if (sequences->size() > num_rows) {
    std::sort(sequences->begin(), sequences->end(),
              [](const Sequence* a, const Sequence* b) { return a->last_served < b->last_served; });
    sequences->resize(num_rows);
  }
  std::vector<Sequence*> prompts;
  for (Sequence* sequence : *sequences) {
    if (!sequence->is_decoding) {
      prompts.push_back(sequence);
    } else if (!sequence->is_ended) {
      PlanDecode(sequence, next);
    }
  }
  PlanPrompts(&prompts, next);
}

void Scheduler::PlanDecode(Sequence* sequence, NewStep* next) {
  if (!ReserveBlocks(sequence, sequence->num_fed + 1)) {
    PreemptLast();
    return;
  }
  SequenceStep step;
  step.num_rows = 1;
  AddRows(sequence, step, next);
}

void Scheduler::PlanPrompts(std::vector<Sequence*>* prompts, NewStep* next) {
  // NOTE: decoding may just have preempted one.
  prompts->erase(std::remove_if(prompts->begin(), prompts->end(), [](const Sequence* s) { return s->is_ended; }),
                 prompts->end());
  if (prompts->empty()) return;
  std::iter_swap(prompts->begin(),
                 std::min_element(prompts->begin(), prompts->end(),
                                  [](const Sequence* a, const Sequence* b) { return a->id < b->id; }));
  std::sort(prompts->begin() + 1, prompts->end(), [](const Sequence* a, const Sequence* b) {
    return std::pair(a->num_unfed(), a->id) < std::pair(b->num_unfed(), b->id);
  });
  const int num_rows = RowsLeft(*next);
  int num_others = 0;  // rows that the others can use
  for (size_t i = 1; i < prompts->size(); ++i) num_others = std::min(num_others + (*prompts)[i]->num_unfed(), num_rows);
  PlanChunk(prompts->front(), std::max((num_rows + 1) / 2, num_rows - num_others), next);
  for (size_t i = 1; i < prompts->size(); ++i) PlanChunk((*prompts)[i], RowsLeft(*next), next);
}

void Scheduler::PlanChunk(Sequence* sequence, int max_rows, NewStep* next) {
  int num_rows = std::min(sequence->num_unfed(), max_rows);
  // Each scored row takes a row of logits; one is kept for what every running sequence may sample.
  if (sequence->scores_prompt()) {
    num_rows = std::min(num_rows, limits_.max_logits_rows - static_cast<int>(running_.size()) - next->num_scored);
  }
  if (num_rows <= 0) return;
  SequenceStep step;
  step.start = sequence->num_fed;
  step.num_rows = num_rows;
  step.tokens = absl::MakeConstSpan(sequence->tokens).subspan(step.start, num_rows);
  if (!sequence->is_in_slot) {
    step.params = MakeSlotParams(*sequence);
    step.token_biases = sequence->token_biases;
    sequence->is_in_slot = true;
  }
  const int num_new = std::max(step.start + num_rows - sequence->num_ever_fed, 0);
  const int num_new_prompt = std::min(num_new, std::max(sequence->num_prompt_tokens - sequence->num_ever_fed, 0));
  counters_.recomputed_tokens += num_rows - num_new;
  counters_.prompt_tokens += num_new_prompt;
  AddRows(sequence, step, next);
}

void Scheduler::AddRows(Sequence* sequence, SequenceStep step, NewStep* next) {
  StepPlan* plan = &next->plan;
  const int32_t index = static_cast<int32_t>(plan->sequences.size());
  step.slot = sequence->slot;
  for (int& i = sequence->num_blocks_told; i < static_cast<int>(sequence->blocks.size()); ++i) {
    plan->block_updates.push_back({step.slot, i, sequence->blocks[i]});
  }
  // Prompt log-probabilities: the row of token p scores token p + 1.
  if (sequence->scores_prompt() && step.start >= 0) {
    for (int p = step.start; p < step.start + step.num_rows && p + 1 < sequence->num_prompt_tokens; ++p) {
      if (p < sequence->num_prompt_scored) continue;
      plan->logits_rows.push_back({plan->num_rows + p - step.start, index, sequence->tokens[p + 1]});
      sequence->num_prompt_scored = p + 1;
      ++next->num_scored;
    }
  }
  sequence->num_fed += step.num_rows;
  sequence->num_ever_fed = std::max(sequence->num_ever_fed, sequence->num_fed);
  const bool is_last = step.start < 0 || sequence->num_unfed() == 0;
  if (is_last && sequence->num_generated() + sequence->num_sampling < sequence->sampling.max_tokens) {
    plan->logits_rows.push_back({plan->num_rows + step.num_rows - 1, index, -1});
    sequence->is_decoding = true;
    ++sequence->num_sampling;
  }
  ++sequence->num_in_flight;
  sequence->last_served = ++num_served_;
  sequence->first_step = std::min(sequence->first_step, next->now);
  plan->num_rows += step.num_rows;
  plan->sequences.push_back(step);
  next->record.sequences.push_back(sequence);
}

// ---- Blocks and slots ----

bool Scheduler::ReserveBlocks(Sequence* sequence, int num_tokens) {
  const int missing = BlocksFor(num_tokens) - static_cast<int>(sequence->blocks.size());
  return missing <= 0 || pool_->Allocate(missing, &sequence->blocks);
}

void Scheduler::Preempt(Sequence* sequence) {
  sequence->is_ended = sequence->is_preempted = true;
  ++sequence->num_preemptions;
  ++counters_.preemptions;
}

void Scheduler::PreemptLast() {
  // Blocks of ended sequences are on their way back: wait for those first.
  for (const auto& [order, sequence] : running_) {
    if (sequence->is_ended) return;
  }
  Preempt(running_.rbegin()->second.get());
}

bool Scheduler::ReleaseEnded() {
  bool released = false;
  for (auto it = running_.begin(); it != running_.end();) {
    Sequence* sequence = it->second.get();
    if (!sequence->is_ended || sequence->num_in_flight > 0) {
      ++it;
      continue;
    }
    released = true;
    pool_->Release(sequence->blocks);
    free_slots_.push_back(sequence->slot);
    auto node = running_.extract(it++);
    if (!sequence->is_preempted) {
      by_id_.erase(sequence->id);
      continue;
    }
    sequence->blocks.clear();
    sequence->slot = -1;
    sequence->num_fed = sequence->num_blocks_told = 0;
    sequence->is_ended = sequence->is_preempted = sequence->is_decoding = sequence->is_in_slot = false;
    waiting_.insert(std::move(node));
  }
  return released;
}

// ---- Results and ends ----

void Scheduler::Commit(const StepResult& result, absl::Time now, Deltas* deltas) {
  CHECK(!in_flight_.empty() && in_flight_.front().step == result.step, "step {} out of order", result.step);
  const InFlight record = std::move(in_flight_.front());
  in_flight_.pop_front();
  size_t row = 0;
  for (size_t s = 0; s < record.sequences.size(); ++s) {
    Sequence* sequence = record.sequences[s];
    size_t end = row;
    while (end < record.rows.size() && record.rows[end].sequence == static_cast<int32_t>(s)) ++end;
    --sequence->num_in_flight;
    Delta delta;
    // A preempted sequence keeps what steps in flight still bring; one that is over drops it.
    if (!sequence->is_over()) CommitRows(result, record, row, end, result.num_accepted[s], now, sequence, &delta);
    if (!delta.tokens.empty() || !delta.prompt_logprobs.empty() || delta.finish_reason != FinishReason::kNone) {
      deltas->emplace_back(sequence->id, std::move(delta));
    }
    row = end;
  }
  ReleaseEnded();
}

void Scheduler::CommitRows(const StepResult& result, const InFlight& record, size_t row, size_t end, int num_accepted,
                           absl::Time now, Sequence* sequence, Delta* delta) {
  const SamplingParams& sampling = sequence->sampling;
  for (; row < end && record.rows[row].target >= 0; ++row) {
    delta->prompt_logprobs.push_back(MakeLogprob(result, row, sampling.prompt_logprobs));
  }
  FinishReason reason = FinishReason::kNone;
  if (row < end) {
    CHECK(num_accepted >= 1 && row + num_accepted <= end, "{} tokens of {} rows", num_accepted, end - row);
    --sequence->num_sampling;
    sequence->first_token = std::min(sequence->first_token, now);
  }
  for (int i = 0; row < end && i < num_accepted && reason == FinishReason::kNone; ++i) {
    reason = AppendToken(sequence, result.tokens[row + i], delta);
    if (sampling.logprobs >= 0) delta->logprobs.push_back(MakeLogprob(result, row + i, sampling.logprobs));
  }
  // A request for scores alone ends with its last prompt token.
  const bool is_scored = sampling.max_tokens == 0 && sequence->num_fed == sequence->num_prompt_tokens;
  if (is_scored && sequence->num_in_flight == 0) reason = FinishReason::kLength;
  if (reason != FinishReason::kNone) End(sequence, reason, now, delta);
}

FinishReason Scheduler::AppendToken(Sequence* sequence, int32_t token, Delta* delta) {
  sequence->tokens.push_back(token);
  delta->tokens.push_back(token);
  ++counters_.generated_tokens;
  if (std::binary_search(sequence->end_tokens.begin(), sequence->end_tokens.end(), token)) {
    delta->stop_token = token;
    return FinishReason::kStop;
  }
  const bool is_full = sequence->num_generated() >= sequence->sampling.max_tokens ||
                       static_cast<int>(sequence->tokens.size()) >= limits_.max_model_len;
  return is_full ? FinishReason::kLength : FinishReason::kNone;
}

void Scheduler::End(Sequence* sequence, FinishReason reason, absl::Time now, Delta* delta) {
  delta->finish_reason = reason;
  delta->times = MakeTimes(*sequence, now);
  deadlines_.erase({sequence->deadline, sequence->id});
  sequence->is_ended = true;
  sequence->is_preempted = false;
}

void Scheduler::EndEarly(Sequence* sequence, FinishReason reason, const absl::Status& error, absl::Time now,
                         Deltas* deltas) {
  Delta delta;
  delta.error = error;
  End(sequence, reason, now, &delta);
  deltas->emplace_back(sequence->id, std::move(delta));
  if (sequence->slot >= 0) {
    ReleaseEnded();
    return;
  }
  by_id_.erase(sequence->id);
  waiting_.erase(OrderOf(*sequence));
}

void Scheduler::Fail(const absl::Status& status, absl::Time now, Deltas* deltas) {
  for (const auto& [id, sequence] : by_id_) {
    if (sequence->is_over()) continue;
    Delta delta;
    delta.error = status;
    End(sequence, FinishReason::kError, now, &delta);
    deltas->emplace_back(id, std::move(delta));
  }
  by_id_.clear();
  waiting_.clear();
  running_.clear();
  in_flight_.clear();
}

EngineStats Scheduler::stats() const {
  EngineStats stats = counters_;
  stats.steps = counters_.step_rows.count;
  stats.running = static_cast<int>(running_.size());
  stats.waiting = static_cast<int>(waiting_.size());
  stats.waiting_for_slots = lack_ == Lack::kSlot || lack_ == Lack::kRows ? stats.waiting : 0;
  stats.waiting_for_blocks = lack_ == Lack::kBlocks || lack_ == Lack::kTurn ? stats.waiting : 0;
  stats.blocks_total = pool_->num_blocks();
  stats.blocks_used = pool_->num_used();
  return stats;
}

}  // namespace cachalot
