// Mesh: ranks that exchange bytes, each with each.
#ifndef CACHALOT_KERNELS_MESH_H_
#define CACHALOT_KERNELS_MESH_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
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

// Of ranks that are threads of one process: nothing is copied. They may be destroyed in any order.
std::vector<std::unique_ptr<Mesh>> MakeThreadMesh(int num_ranks);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_MESH_H_
