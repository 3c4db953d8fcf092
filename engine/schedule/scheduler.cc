// Scheduler: plans steps ahead of their results, and commits results in order.
#include "engine/schedule/scheduler.h"

#include <algorithm>
#include <tuple>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

SlotParams MakeSlotParams(const Sequence& sequence) {
  const SamplingParams& s = sequence.sampling;
  SlotParams params;
  params.apply = 1;
  params.prompt_tokens = sequence.num_prompt_tokens;
  params.temperature = s.temperature < kLeastTemperature ? 0.0f : s.temperature;
  params.top_k = s.top_k;
  params.top_p = s.top_p;
  params.min_p = s.min_p;
  params.presence_penalty = s.presence_penalty;
  params.frequency_penalty = s.frequency_penalty;
  params.repetition_penalty = std::clamp(s.repetition_penalty, 1 / kMostRepetitionPenalty, kMostRepetitionPenalty);
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
  CHECK(num_top <= 0 || !result.top_tokens.empty(), "alternatives that the step's plan did not want");
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

// By priority, then the first of every client, the second of every client and so on, each by the fewest tokens left.
void SortByTurns(std::vector<Sequence*>::iterator begin, std::vector<Sequence*>::iterator end) {
  std::sort(begin, end, [](const Sequence* a, const Sequence* b) {
    const int a_class = Admission::ClassOf(*a), b_class = Admission::ClassOf(*b);
    return std::tuple(a_class, a->num_unfed(), a->id) < std::tuple(b_class, b->num_unfed(), b->id);
  });
  absl::flat_hash_map<const ClientShare*, int> num_turns;
  std::vector<std::tuple<int, int, Sequence*>> turns;
  for (auto it = begin; it != end; ++it) turns.emplace_back(Admission::ClassOf(**it), num_turns[(*it)->share]++, *it);
  std::stable_sort(turns.begin(), turns.end(), [](const auto& a, const auto& b) {
    return std::pair(std::get<0>(a), std::get<1>(a)) < std::pair(std::get<0>(b), std::get<1>(b));
  });
  for (const auto& turn : turns) *begin++ = std::get<2>(turn);
}

}  // namespace

// NOTE: no more slots than a step has rows, lest a sequence that runs find no row.
Scheduler::Scheduler(SchedulerLimits limits, BlockPool* pool)
    : limits_(std::move(limits)),
      pool_(pool),
      admission_(std::min(limits_.max_sequences, limits_.max_batch_tokens), limits_.max_drafts, pool),
      draft_length_(limits_.max_drafts) {
  CHECK(BlocksFor(limits_.max_model_len + DraftSlack(limits_.max_drafts)) <= pool->num_blocks(),
        "one sequence must fit the pool");
}

void Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  const std::vector<int32_t> end_tokens = EndTokens(sequence->sampling, limits_.eos_token_ids);
  sequence->end_tokens.assign(end_tokens.begin(), end_tokens.end());
  MakeTokenBiases(sequence.get());
  by_id_[sequence->id] = sequence.get();
  if (sequence->deadline < absl::InfiniteFuture()) deadlines_.emplace(sequence->deadline, sequence->id);
  admission_.Add(std::move(sequence));
}

void Scheduler::Cancel(RequestId id, absl::Time now, Deltas* deltas) {
  auto it = by_id_.find(id);
  if (it == by_id_.end()) return;
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
  for (const auto& sequence : admission_.running()) sequence->Prefetch();
  NewStep next;
  next.now = now;
  do {
    admission_.Admit(now);
    PlanRows(&next);
  } while (admission_.ReleaseEnded() && next.plan.empty());
  if (next.plan.empty()) {
    CHECK(!in_flight_.empty() || by_id_.empty(), "{} sequences, and none can run", by_id_.size());
    return next.plan;
  }
  next.plan.step = next.record.step = next_step_++;
  next.record.num_sampled = next.plan.logits_rows.size();
  next.plan.logits_rows.insert(next.plan.logits_rows.end(), next.scored.begin(), next.scored.end());
  next.record.rows = next.plan.logits_rows;
  next.record.planned = now;
  if (next.plan.rows_per_sequence() == 1 + next.plan.num_proposed) next.record.num_drafts = next.plan.num_proposed;
  counters_.step_rows.Add(next.plan.num_rows);
  // Not before: rows of one step do not see each other's blocks.
  for (size_t i = 0; i < next.plan.sequences.size(); ++i) {
    if (next.plan.sequences[i].start >= 0) Publish(next.record.sequences[i], next.record.sequences[i]->num_fed);
  }
  in_flight_.push_back(std::move(next.record));
  return std::move(next.plan);
}

