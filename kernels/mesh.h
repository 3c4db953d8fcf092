// Mesh: ranks that exchange bytes, each with each.
#ifndef CACHALOT_KERNELS_MESH_H_
#define CACHALOT_KERNELS_MESH_H_

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace cachalot {

// One rank's end of it. An exchange has no deadline: whoever watches the ranks aborts the mesh when one is gone.
class Mesh {
 public:
  using Bytes = absl::Span<const char>;

  virtual ~Mesh() = default;
  virtual int rank() const = 0;
  virtual int num_ranks() const = 0;

  // What the next Exchange is to give rank `to`; until it is filled, anything.
  virtual std::vector<char>& outbox(int to) = 0;
  // Gives what is in the outboxes, this rank's own too, and waits for what all give: of rank r in [r]. It is there
  // until the next call. Every rank makes the same calls in the same order, one at a time. After Abort: its reason.
  virtual absl::StatusOr<std::vector<Bytes>> Exchange() = 0;

  // `wake` is called when another rank has begun an Exchange and this one has not, with the number of those that it has
  // begun, the first being 1, and after Abort, with 0; by any thread, perhaps more than once. It must not call the
  // mesh. Null: no longer.
  virtual void OnAwaited(std::function<void(uint64_t num_begun)> wake) = 0;

  // What ranks exchange now and from now on fails with `reason`, on all of them; the first reason stays. Any thread.
  virtual void Abort(const absl::Status& reason) = 0;
};

// Everybody's `mine`, by rank: plain bytes, sent as they are. Internal, "rank 3 WORD with 5 bytes", where one sends no
// T.
template <typename T>
absl::StatusOr<std::vector<T>> ExchangeAll(Mesh& mesh, const T& mine, const char* word) {
  static_assert(std::is_trivially_copyable_v<T>);
  const char* bytes = reinterpret_cast<const char*>(&mine);
  for (int r = 0; r < mesh.num_ranks(); ++r) mesh.outbox(r).assign(bytes, bytes + sizeof(T));
  const auto came = mesh.Exchange();
  if (!came.ok()) return came.status();
  std::vector<T> all(mesh.num_ranks());
  for (int r = 0; r < mesh.num_ranks(); ++r) {
    const Mesh::Bytes& theirs = (*came)[r];
    if (theirs.size() != sizeof(T)) {
      return absl::InternalError(absl::StrCat("rank ", r, " ", word, " with ", theirs.size(), " bytes"));
    }
    std::memcpy(&all[r], theirs.data(), sizeof(T));
  }
  return all;
}

// Of ranks that are threads of one process: nothing is copied. They may be destroyed in any order.
std::vector<std::unique_ptr<Mesh>> MakeThreadMesh(int num_ranks);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_MESH_H_
