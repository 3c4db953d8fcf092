// Scheduler: plans steps ahead of their results, and commits results in order.
#include "engine/schedule/scheduler.h"

#include <algorithm>

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

}  // namespace

Scheduler::Scheduler(SchedulerLimits limits, BlockPool* pool) : limits_(std::move(limits)), pool_(pool) {
  CHECK(limits_.max_logits_rows > limits_.max_sequences, "a prompt must be able to score beside full decoding");
  CHECK(BlocksFor(limits_.max_model_len) <= pool->num_blocks(), "one sequence must fit the pool");
  for (int slot = limits_.max_sequences; slot-- > 0;) free_slots_.push_back(slot);
}

void Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  by_id_[sequence->id] = sequence.get();
  const Order order = OrderOf(*sequence);
  waiting_.emplace(order, std::move(sequence));
}

void Scheduler::Cancel(RequestId id, Deltas* deltas) {
  auto it = by_id_.find(id);
  if (it == by_id_.end()) return;
  Sequence* sequence = it->second;
  if (sequence->is_ended && !sequence->is_preempted) return;
  Delta delta;
  delta.finish_reason = FinishReason::kCancelled;
  deltas->emplace_back(id, std::move(delta));
  if (sequence->slot < 0) {
    by_id_.erase(id);
    waiting_.erase(OrderOf(*sequence));
    return;
  }
  sequence->is_ended = true;
  sequence->is_preempted = false;
  ReleaseEnded();
}

StepPlan Scheduler::Plan() {
  StepPlan plan;
  InFlight record;
  do {
    PlanDecode(&plan, &record);
  } while (ReleaseEnded() && plan.empty());
  PlanPrefill(&plan, &record);
  Admit(&plan, &record);
  if (plan.empty()) {
    CHECK(plan.block_updates.empty());
    return plan;
  }
  plan.step = record.step = next_step_++;
  record.rows = plan.logits_rows;
  in_flight_.push_back(std::move(record));
  return plan;
}

void Scheduler::PlanDecode(StepPlan* plan, InFlight* record) {
  for (auto& [order, owned] : running_) {
    Sequence* sequence = owned.get();
    if (sequence->is_ended || !sequence->is_decoding) continue;
    if (plan->num_rows == limits_.max_batch_tokens) return;
    // Nothing more to sample once the tokens under way reach a limit.
    const int num_coming = sequence->num_generated() + sequence->num_sampling;
    if (num_coming >= sequence->sampling.max_tokens) continue;
    if (sequence->num_prompt_tokens + num_coming >= limits_.max_model_len) continue;
    if (!ReserveBlocks(sequence, sequence->num_fed + 1, plan)) {
      PreemptLast();
      continue;
    }
    SequenceStep step;
    step.num_rows = 1;
    AddRows(sequence, step, plan, record);
  }
}

void Scheduler::PlanPrefill(StepPlan* plan, InFlight* record) {
  for (auto& [order, owned] : running_) {
    if (!owned->is_ended && !owned->is_decoding) AddChunk(owned.get(), plan, record);
  }
}

void Scheduler::Admit(StepPlan* plan, InFlight* record) {
  while (!waiting_.empty() && !free_slots_.empty() && plan->num_rows < limits_.max_batch_tokens) {
    auto it = waiting_.begin();
    Sequence* sequence = it->second.get();
    // A spare block for each running sequence, lest the newcomer be preempted at once.
    const int needed = BlocksFor(static_cast<int>(sequence->tokens.size()));
    if (pool_->num_free() < needed + num_running()) return;
    sequence->slot = free_slots_.back();
    free_slots_.pop_back();
    CHECK(ReserveBlocks(sequence, static_cast<int>(sequence->tokens.size()), plan));
    running_.insert(waiting_.extract(it));
    if (!AddChunk(sequence, plan, record)) return;
  }
}

bool Scheduler::AddChunk(Sequence* sequence, StepPlan* plan, InFlight* record) {
  const int num_tokens = static_cast<int>(sequence->tokens.size());
  const int left = num_tokens - sequence->num_fed;
  int num_rows = std::min(left, limits_.max_batch_tokens - plan->num_rows);
  // Each scored row takes a row of logits; one is kept for the sample at the end.
  if (sequence->scores_prompt()) {
    const int free_rows = limits_.max_logits_rows - static_cast<int>(plan->logits_rows.size()) - 1;
    num_rows = std::min(num_rows, free_rows);
  } else if (static_cast<int>(plan->logits_rows.size()) == limits_.max_logits_rows) {
    return false;
  }
  if (left == 0 || num_rows <= 0) return false;
  SequenceStep step;
  step.start = sequence->num_fed;
  step.num_rows = num_rows;
  step.tokens = absl::MakeConstSpan(sequence->tokens).subspan(step.start, num_rows);
  if (!sequence->is_in_slot) step.params = MakeSlotParams(*sequence);
  sequence->is_in_slot = true;
  num_prompt_tokens_ += num_rows;
  AddRows(sequence, step, plan, record);
  return true;
}