// NOTE: of a sequence that does not sample in the step no drafts are asked; as many are reserved for as there may be.
void Scheduler::Proposes(int num_drafts) {
  CHECK(!in_flight_.empty() && num_drafts <= limits_.max_drafts);
  for (const LogitsRow& row : absl::MakeSpan(in_flight_.back().rows).first(in_flight_.back().num_sampled)) {
    in_flight_.back().sequences[row.sequence]->num_drafts = num_drafts;
  }
  in_flight_.back().num_drafts = -1;
}

void Scheduler::PlanRows(NewStep* next) {
  const auto num_wanting = static_cast<int>(std::count_if(admission_.running().begin(), admission_.running().end(),
                                                          [this](const auto& running) { return WantsRows(*running); }));
  if (num_wanting == 0) return;
  next->plan.sequences.reserve(num_wanting);
  next->record.sequences.reserve(num_wanting);
  next->plan.logits_rows.reserve(num_wanting * (1 + limits_.max_drafts));
  next->num_drafts = std::min(limits_.max_drafts, limits_.max_batch_tokens / num_wanting - 1);
  ChooseDrafts(next);
  std::vector<Sequence*> prompts;
  for (const auto& sequence : admission_.running()) {
    if (!WantsRows(*sequence)) continue;
    if (sequence->is_decoding) {
      PlanDecode(sequence.get(), next);
    } else {
      prompts.push_back(sequence.get());
    }
  }
  PlanPrompts(&prompts, next);
}

void Scheduler::ChooseDrafts(NewStep* next) {
  next->plan.num_proposed = limits_.max_drafts;
  if (!limits_.adapts_drafts) return;
  for (const auto& sequence : admission_.running()) {
    if (!sequence->is_decoding || !WantsRows(*sequence)) continue;
    ++next->record.num_decoding;
    next->record.num_decoding_keys += sequence->num_fed;
  }
  next->plan.num_proposed =
      draft_length_.Next(next->record.num_decoding, next->record.num_decoding_keys, next->num_drafts);
}

bool Scheduler::WantsRows(const Sequence& sequence) const {
  if (sequence.is_ended) return false;
  if (!sequence.is_decoding) return sequence.num_unfed() > 0;
  // Nothing more to sample once the tokens under way, as few as they may be, reach a limit.
  const int num_coming = sequence.num_generated() + sequence.num_sampling;
  return num_coming < sequence.sampling.max_tokens && sequence.num_prompt_tokens + num_coming < limits_.max_model_len;
}

void Scheduler::PlanDecode(Sequence* sequence, NewStep* next) {
  SequenceStep step;
  step.num_rows = 1 + std::min(sequence->num_drafts, next->num_drafts);
  if (!admission_.ReserveBlocks(sequence, sequence->num_fed + step.num_rows + limits_.max_drafts)) return;
  AddRows(sequence, step, next);
}

