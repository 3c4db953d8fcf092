// A reader of frame headers and two purses.
#include "server/grpc/http2_guard.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

constexpr std::string_view kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr uint8_t kEndStream = 0x1, kAck = 0x1, kEndHeaders = 0x4;
// A frame of DATA with less than that carries nothing: a message is sent in frames as large as windows allow.
constexpr size_t kSmallData = 1024;
// A client answers what it gets with frames of its own (WINDOW_UPDATE, PING): at most one for so many bytes. NOTE: more
// than what the server answers to any of those itself, so that none of them pays for the next.
constexpr double kBytesAFrame = 32, kBytesAReset = 1024;
constexpr double kFramesAPing = 20;    // gRPC writes an answer at once, by itself
constexpr double kPayloadAFrame = 64;  // of a control frame: what it costs to read

}  // namespace

absl::Status Http2Guard::OnReceived(std::string_view bytes, absl::Time now) {
  while (!bytes.empty()) {
    if (num_preface_ < kPreface.size()) {
      if (bytes.front() != kPreface[num_preface_++]) return absl::InvalidArgumentError("this is not HTTP/2");
      bytes.remove_prefix(1);
    } else if (payload_left_ > 0) {
      const size_t skipped = std::min(payload_left_, bytes.size());
      payload_left_ -= skipped;
      bytes.remove_prefix(skipped);
    } else {
      header_[num_header_++] = static_cast<uint8_t>(bytes.front());
      bytes.remove_prefix(1);
      if (num_header_ < sizeof(header_)) continue;
      num_header_ = 0;
      length_ = payload_left_ = header_[0] << 16 | header_[1] << 8 | header_[2];
      type_ = header_[3];
      flags_ = header_[4];
      stream_ = (header_[5] & 0x7Fu) << 24 | header_[6] << 16 | header_[7] << 8 | header_[8];
      if (absl::Status status = OnFrame(now); !status.ok()) return status;
    }
  }
  return absl::OkStatus();
}

void Http2Guard::OnSent(size_t bytes) {
  frames_ = std::min(kFrames, frames_ + static_cast<double>(bytes) / kBytesAFrame);
  resets_ = std::min(kResets, resets_ + static_cast<double>(bytes) / kBytesAReset);
}

absl::Status Http2Guard::OnFrame(absl::Time now) {
  if (!has_settings_ && type_ != kSettings) return absl::InvalidArgumentError("HTTP/2 begins with settings");
  if (is_in_block_ != (type_ == kContinuation)) return absl::InvalidArgumentError("a header block was interrupted");
  if (type_ == kHeaders || type_ == kContinuation) return OnHeaderBlock(type_ == kContinuation);
  if (type_ == kData) {
    return length_ < kSmallData ? Spend(1, 0, now) : absl::OkStatus();
  }
  if (length_ > kMaxControlFrame) {
    return absl::ResourceExhaustedError(absl::StrCat("a frame of type ", type_, " has ", length_, " bytes"));
  }
  if (type_ == kSettings) {
    has_settings_ = true;
    has_acknowledged_ = has_acknowledged_ || (flags_ & kAck) != 0;
  }
  if (type_ == kReset) ++num_resets_;
  const double base = type_ == kPing && (flags_ & kAck) == 0 ? kFramesAPing : 1;
  return Spend(base + static_cast<double>(length_) / kPayloadAFrame, type_ == kReset ? 1 : 0, now);
}

absl::Status Http2Guard::OnHeaderBlock(bool is_continuation) {
  block_bytes_ = is_continuation ? block_bytes_ + length_ : length_;
  num_continuations_ = is_continuation ? num_continuations_ + 1 : 0;
  is_in_block_ = (flags_ & kEndHeaders) == 0;
  if (block_bytes_ > kMaxHeaderBlock || num_continuations_ > kMaxContinuations) {
    return absl::ResourceExhaustedError("a header block is too large");
  }
  if (is_continuation) return absl::OkStatus();
  if (stream_ <= last_stream_) return Spend(1, 0, updated_);  // trailers, which calls of ours do not have
  last_stream_ = stream_;
  // NOTE: before the client has acknowledged the limit of streams, gRPC does not hold it to that.
  if (!has_acknowledged_ && stream_ / 2 >= kMaxStreams) {
    return absl::ResourceExhaustedError("too many calls before the settings were acknowledged");
  }
  if ((flags_ & kEndStream) == 0) frames_ = std::min(kFrames, frames_ + 1);  // its message may be small
  return absl::OkStatus();
}

absl::Status Http2Guard::Spend(double frames, double resets, absl::Time now) {
  const double seconds = std::max(0.0, absl::ToDoubleSeconds(now - updated_));
  updated_ = now;
  frames_ = std::min(kFrames, frames_ + seconds * kFrameRate) - frames;
  resets_ = std::min(kResets, resets_ + seconds * kResetRate) - resets;
  if (resets_ < 0) return absl::ResourceExhaustedError("too many calls were reset");
  if (frames_ < 0) return absl::ResourceExhaustedError("too many frames that carry nothing");
  return absl::OkStatus();
}

absl::Duration ResetRate::Spend(int num_resets, absl::Time now) {
  if (num_resets == 0) return absl::ZeroDuration();
  MutexLock lock(&mutex_);
  left_ = std::min(kResets, left_ + std::max(0.0, absl::ToDoubleSeconds(now - updated_)) * kResetRate) - num_resets;
  updated_ = std::max(updated_, now);
  return left_ >= 0 ? absl::ZeroDuration() : absl::Seconds(-left_ / kResetRate);
}

}  // namespace cachalot
