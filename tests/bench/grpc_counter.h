// A gRPC client of a few lines: it calls one method on many streams of one connection and frames and counts the
// messages of the answers (HTTP/2: RFC 9113; gRPC's framing: 5 bytes before each message). Frames, not contents: what
// the counter costs should not hide what the server does.
#ifndef CACHALOT_TESTS_BENCH_GRPC_COUNTER_H_
#define CACHALOT_TESTS_BENCH_GRPC_COUNTER_H_

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>

namespace cachalot {

class GrpcCounter {
 public:
  // What to send first.
  static std::string Preface() {
    // No window of a stream or of the connection is ever full: SETTINGS_INITIAL_WINDOW_SIZE, WINDOW_UPDATE.
    return "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Frame(kSettings, 0, 0, std::string("\0\4", 2) + Uint32(kMaxWindow)) +
           Frame(kWindowUpdate, 0, 0, Uint32(kMaxWindow - 65535));
  }

  // A call on stream `stream` (1, 3, 5...), with its only message.
  std::string Call(uint32_t stream, const std::string& path, const std::string& message) {
    streams_[stream];
    // HPACK (RFC 7541): indexed :method POST and :scheme http, the rest as literals that are not indexed.
    const std::string headers = std::string("\x83\x86") + '\x04' + Literal(path) + '\x01' + Literal("localhost") +
                                '\0' + Literal("te") + Literal("trailers") + "\x0f\x10" + Literal("application/grpc");
    return Frame(kHeaders, kEndHeaders, stream, headers) +
           Frame(kData, kEndStream, stream, std::string(1, '\0') + Uint32(message.size()) + message);
  }

  // Takes what came; false when every stream has ended, or one broke. What must be answered is appended to `reply`.
  bool Feed(const char* data, size_t size, std::string* reply) {
    in_.append(data, size);
    size_t at = 0;
    for (; in_.size() - at >= kFrameHeader;) {
      const auto* head = reinterpret_cast<const uint8_t*>(in_.data()) + at;
      const size_t length = head[0] << 16 | head[1] << 8 | head[2];
      if (in_.size() - at < kFrameHeader + length) break;
      const uint32_t stream = (head[5] & 0x7F) << 24 | head[6] << 16 | head[7] << 8 | head[8];
      if (!OnFrame(head[3], head[4], stream, std::string_view(in_).substr(at + kFrameHeader, length), reply))
        return false;
      at += kFrameHeader + length;
    }
    in_.erase(0, at);
    return !streams_.empty();
  }

  int64_t num_events() const { return num_events_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  static constexpr size_t kFrameHeader = 9;
  static constexpr uint32_t kMaxWindow = 0x7FFFFFFF;
  enum Type : uint8_t { kData = 0, kHeaders = 1, kReset = 3, kSettings = 4, kPing = 6, kGoAway = 7, kWindowUpdate = 8 };
  enum Flag : uint8_t { kEndStream = 1, kAck = 1, kEndHeaders = 4 };

  static std::string Uint32(uint64_t value) {
    return {static_cast<char>(value >> 24), static_cast<char>(value >> 16), static_cast<char>(value >> 8),
            static_cast<char>(value)};
  }
  static std::string Frame(uint8_t type, uint8_t flags, uint32_t stream, const std::string& payload) {
    return Uint32(payload.size()).substr(1) + static_cast<char>(type) + static_cast<char>(flags) + Uint32(stream) +
           payload;
  }
  static std::string Literal(const std::string& text) { return static_cast<char>(text.size()) + text; }

  bool OnFrame(uint8_t type, uint8_t flags, uint32_t stream, std::string_view payload, std::string* reply) {
    if (type == kSettings && (flags & kAck) == 0) *reply += Frame(kSettings, kAck, 0, "");
    if (type == kPing && (flags & kAck) == 0) *reply += Frame(kPing, kAck, 0, std::string(payload));
    if (type == kGoAway || type == kReset) return false;
    const auto found = streams_.find(stream);
    if (found == streams_.end()) return true;
    if (type == kData) CountMessages(payload, &found->second);
    if ((type == kData || type == kHeaders) && (flags & kEndStream) != 0) streams_.erase(found);
    return true;
  }

  // `pending`: the beginning of a message.
  void CountMessages(std::string_view data, std::string* pending) {
    if (!pending->empty()) {
      pending->append(data);
      data = *pending;
    }
    size_t at = 0;
    while (data.size() - at >= 5) {
      const auto* head = reinterpret_cast<const uint8_t*>(data.data()) + at;
      const size_t length = static_cast<size_t>(head[1]) << 24 | head[2] << 16 | head[3] << 8 | head[4];
      if (data.size() - at < 5 + length) break;
      at += 5 + length;
      ++num_events_;
      num_bytes_ += static_cast<int64_t>(length);
    }
    *pending = std::string(data.substr(at));
  }

  std::string in_;
  std::map<uint32_t, std::string> streams_;
  int64_t num_events_ = 0, num_bytes_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_BENCH_GRPC_COUNTER_H_
