// Device: memory and one ordered stream of work, on the CPU or on a GPU.
#ifndef CACHALOT_KERNELS_DEVICE_H_
#define CACHALOT_KERNELS_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/long_chunks.h"
#include "kernels/tensor.h"

namespace cachalot {

// Names the shape of a submitted body. Two submissions with the same key issue the same operations on the same
// addresses, so that a GPU may capture the first as a graph and replay it afterwards.
struct StepKey {
  int32_t num_tokens = 0;     // T, rows of the forward pass (padded)
  int32_t num_sequences = 0;  // S
  int32_t num_rows = 0;       // L, rows of logits
  int32_t kind = 0;           // which body of its caller this is
  LongChunks long_chunks = {};
  friend bool operator==(const StepKey&, const StepKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const StepKey& k) {
    return H::combine(std::move(h), k.num_tokens, k.num_sequences, k.num_rows, k.kind, k.long_chunks);
  }
};

// All calls come from one thread, the rank's step thread, except where noted. Upload, Submit, Download and Record are
// queued in order and return at once; nothing they name may be freed or, on the host side, changed until an event
// recorded after them has been waited for. A fault of the device surfaces in Wait and is final: the rank is dead.
class Device {
 public:
  enum class Memory { kDevice, kPinnedHost };  // kDevice is zeroed; on the CPU both are plain aligned memory
  using Event = uint64_t;                      // counts Record calls; 0 is complete from the start

  virtual ~Device() = default;

  // Resource exhausted when it does not fit. Before readiness only: a step allocates nothing. Any thread.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes, Memory memory) = 0;

  virtual void Upload(const Tensor& dst, const void* src) = 0;  // src: pinned host memory of dst.num_bytes()
  virtual void Download(void* dst, const Tensor& src) = 0;      // dst: pinned host memory

  // Runs `body`, which issues operations (ops.h, communicator.h), uploads and downloads, and nothing else. What it does
  // may depend on `key`, on device memory and on what pinned memory holds by then: never on other host values of this
  // step, since a replay does not call it again.
  virtual void Submit(const StepKey& key, std::function<void()> body) = 0;

  // Before readiness: makes a graph of `body`, which Submit replays from then on where it gets the same key. Runs the
  // body, perhaps more than once: the device memory that it depends on must make it harmless. The CPU does nothing.
  virtual absl::Status Prepare(const StepKey&, std::function<void()> /*body*/) { return absl::OkStatus(); }
  // What a replay of the key's graph launches; 0 where there is none.
  virtual int NumKernels(const StepKey&) const { return 0; }

  virtual Event Record() = 0;
  virtual bool IsComplete(Event event) = 0;
  // Ok when all that was queued before the event is done; DeadlineExceeded; or Internal with the device's fault.
  virtual absl::Status Wait(Event event, absl::Duration timeout) = 0;

  // The padded size that a step of `n` items runs at: graphs exist per bucket. The CPU returns n.
  virtual int Bucket(int n) const = 0;
  virtual size_t FreeMemory() const = 0;  // bytes that Allocate could still give
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_DEVICE_H_
