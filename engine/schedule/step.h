// StepPlan and StepResult: plain data, the only thing that scheduling and the model share.
//
// The loop of a rank (engine.cc) keeps two steps in flight, so that the device never waits for the host:
//
//   Launch(plan n)      Launch(plan n+1)        Wait(n), Commit(n)   Launch(plan n+2)   Wait(n+1) ...
//
// Two steps of one sequence, step by step. Sequence A (slot 3) has a prompt of 100 tokens; blocks hold 64.
//
//   Plan n     {slot 3, start 0, tokens 100 ids, params, sample}; block updates (3,0,b0) (3,1,b1); one logits row: the
//              last of the 100. The scheduler now counts 100 tokens as fed and one sampled token as under way: it does
//              not know which.
//   Launch n   the runner packs the plan into pinned staging set 0, uploads it, submits the step's body and a download
//              into result set 0, records an event. Nothing has been waited for.
//              On the device: BeginStep takes the params into slot 3, sets length 0 -> 100; ...forward...; Sample
//              writes last_token[3] = x.
//   Plan n+1   made while n runs: {slot 3, start -1 (decode), 1 row, sample}. Position 100 is in block b1, so no block
//              is needed; at position 128 one would be reserved here, before anybody knows whether A goes on.
//   Launch n+1 staging set 1. On the device, strictly after n: BeginStep reads token x = last_token[3] and position
//              100 = length[3]; the host has seen neither.
//   Wait n     blocks until n's event; result: A sampled x. Commit appends x. Were x an end-of-sequence, A would end
//              here; its row of n+1 is already running, so its slot and blocks are only marked, and return to the
//              pools when n+1 is committed: the last launched step that names them. n+1's token for A is dropped.
//   Plan n+2   staging set 0 is free again: n has been waited for.
//
// What follows from it for a GPU backend: a plan's shape picks the graph, its contents travel in the one upload, and
// everything a later step needs from an earlier one (token, position, length, drafts, counts) stays on the device, in
// the slot. A preempted sequence is treated as an ended one, then enters a slot anew with its tokens so far
// as prompt.
//
// With X drafts a decode sequence has 1 + X rows, and `num_accepted` of its sampled tokens count. Whoever plans a step
// cannot know how many will in those under way: the scheduler counts all rows as fed, and reserves blocks for all and
// for the entries of X drafts more; each commit takes back what was not accepted. So no step is planned less for it.
//
// The prefix cache. A block of a prompt is published as soon as the step that fills it has been planned: later steps
// may read it, for the device runs them in order. A block that decoding fills is published when its tokens have been
// committed: until then drafts in it may be wrong, and be written over. A sequence whose prompt was found there starts
// with the first position that was not, the beginning of a block: it never writes to one that is shared.
#ifndef CACHALOT_ENGINE_SCHEDULE_STEP_H_
#define CACHALOT_ENGINE_SCHEDULE_STEP_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/ops_types.h"

namespace cachalot {

inline constexpr int kMaxStepsInFlight = 2;

// How far beyond a sequence's last token steps may write, with X drafts: each in flight may have X that turn out wrong,
// and proposes X more.
constexpr int DraftSlack(int max_drafts) { return (kMaxStepsInFlight + 1) * max_drafts; }

// One sequence's part of a step.
struct SequenceStep {
  int slot = 0;
  int start = -1;                    // position of the first row; -1: decode, the slot knows
  int num_rows = 0;                  // chunk length, or 1 + drafts
  absl::Span<const int32_t> tokens;  // of a prefill chunk; must live until Launch returns
  SlotParams params;                 // params.apply = 1 when the sequence enters its slot in this step
  // When it does: the tokens it bans, then those it biases, as many as params says. Must live until Launch returns.
  absl::Span<const TokenBias> token_biases;
};

struct BlockUpdate {
  int32_t slot, index, block;  // block_table[slot][index] = block, before the step
};

// A token that the slot's penalties count although no step feeds it: its latents were in the prefix cache. After the
// step's BeginStep, which forgets what a slot that is entered has counted, and before its sampling.
struct CountedToken {
  int32_t slot, token;
  int32_t is_generated;  // 0: of the prompt
};

// Logits wanted: of row `row` of the step, for sequence `sequence` of the plan. Rows that sample come first, then those
// that score; of either kind, rows of one sequence are consecutive.
struct LogitsRow {
  int32_t row, sequence;
  int32_t target;  // score this token; -1: sample
};

struct StepPlan {
  uint64_t step = 0;  // counts launched steps of the rank
  std::vector<SequenceStep> sequences;
  std::vector<BlockUpdate> block_updates;
  std::vector<CountedToken> counted_tokens;  // at most max_context
  std::vector<LogitsRow> logits_rows;
  int num_rows = 0;        // T: sum of the sequences' rows, in their order
  int64_t num_keys = 0;    // that the rows attend to
  int num_proposed = 0;    // drafts to propose to each sequence that samples, for its next step
  bool wants_top = false;  // somebody asks for alternatives to a token, sampled or scored

  bool empty() const { return sequences.empty(); }
  // What all sequences have, where all decode; 0 where not.
  int rows_per_sequence() const {
    const int rows = empty() ? 0 : sequences[0].num_rows;
    const bool is_decode = std::all_of(sequences.begin(), sequences.end(),
                                       [rows](const SequenceStep& s) { return s.start < 0 && s.num_rows == rows; });
    return is_decode ? rows : 0;
  }
};

// The padded sizes that a step runs at, chosen outside whatever runs it. Steps of one shape issue the same operations
// on the same addresses; ranks that work on one step together must have the same.
struct StepShape {
  enum class Path : uint8_t {
    kMixed,  // anything; T, S and L have nothing to do with each other
    kDecode  // every sequence decodes, 1 + k rows each and logits of all: T = L = (1 + k) * S
  };
  Path path = Path::kMixed;
  int num_sequences = 0;  // S
  int num_tokens = 0;     // T
  int num_rows = 0;       // L
  LongChunks long_chunks = {};
  int num_proposed = 0;  // drafts
  friend bool operator==(const StepShape&, const StepShape&) = default;

  static StepShape Decode(int num_sequences, int rows_per_sequence, int num_proposed) {
    const int num_rows = num_sequences * rows_per_sequence;
    return {Path::kDecode, num_sequences, num_rows, num_rows, {}, num_proposed};
  }
};

// Indexed like the plan: rows as logits_rows, num_accepted as sequences.
struct StepResult {
  uint64_t step = 0;
  std::vector<int32_t> tokens;        // [L] sampled token, or the target scored
  std::vector<float> logprobs;        // [L]
  std::vector<int32_t> top_tokens;    // [L, kMaxTopLogprobs] where the plan wants them; empty where not
  std::vector<float> top_logprobs;    // likewise
  std::vector<int32_t> num_accepted;  // [S] sampled tokens that count, from the sequence's first sampling row on
  std::vector<int32_t> drafts;        // [S, X] as many as were to be proposed; of sequences that have sampled
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_SCHEDULE_STEP_H_