void Scheduler::PlanPrompts(std::vector<Sequence*>* prompts, NewStep* next) {
  // NOTE: decoding may just have preempted one.
  prompts->erase(std::remove_if(prompts->begin(), prompts->end(), [](const Sequence* s) { return s->is_ended; }),
                 prompts->end());
  if (prompts->empty()) return;
  for (Sequence* prompt : *prompts) SkipCached(prompt);
  SortByTurns(prompts->begin() + 1, prompts->end());
  LeaveOutFollowers(prompts);
  const int num_rows = RowsLeft(*next);
  int num_others = 0;  // rows that the others can use
  for (size_t i = 1; i < prompts->size(); ++i) num_others = std::min(num_others + (*prompts)[i]->num_unfed(), num_rows);
  PlanChunk(prompts->front(), std::max((num_rows + 1) / 2, num_rows - num_others), next);
  for (size_t i = 1; i < prompts->size(); ++i) PlanChunk((*prompts)[i], RowsLeft(*next), next);
}

// Leaves out prompts whose next block one in front of them is computing: they will share it. That one has rows whenever
// they would have had any, so they lose no time.
void Scheduler::LeaveOutFollowers(std::vector<Sequence*>* prompts) const {
  if (!pool_->has_prefix_cache()) return;
  absl::flat_hash_set<PrefixKey> under_way;
  const auto follows = [&](Sequence* sequence) {
    const int next = sequence->num_fed / kBlockTokens;
    if (next >= static_cast<int>(sequence->keys.size()) || under_way.insert(sequence->keys[next]).second) return false;
    return sequence->num_fed % kBlockTokens == 0 && next < sequence->max_cached_blocks();
  };
  prompts->erase(std::remove_if(prompts->begin(), prompts->end(), follows), prompts->end());
}

void Scheduler::PlanChunk(Sequence* sequence, int max_rows, NewStep* next) {
  if (max_rows <= 0 || !CountCached(sequence, next)) return;
  const int num_rows = std::min(sequence->num_unfed(), max_rows);
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

// What somebody else has computed since this one was admitted: those blocks take the place of its own, which no step
// has written to.
void Scheduler::SkipCached(Sequence* sequence) {
  if (sequence->num_fed % kBlockTokens != 0 || sequence->published == BlockPool::kNothing) return;
  const int begin = sequence->num_fed / kBlockTokens;
  const std::vector<int32_t> found =
      pool_->Find(sequence->keys, sequence->tokens, begin, sequence->max_cached_blocks(), sequence->published);
  if (found.empty()) return;
  const auto first = sequence->blocks.begin() + begin;
  pool_->Share(found);
  pool_->Release({&*first, found.size()});
  std::copy(found.begin(), found.end(), first);
  sequence->num_fed += static_cast<int>(found.size()) * kBlockTokens;
  sequence->num_published = begin + static_cast<int>(found.size());
  sequence->published = pool_->serial(found.back());
  sequence->num_blocks_told = std::min(sequence->num_blocks_told, begin);
}

// Counts what was found in the prefix cache since its last rows. False when a step has no room for its penalties to: it
// waits for the next.
bool Scheduler::CountCached(Sequence* sequence, NewStep* next) {
  const int begin = sequence->is_in_slot ? sequence->num_counted : 0, end = sequence->num_fed;
  if (sequence->has_penalties()) {
    std::vector<CountedToken>& counted = next->plan.counted_tokens;
    if (static_cast<int>(counted.size()) + end - begin > limits_.max_model_len) return false;
    for (int p = begin; p < end; ++p) {
      counted.push_back({sequence->slot, sequence->tokens[p], p < sequence->num_prompt_tokens ? 0 : 1});
    }
  }
  sequence->num_counted = end;
  if (!sequence->is_in_slot && sequence->num_ever_fed == 0 && pool_->has_prefix_cache() && !sequence->scores_prompt()) {
    counters_.prefix_cache_queries += sequence->num_prompt_tokens;
  }
  const int num_new = std::min(end, sequence->num_prompt_tokens) - sequence->num_ever_fed;
  if (num_new > 0) {
    counters_.prompt_tokens += num_new;
    counters_.cached_prompt_tokens += num_new;
    sequence->num_cached += num_new;
  }
  sequence->num_ever_fed = std::max(sequence->num_ever_fed, end);
  return true;
}

// Offers its full blocks to the prefix cache; the first `num_final` tokens of it will not be fed again.
void Scheduler::Publish(Sequence* sequence, int num_final) {
  const int num_full = num_final / kBlockTokens;
  if (num_full <= sequence->num_published || !pool_->has_prefix_cache()) return;
  pool_->ExtendKeys(sequence->cache_salt, sequence->tokens, &sequence->keys);
  for (int& i = sequence->num_published; i < num_full && sequence->published != BlockPool::kNothing; ++i) {
    sequence->published = pool_->Publish(sequence->keys, sequence->tokens, i, sequence->blocks[i], sequence->published);
  }
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
      next->scored.push_back({plan->num_rows + p - step.start, index, sequence->tokens[p + 1]});
      plan->wants_top |= sequence->sampling.prompt_logprobs > 0;
      sequence->num_prompt_scored = p + 1;
    }
  }
  sequence->num_fed += step.num_rows;
  sequence->num_counted = sequence->num_fed;
  plan->num_keys += int64_t{step.num_rows} * sequence->num_fed;
  const bool is_decode = step.start < 0;
  if (!is_decode) sequence->num_ever_fed = std::max(sequence->num_ever_fed, sequence->num_fed);
  const bool is_last = is_decode || sequence->num_unfed() == 0;
  if (is_last && sequence->num_generated() + sequence->num_sampling < sequence->sampling.max_tokens) {
    for (int i = is_decode ? 0 : step.num_rows - 1; i < step.num_rows; ++i) {
      plan->logits_rows.push_back({plan->num_rows + i, index, -1});
    }
    plan->wants_top |= sequence->sampling.logprobs > 0;
    sequence->is_decoding = true;
    sequence->num_drafts = plan->num_proposed;
    ++sequence->num_sampling;
  }
  ++sequence->num_in_flight;
  sequence->first_step = std::min(sequence->first_step, next->now);
  plan->num_rows += step.num_rows;
  plan->sequences.push_back(step);
  next->record.sequences.push_back(sequence);
}

