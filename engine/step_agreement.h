// StepAgreement: what ranks that share experts settle before each step, all of which all of them must run.
#ifndef CACHALOT_ENGINE_STEP_AGREEMENT_H_
#define CACHALOT_ENGINE_STEP_AGREEMENT_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/mesh.h"

namespace cachalot {

// One rank's, or what follows from those of all. Plain bytes: sent as they are.
struct StepVote {
  int32_t has_work = 0;      // a plan that is not empty; agreed: whether anybody has. Those who have none run padding
  int32_t leaver = 0;        // a rank's number + 1 where it leaves; agreed: any of them; then no step follows
  int32_t num_proposed = 0;  // drafts that the step proposes, each a pass through the MTP layer; agreed: the most
  int32_t is_mixed = 0;  // of the shape (StepShape); agreed: a path and sizes that hold all shapes. Who has no work has
                         // no shape
  int32_t num_sequences = 0, num_tokens = 0, num_rows = 0;
  int32_t unused = 0;
  int64_t work = 0;  // StepWatch::WorkOf; agreed: the most
};

// One thread: the rank's step thread.
class StepAgreement {
 public:
  explicit StepAgreement(Mesh* mesh) : mesh_(*mesh) {}  // which is used for nothing else, and outlives it

  // Waits for the votes of all. What the mesh was aborted with; Internal where a rank speaks otherwise.
  absl::StatusOr<StepVote> Vote(const StepVote& mine);
  uint64_t num_votes() const { return num_votes_; }

 private:
  Mesh& mesh_;
  uint64_t num_votes_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_STEP_AGREEMENT_H_
