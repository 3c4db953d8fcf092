// FakeDevice: rows are fed in order, and what they leave is checked each time it is read.
#include "tests/engine/fake_device.h"

#include <gtest/gtest.h>

#include <set>
#include <utility>

namespace cachalot {

StepResult FakeDevice::Run(const StepPlan& plan) {
  StepResult result;
  result.step = plan.step;
  std::set<int> named;
  for (const SequenceStep& s : plan.sequences) named.insert(s.slot);
  for (const BlockUpdate& u : plan.block_updates) {
    EXPECT_TRUE(named.count(u.slot)) << "blocks of a slot that the step does not name";
    auto& table = slots_[u.slot].blocks;
    if (static_cast<int>(table.size()) <= u.index) table.resize(u.index + 1, -1);
    table[u.index] = u.block;
  }
  EXPECT_LE(plan.num_proposed, max_drafts_);
  num_proposed_ = plan.num_proposed;
  std::vector<std::vector<int32_t>> next;  // the fake model's token after each row of every sequence
  std::vector<int> first_rows;
  int num_rows = 0;
  for (const SequenceStep& s : plan.sequences) {
    next.push_back(FeedRows(s, &slots_[s.slot]));
    first_rows.push_back(num_rows);
    num_rows += s.num_rows;
  }
  for (const CountedToken& t : plan.counted_tokens) {
    EXPECT_TRUE(named.count(t.slot)) << "counts of a slot that the step does not name";
    slots_[t.slot].counted += CountOf(t.token, t.is_generated != 0);
  }
  result.num_accepted.assign(plan.sequences.size(), 0);
  for (const LogitsRow& row : plan.logits_rows) {
    const int s = row.sequence;
    result.tokens.push_back(row.target >= 0 ? row.target : next[s][row.row - first_rows[s]]);
    result.logprobs.push_back(-1.0f);
    if (row.target >= 0 || result.num_accepted[s] > 0) continue;
    Sample(next[s], plan.sequences[s].start < 0, &slots_[plan.sequences[s].slot], &result.num_accepted[s]);
  }
  for (int slot : named) CheckCounts(slots_[slot]);
  if (plan.wants_top) {
    result.top_tokens.assign(result.tokens.size() * kMaxTopLogprobs, 0);
    result.top_logprobs.assign(result.tokens.size() * kMaxTopLogprobs, 0);
  }
  return result;
}

std::vector<int32_t> FakeDevice::FeedRows(const SequenceStep& step, Slot* slot) {
  if (step.params.apply != 0) {
    slot->params = step.params;
    slot->tokens.clear();
    slot->context = NewContext(*slot);
    slot->counted = 0;
  }
  if (step.start >= 0) ReadPrefix(step.start, slot);
  std::vector<int32_t> next;
  for (int i = 0; i < step.num_rows; ++i) {
    EXPECT_TRUE(step.start < 0 || static_cast<int>(slot->tokens.size()) == step.start + i) << "rows out of order";
    Feed(step.start >= 0 ? step.tokens[i] : i == 0 ? slot->last : slot->drafts.at(i - 1), slot);
    next.push_back(slot->context.Next());
  }
  CheckCache(*slot);
  return next;
}

// Forgets what the rows of wrong drafts have done, and proposes drafts anew.
void FakeDevice::Sample(const std::vector<int32_t>& next, bool is_decode, Slot* slot, int32_t* num_accepted) {
  const int num_rows = static_cast<int>(next.size());
  int num_right = is_decode ? 0 : num_rows - 1;
  while (is_decode && num_right + 1 < num_rows && slot->drafts[num_right] == next[num_right]) ++num_right;
  *num_accepted = is_decode ? num_right + 1 : 1;
  slot->last = next[num_right];
  for (int i = num_rows - 1; is_decode && i > num_right; --i) {
    slot->counted -= CountOf(*slot, static_cast<int>(slot->tokens.size()) - 1);
    slot->tokens.pop_back();
  }
  slot->context = NewContext(*slot);
  for (int32_t token : slot->tokens) slot->context.Append(token);
  Propose(slot);
}

void FakeDevice::Propose(Slot* slot) {
  Context context = slot->context;
  context.Append(slot->last);
  slot->drafts.clear();
  for (int i = 0; i < num_proposed_; ++i) {
    Write({static_cast<int>(slot->tokens.size()) + i, -1, 0}, *slot);
    slot->drafts.push_back(context.hash % 5 == 0 ? kFakeVocab : context.Next());
    context.Append(slot->drafts.back());
  }
}

void FakeDevice::Write(const Written& written, const Slot& slot) {
  const int index = written.position / kBlockTokens;
  ASSERT_LT(written.position, max_positions_);
  ASSERT_LT(index, static_cast<int>(slot.blocks.size())) << "no block for the position";
  auto& block = cache_[slot.blocks[index]];
  block.resize(kBlockTokens);
  block[written.position % kBlockTokens] = written;
}

// What the sequence does not feed is in its blocks.
void FakeDevice::ReadPrefix(int num_tokens, Slot* slot) {
  for (int p = static_cast<int>(slot->tokens.size()); p < num_tokens; ++p) {
    ASSERT_LT(p / kBlockTokens, static_cast<int>(slot->blocks.size()));
    auto& block = cache_[slot->blocks[p / kBlockTokens]];
    block.resize(kBlockTokens);
    slot->tokens.push_back(block[p % kBlockTokens].token);
    slot->context.Append(slot->tokens.back());
  }
}

uint64_t FakeDevice::CountOf(int32_t token, bool is_generated) {
  Context context(is_generated ? "g" : "p");
  context.Append(token);
  return context.hash;
}

uint64_t FakeDevice::CountOf(const Slot& slot, int position) {
  return CountOf(slot.tokens[position], position >= slot.params.prompt_tokens);
}

void FakeDevice::CheckCounts(const Slot& slot) {
  if (slot.params.repetition_penalty == 1) return;
  uint64_t expected = 0;
  for (int p = 0; p < static_cast<int>(slot.tokens.size()); ++p) expected += CountOf(slot, p);
  EXPECT_EQ(slot.counted, expected) << "penalties of request " << slot.params.seed;
}

void FakeDevice::Feed(int32_t token, Slot* slot) {
  slot->tokens.push_back(token);
  slot->context.Append(token);
  const int position = static_cast<int>(slot->tokens.size()) - 1;
  Write({position, token, slot->context.hash}, *slot);
  slot->counted += CountOf(*slot, position);
}

void FakeDevice::CheckCache(const Slot& slot) {
  Context context = NewContext(slot);
  for (int p = 0; p < static_cast<int>(slot.tokens.size()); ++p) {
    context.Append(slot.tokens[p]);
    const Written& written = cache_[slot.blocks[p / kBlockTokens]][p % kBlockTokens];
    ASSERT_TRUE((written == Written{p, slot.tokens[p], context.hash}))
        << "not what request " << slot.params.seed << " leaves at position " << p;
  }
}

}  // namespace cachalot