// ---- Results and ends ----

void Scheduler::Commit(const StepResult& result, absl::Time now, Deltas* deltas) {
  CHECK(!in_flight_.empty() && in_flight_.front().step == result.step, "step {} out of order", result.step);
  const InFlight record = std::move(in_flight_.front());
  in_flight_.pop_front();
  for (const Sequence* sequence : record.sequences) sequence->Prefetch();
  for (const Sequence* sequence : record.sequences)
    __builtin_prefetch(sequence->tokens.data() + sequence->tokens.size(), 1);
  // NOTE: only amid steps alike: the CPU works while a step is launched, so that between two commits it does the next.
  const bool is_alike = record.num_drafts >= 0 && record.num_drafts == last_num_drafts_ && !in_flight_.empty() &&
                        in_flight_.front().num_drafts == record.num_drafts;
  if (limits_.adapts_drafts && is_alike) {
    draft_length_.Took(record.num_decoding, record.num_decoding_keys, record.num_drafts,
                       now - std::max(record.planned, last_commit_));
  }
  last_commit_ = now;
  last_num_drafts_ = record.num_drafts;
  RowRange tokens = {0, 0}, scores = {0, record.num_sampled};
  for (size_t s = 0; s < record.sequences.size(); ++s) {
    Sequence* sequence = record.sequences[s];
    const auto skip_to_end = [&](size_t row, size_t end) {
      while (row < end && record.rows[row].sequence == static_cast<int32_t>(s)) ++row;
      return row;
    };
    tokens = {tokens.end, skip_to_end(tokens.end, record.num_sampled)};
    scores = {scores.end, skip_to_end(scores.end, record.rows.size())};
    --sequence->num_in_flight;
    Delta delta;
    delta.num_cached_tokens = sequence->num_cached;
    // A preempted sequence keeps what steps in flight still bring; one that is over drops it.
    if (!sequence->is_over()) {
      for (size_t row = scores.begin; row < scores.end; ++row) {
        delta.prompt_logprobs.push_back(MakeLogprob(result, row, sequence->sampling.prompt_logprobs));
      }
      CommitTokens(result, tokens, result.num_accepted[s], now, sequence, &delta);
    }
    if (!delta.tokens.empty() || !delta.prompt_logprobs.empty() || delta.finish_reason != FinishReason::kNone) {
      deltas->emplace_back(sequence->id, std::move(delta));
    }
  }
  admission_.ReleaseEnded();
}

