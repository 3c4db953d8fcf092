// Votes: exchanged, then joined.
#include "engine/step_agreement.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_format.h"

namespace cachalot {

absl::StatusOr<StepVote> StepAgreement::Vote(const StepVote& mine) {
  const char* bytes = reinterpret_cast<const char*>(&mine);
  for (int r = 0; r < mesh_.num_ranks(); ++r) mesh_.outbox(r).assign(bytes, bytes + sizeof(mine));
  ++num_votes_;
  const auto votes = mesh_.Exchange();
  if (!votes.ok()) return votes.status();
  StepVote agreed;
  for (int r = 0; r < mesh_.num_ranks(); ++r) {
    StepVote vote;
    if ((*votes)[r].size() != sizeof(vote)) {
      return absl::InternalError(absl::StrFormat("rank %d votes with %d bytes", r, (*votes)[r].size()));
    }
    std::memcpy(&vote, (*votes)[r].data(), sizeof(vote));
    agreed.has_work |= vote.has_work;
    agreed.is_leaving |= vote.is_leaving;
    agreed.num_proposed = std::max(agreed.num_proposed, vote.num_proposed);
    agreed.work = std::max(agreed.work, vote.work);
  }
  return agreed;
}

}  // namespace cachalot
