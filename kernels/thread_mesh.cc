// A mesh of threads: a barrier for each exchange, behind which everybody reads what the others have posted.
#include <array>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>

#include "kernels/check.h"
#include "kernels/mesh.h"

namespace cachalot {
namespace {

struct Meeting {
  explicit Meeting(int num_ranks) : wakes(num_ranks) {
    for (auto& round : outboxes) round.assign(num_ranks, std::vector<std::vector<char>>(num_ranks));
  }
  int num_ranks() const { return static_cast<int>(wakes.size()); }

  std::mutex mutex;
  std::condition_variable all_here;
  absl::Status aborted;
  uint64_t num_complete = 0;  // exchanges that all have begun
  int num_here = 0;           // in the next
  // [round % 2][from][to]. NOTE: a rank fills those of the round after the next only when the next is complete: all
  // have begun it, and so have done with what this one brought.
  std::array<std::vector<std::vector<std::vector<char>>>, 2> outboxes;
  std::vector<std::function<void(uint64_t)>> wakes;
};

class ThreadMesh : public Mesh {
 public:
  ThreadMesh(int rank, std::shared_ptr<Meeting> meeting) : rank_(rank), meeting_(std::move(meeting)) {}
  ~ThreadMesh() override { OnAwaited(nullptr); }

  int rank() const override { return rank_; }
  int num_ranks() const override { return meeting_->num_ranks(); }
  std::vector<char>& outbox(int to) override { return meeting_->outboxes[round_ % 2][rank_][to]; }
  absl::StatusOr<std::vector<Bytes>> Exchange() override;
  void OnAwaited(std::function<void(uint64_t)> wake) override {
    std::lock_guard lock(meeting_->mutex);
    meeting_->wakes[rank_] = std::move(wake);
  }
  void Abort(const absl::Status& reason) override {
    CHECK(!reason.ok());
    std::lock_guard lock(meeting_->mutex);
    if (!meeting_->aborted.ok()) return;
    meeting_->aborted = reason;
    meeting_->all_here.notify_all();
    WakeOthers(0);
  }

 private:
  void WakeOthers(uint64_t num_begun) {
    for (int r = 0; r < num_ranks(); ++r) {
      if (r != rank_ && meeting_->wakes[r] != nullptr) meeting_->wakes[r](num_begun);
    }
  }

  const int rank_;
  const std::shared_ptr<Meeting> meeting_;
  uint64_t round_ = 0;  // exchanges that this rank has completed
};

absl::StatusOr<std::vector<Mesh::Bytes>> ThreadMesh::Exchange() {
  Meeting& m = *meeting_;
  std::unique_lock lock(m.mutex);
  if (!m.aborted.ok()) return m.aborted;
  if (++m.num_here == num_ranks()) {
    m.num_here = 0;
    ++m.num_complete;
    m.all_here.notify_all();
  } else if (m.num_here == 1) {
    WakeOthers(round_ + 1);
  }
  m.all_here.wait(lock, [&] { return m.num_complete > round_ || !m.aborted.ok(); });
  // NOTE: one that is complete succeeds on all ranks: those that have what it brought may read it still.
  if (m.num_complete <= round_) return m.aborted;
  std::vector<Bytes> came(num_ranks());
  for (int r = 0; r < num_ranks(); ++r) came[r] = m.outboxes[round_ % 2][r][rank_];
  ++round_;
  return came;
}

}  // namespace

std::vector<std::unique_ptr<Mesh>> MakeThreadMesh(int num_ranks) {
  CHECK(num_ranks > 0);
  const auto meeting = std::make_shared<Meeting>(num_ranks);
  std::vector<std::unique_ptr<Mesh>> ranks;
  for (int r = 0; r < num_ranks; ++r) ranks.push_back(std::make_unique<ThreadMesh>(r, meeting));
  return ranks;
}

}  // namespace cachalot
