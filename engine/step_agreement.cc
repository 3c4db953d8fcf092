// Votes: exchanged, then joined.
#include "engine/step_agreement.h"

#include <algorithm>

namespace cachalot {

absl::StatusOr<StepVote> StepAgreement::Vote(const StepVote& mine) {
  ++num_votes_;
  const auto votes = ExchangeAll(mesh_, mine, "votes");
  if (!votes.ok()) return votes.status();
  StepVote agreed;
  int rows_per_sequence = 0;  // of who decodes
  for (const StepVote& vote : *votes) {
    agreed.has_work |= vote.has_work;
    agreed.leaver = std::max(agreed.leaver, vote.leaver);
    agreed.num_proposed = std::max(agreed.num_proposed, vote.num_proposed);
    agreed.is_mixed |= vote.is_mixed;
    if (vote.has_work != 0 && vote.is_mixed == 0 && vote.num_sequences > 0) {
      const int rows = vote.num_tokens / vote.num_sequences;
      if (rows_per_sequence != 0 && rows != rows_per_sequence) agreed.is_mixed = 1;
      rows_per_sequence = rows;
    }
    agreed.num_sequences = std::max(agreed.num_sequences, vote.num_sequences);
    agreed.num_tokens = std::max(agreed.num_tokens, vote.num_tokens);
    agreed.num_rows = std::max(agreed.num_rows, vote.num_rows);
    agreed.work = std::max(agreed.work, vote.work);
  }
  return agreed;
}

}  // namespace cachalot
