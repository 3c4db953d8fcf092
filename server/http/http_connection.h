// HttpConnection: one client's connection: requests one after the other, one answer at a time.
#ifndef CACHALOT_SERVER_HTTP_HTTP_CONNECTION_H_
#define CACHALOT_SERVER_HTTP_HTTP_CONNECTION_H_

#include <array>
#include <atomic>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "server/http/http_server.h"
#include "server/mutex.h"

namespace cachalot {

// What connections share: limits, the way to the handlers, the way back.
struct HttpConnectionContext {
  const HttpOptions* options = nullptr;
  const HttpErrorFormat* error_format = nullptr;
  BodyBudget* bodies = nullptr;
  HttpHandler dispatch;                                   // routes; answers 404 and 405 itself
  std::function<void(std::function<void()>)> run_slowly;  // on a thread where it may take long
  std::function<void(uint64_t id)> on_closed;             // called once, on the connection's strand
};

// Everything runs on the socket's strand but Start, Drain, Close and the responders, which post to it. Keeps itself
// alive while an operation is under way. Bytes are read all the time, also while an answer is being made, so that a
// client that leaves is noticed at once; requests sent ahead wait in the buffer, up to its limit.
class HttpConnection : public std::enable_shared_from_this<HttpConnection> {
 public:
  HttpConnection(uint64_t id, boost::asio::ip::tcp::socket socket,
                 std::shared_ptr<const HttpConnectionContext> context);

  void Start();
  // Closes after the answer in progress; at once if there is none.
  void Drain();
  void Close();

 private:
  class Responder;
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;
  enum class State { kReading, kResponding, kLingering, kClosed };

  template <typename Function>
  void Post(Function function);

  // Reading.
  void ArmRead();
  void OnRead(boost::system::error_code error, size_t bytes);
  void Feed();
  bool FeedParser();
  void BeginRequest();
  bool OnHeader();
  void Dispatch();
  void Fail(int status, std::string_view message);
  void Refuse(HttpResponse response);
  void OnPeerClosed();

  // Responding. Each call names its request: what comes late is dropped.
  void Respond(uint64_t request, HttpResponse response);
  void BeginResponse();
  void BeginBody(uint64_t request, const HttpResponse& head);
  void TakeBody();
  void EndBody();
  void End(uint64_t request);
  void SetOnDisconnect(uint64_t request, std::function<void()> callback);
  bool IsCurrent(uint64_t request) const { return state_ == State::kResponding && request == request_ && !has_ended_; }
  std::string Head(const HttpResponse& response, std::optional<size_t> body_bytes) const;
  void Queue(std::string bytes);
  void Pump();
  void OnWritable(boost::system::error_code error);
  void FinishResponse();

  // Closing.
  void Linger();
  void CloseNow();
  void FireDisconnect();

  void SetDeadline(absl::Duration timeout, void (HttpConnection::*on_expiry)());
  void ClearDeadline();
  void OnIdleTimeout() { CloseNow(); }
  void OnRequestTimeout();
  void OnWriteTimeout() { CloseNow(); }

  const uint64_t id_;
  boost::asio::ip::tcp::socket socket_;
  const std::shared_ptr<const HttpConnectionContext> context_;
  const HttpOptions& options_;
  State state_ = State::kReading;

  // NOTE: not read into `in_` directly: it is consumed while a read is under way.
  std::array<char, 16 << 10> read_bytes_;
  boost::beast::flat_buffer in_;
  std::optional<Parser> parser_;  // of a request whose first byte has come
  BodyBudget::Share body_share_;  // its body's
  bool header_seen_ = false;
  bool is_reading_ = false;
  std::atomic<bool> peer_closed_ = false;  // set on the strand
  size_t lingered_bytes_ = 0;

  uint64_t request_ = 0;  // number of the request being answered
  bool is_head_ = false, is_http10_ = false, keep_alive_ = true, is_draining_ = false;
  bool has_begun_ = false, has_ended_ = false, is_chunked_ = false;
  std::function<void()> on_disconnect_;

  std::deque<std::string> out_;  // waits to be written or is being written
  size_t out_offset_ = 0;        // bytes of its first piece that have been written
  bool is_writing_ = false;

  // What Write calls have brought since the strand last looked. A token a write, for many connections: one lock here,
  // and one post for all that come before the socket can take more.
  mutable Mutex body_mutex_;
  std::string body_ ABSL_GUARDED_BY(body_mutex_);
  uint64_t body_request_ ABSL_GUARDED_BY(body_mutex_) = 0;  // whose it is; 0: nobody's, not wanted

  boost::asio::steady_timer timer_;
  uint64_t deadline_ = 0;  // number of the deadline set last
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_HTTP_CONNECTION_H_