void Scheduler::CommitTokens(const StepResult& result, RowRange rows, int num_accepted, absl::Time now,
                             Sequence* sequence, Delta* delta) {
  const SamplingParams& sampling = sequence->sampling;
  const int num_rows = static_cast<int>(rows.end - rows.begin);
  FinishReason reason = FinishReason::kNone;
  if (num_rows > 0) {
    CHECK(num_accepted >= 1 && num_accepted <= num_rows, "{} tokens of {} rows", num_accepted, num_rows);
    --sequence->num_sampling;
    sequence->num_fed -= num_rows - num_accepted;
    draft_length_.Verified(num_rows - 1, num_accepted - 1);
    counters_.draft_tokens += num_rows - 1;
    counters_.accepted_draft_tokens += num_accepted - 1;
    for (int i = 0; i < num_accepted - 1; ++i) ++counters_.accepted_by_place[i];
    counters_.drafts += num_rows > 1 ? 1 : 0;
    sequence->first_token = std::min(sequence->first_token, now);
  }
  for (int i = 0; num_rows > 0 && i < num_accepted && reason == FinishReason::kNone; ++i) {
    reason = AppendToken(sequence, result.tokens[rows.begin + i], delta);
    if (sampling.logprobs >= 0) delta->logprobs.push_back(MakeLogprob(result, rows.begin + i, sampling.logprobs));
  }
  if (num_rows > 0) Publish(sequence, static_cast<int>(sequence->tokens.size()) - 1);
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

// NOTE: a sequence that waited is gone then.
void Scheduler::End(Sequence* sequence, FinishReason reason, absl::Time now, Delta* delta) {
  delta->finish_reason = reason;
  delta->times = MakeTimes(*sequence, now);
  delta->num_cached_tokens = sequence->num_cached;
  deadlines_.erase({sequence->deadline, sequence->id});
  by_id_.erase(sequence->id);
  admission_.End(sequence);
}

void Scheduler::EndEarly(Sequence* sequence, FinishReason reason, const absl::Status& error, absl::Time now,
                         Deltas* deltas) {
  const RequestId id = sequence->id;
  Delta delta;
  delta.error = error;
  End(sequence, reason, now, &delta);
  deltas->emplace_back(id, std::move(delta));
  admission_.ReleaseEnded();
}

void Scheduler::Fail(const absl::Status& status, absl::Time now, Deltas* deltas) {
  while (!by_id_.empty()) {
    const auto [id, sequence] = *by_id_.begin();
    Delta delta;
    delta.error = status;
    End(sequence, FinishReason::kError, now, &delta);
    deltas->emplace_back(id, std::move(delta));
  }
  admission_.Clear();
  in_flight_.clear();
}

EngineStats Scheduler::stats() const {
  EngineStats stats = counters_;
  stats.steps = counters_.step_rows.count;
  stats.preemptions = admission_.num_preemptions();
  stats.running = static_cast<int>(admission_.running().size());
  stats.waiting = admission_.num_waiting();
  const bool lacks_slot = admission_.lack() == Admission::Lack::kSlot;
  const bool lacks_nothing = admission_.lack() == Admission::Lack::kNothing;
  stats.waiting_for_slots = lacks_slot ? stats.waiting : 0;
  stats.waiting_for_blocks = lacks_slot || lacks_nothing ? 0 : stats.waiting;
  stats.blocks_total = pool_->num_blocks();
  stats.blocks_used = pool_->num_used();
  stats.blocks_idle = pool_->num_idle();
  stats.prefix_cache_evictions = pool_->num_evictions();
  return stats;
}

}  // namespace cachalot
