// Http2Guard: what a client may cost before its connection is cut: it watches the frames that one sends.
#ifndef CACHALOT_SERVER_GRPC_HTTP2_GUARD_H_
#define CACHALOT_SERVER_GRPC_HTTP2_GUARD_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/mutex.h"

namespace cachalot {

// Reads the headers of frames (RFC 9113, 4.1) and nothing within them. gRPC 1.51 bounds neither a header block that
// does not end nor frames that carry nothing, and takes a call that is reset at once for ended while it still works on
// it. For one thread at a time.
class Http2Guard {
 public:
  static constexpr uint32_t kMaxStreams = 1000;                 // at once: to be told to gRPC, which refuses more
  static constexpr size_t kMaxHeaderBlock = 64 << 10;           // bytes, compressed; with all its CONTINUATION frames
  static constexpr int kMaxContinuations = 16;                  // frames of a header block
  static constexpr size_t kMaxControlFrame = 16384;             // bytes of a frame that is neither DATA nor of a block
  static constexpr double kFrames = 10'000, kFrameRate = 1000;  // that carry nothing: at once, a second
  static constexpr double kResets = 1000, kResetRate = 100;     // calls that the client resets: at once, a second

  explicit Http2Guard(absl::Time now) : updated_(now) {}

  // Looks at what the client sent next. An error, which says what for, means: cut the connection.
  absl::Status OnReceived(std::string_view bytes, absl::Time now);
  // Told of what is sent to the client: it acknowledges some of it, and so may send more itself.
  void OnSent(size_t bytes);

  // Calls that were reset since this was last asked.
  int TakeResets() { return std::exchange(num_resets_, 0); }

  // The client has sent its preface and its settings.
  bool has_begun() const { return has_settings_; }

 private:
  enum Type : uint8_t { kData, kHeaders, kPriority, kReset, kSettings, kPushPromise, kPing, kGoAway, kWindowUpdate };
  static constexpr uint8_t kContinuation = 9;

  absl::Status OnFrame(absl::Time now);
  absl::Status OnHeaderBlock(bool is_continuation);
  absl::Status Spend(double frames, double resets, absl::Time now);

  size_t num_preface_ = 0;  // bytes of it seen
  uint8_t header_[9] = {};  // of the frame that is being read
  size_t num_header_ = 0;
  size_t payload_left_ = 0;  // of the frame whose header has been read

  size_t length_ = 0;  // the frame's header, read
  uint8_t type_ = 0, flags_ = 0;
  uint32_t stream_ = 0;

  bool has_settings_ = false, has_acknowledged_ = false, is_in_block_ = false;
  size_t block_bytes_ = 0;
  int num_continuations_ = 0;
  uint32_t last_stream_ = 0;
  double frames_ = kFrames, resets_ = kResets;  // what may still be spent
  int num_resets_ = 0;
  absl::Time updated_;
};

// What all clients together may reset: a call that was reset goes on for a while, and a client that was cut comes
// again. Any thread.
class ResetRate {
 public:
  static constexpr double kResets = 2000, kResetRate = 2000;  // at once, a second

  explicit ResetRate(absl::Time now) : updated_(now) {}
  // How long a client that reset so many calls is to be kept waiting.
  absl::Duration Spend(int num_resets, absl::Time now);

 private:
  Mutex mutex_;
  double left_ ABSL_GUARDED_BY(mutex_) = kResets;  // less than none: what those who wait have spent
  absl::Time updated_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_HTTP2_GUARD_H_