void Scheduler::AddRows(Sequence* sequence, SequenceStep step, StepPlan* plan, InFlight* record) {
  const int32_t index = static_cast<int32_t>(plan->sequences.size());
  step.slot = sequence->slot;
  // Prompt log-probabilities: the row of token p scores token p + 1.
  if (sequence->scores_prompt() && step.start >= 0) {
    for (int p = step.start; p < step.start + step.num_rows && p + 1 < sequence->num_prompt_tokens; ++p) {
      if (p < sequence->num_prompt_scored) continue;
      plan->logits_rows.push_back({plan->num_rows + p - step.start, index, sequence->tokens[p + 1]});
      sequence->num_prompt_scored = p + 1;
    }
  }
  sequence->num_fed += step.num_rows;
  const bool is_last = step.start < 0 || sequence->num_fed == static_cast<int>(sequence->tokens.size());
  if (is_last && sequence->num_generated() + sequence->num_sampling < sequence->sampling.max_tokens) {
    plan->logits_rows.push_back({plan->num_rows + step.num_rows - 1, index, -1});
    sequence->is_decoding = true;
    ++sequence->num_sampling;
  }
  ++sequence->num_in_flight;
  plan->num_rows += step.num_rows;
  plan->sequences.push_back(step);
  record->sequences.push_back(sequence);
}

bool Scheduler::ReserveBlocks(Sequence* sequence, int num_tokens, StepPlan* plan) {
  const int has = static_cast<int>(sequence->blocks.size());
  const int wanted = BlocksFor(num_tokens);
  if (wanted > has && !pool_->Allocate(wanted - has, &sequence->blocks)) return false;
  for (int i = has; i < wanted; ++i) plan->block_updates.push_back({sequence->slot, i, sequence->blocks[i]});
  return true;
}

void Scheduler::PreemptLast() {
  // Blocks of ended sequences are on their way back: wait for those first.
  for (const auto& [order, sequence] : running_) {
    if (sequence->is_ended) return;
  }
  Sequence* victim = running_.rbegin()->second.get();
  victim->is_ended = victim->is_preempted = true;
  ++num_preemptions_;
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
    sequence->num_fed = 0;
    sequence->is_ended = sequence->is_preempted = sequence->is_decoding = sequence->is_in_slot = false;
    waiting_.insert(std::move(node));
  }
  return released;
}

void Scheduler::Commit(const StepResult& result, Deltas* deltas) {
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
    // A preempted sequence keeps what steps in flight still bring; an ended one drops it.
    if (!sequence->is_ended || sequence->is_preempted) {
      CommitRows(result, record, row, end, result.num_accepted[s], sequence, &delta);
    }
    if (!delta.tokens.empty() || !delta.prompt_logprobs.empty() || delta.finish_reason != FinishReason::kNone) {
      deltas->emplace_back(sequence->id, std::move(delta));
    }
    row = end;
  }
  ReleaseEnded();
}

void Scheduler::CommitRows(const StepResult& result, const InFlight& record, size_t row, size_t end, int num_accepted,
                           Sequence* sequence, Delta* delta) {
  const SamplingParams& sampling = sequence->sampling;
  for (; row < end && record.rows[row].target >= 0; ++row) {
    delta->prompt_logprobs.push_back(MakeLogprob(result, row, sampling.prompt_logprobs));
  }
  if (row < end) --sequence->num_sampling;
  for (int i = 0; row < end && i < num_accepted && delta->finish_reason == FinishReason::kNone; ++i) {
    AppendToken(sequence, result.tokens[row + i], delta);
    if (sampling.logprobs >= 0) delta->logprobs.push_back(MakeLogprob(result, row + i, sampling.logprobs));
  }
  // A request for scores alone ends with its last prompt token.
  const bool is_scored = sampling.max_tokens == 0 && sequence->num_fed == sequence->num_prompt_tokens;
  if (is_scored && sequence->num_in_flight == 0) delta->finish_reason = FinishReason::kLength;
  if (delta->finish_reason == FinishReason::kNone) return;
  sequence->is_ended = true;
  sequence->is_preempted = false;
}

void Scheduler::AppendToken(Sequence* sequence, int32_t token, Delta* delta) const {
  const SamplingParams& sampling = sequence->sampling;
  sequence->tokens.push_back(token);
  delta->tokens.push_back(token);
  const auto contains = [token](const auto& ids) { return std::find(ids.begin(), ids.end(), token) != ids.end(); };
  if ((!sampling.ignore_eos && contains(limits_.eos_token_ids)) || contains(sampling.stop_token_ids)) {
    delta->finish_reason = FinishReason::kStop;
    delta->stop_token = token;
  } else if (sequence->num_generated() >= sampling.max_tokens ||
             static_cast<int>(sequence->tokens.size()) >= limits_.max_model_len) {
    delta->finish_reason = FinishReason::kLength;
  }
}

void Scheduler::Fail(const absl::Status& status, Deltas* deltas) {
  for (const auto& [id, sequence] : by_id_) {
    if (sequence->is_ended && !sequence->is_preempted) continue;
    Delta delta;
    delta.finish_reason = FinishReason::kError;
    delta.error = status;
    deltas->emplace_back(id, std::move(delta));
  }
  by_id_.clear();
  waiting_.clear();
  running_.clear();
  in_flight_.clear();
}

}  // namespace cachalot
