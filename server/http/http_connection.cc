// HttpConnection: one read loop feeds the parser, one write loop empties the queue, one timer watches whoever is
// awaited.
#include "server/http/http_connection.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/field.hpp>
#include <boost/beast/http/rfc7230.hpp>
#include <boost/beast/http/status.hpp>
#include <cstddef>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace cachalot {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

constexpr size_t kMaxReadAheadBytes = 256 << 10;  // requests sent ahead of their turn
constexpr size_t kMaxWritePieces = 64;            // of one write
constexpr int kMaxUnsentBytes = 128 << 10;        // in the socket
constexpr absl::Duration kLingerTime = absl::Seconds(5);
constexpr size_t kMaxLingerBytes = 64 << 20;

std::string PercentDecode(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    const bool is_escape =
        text[i] == '%' && i + 2 < text.size() && absl::ascii_isxdigit(text[i + 1]) && absl::ascii_isxdigit(text[i + 2]);
    if (!is_escape) {
      out.push_back(text[i]);
      continue;
    }
    out += absl::HexStringToBytes(absl::string_view(text.data() + i + 1, 2));
    i += 2;
  }
  return out;
}

// The answer to bytes that are no request, or none that we take.
std::pair<int, std::string_view> ParseFailure(const error_code& error) {
  if (error == http::error::header_limit) return {431, "the request's header is too large"};
  if (error == http::error::body_limit) return {413, "the request's body is too large"};
  if (error == http::error::buffer_overflow) return {413, "the request's body is too large"};
  return {400, "this is not a well-formed HTTP/1.1 request"};
}

}  // namespace

// Posts to the connection; answers 500 if nobody did.
class HttpConnection::Responder : public HttpResponder, public std::enable_shared_from_this<Responder> {
 public:
  Responder(std::shared_ptr<HttpConnection> connection, uint64_t request)
      : connection_(std::move(connection)), request_(request) {}

  ~Responder() override {
    connection_->Post([request = request_](HttpConnection* connection) {
      if (!connection->IsCurrent(request)) return;
      if (connection->has_begun_) return connection->CloseNow();
      connection->Respond(request, (*connection->context_->error_format)(500, "the request was not answered"));
    });
  }
  void Respond(HttpResponse response) override {
    connection_->Post([request = request_, response = std::move(response)](HttpConnection* connection) mutable {
      connection->Respond(request, std::move(response));
    });
  }
  void RespondWith(std::function<HttpResponse()> make) override {
    connection_->context_->run_slowly([self = shared_from_this(), make = std::move(make)] { self->Respond(make()); });
  }
  bool IsWanted() const override { return !connection_->peer_closed_; }
  void Close() override {
    connection_->Post([request = request_](HttpConnection* connection) {
      if (request == connection->request_ && !connection->has_ended_) connection->CloseNow();
    });
  }
  void Begin(HttpResponse head) override {
    const std::string body = std::move(head.body);
    connection_->Post([request = request_, head = std::move(head)](HttpConnection* connection) {
      connection->BeginBody(request, head);
    });
    Write(body);
  }
  void Write(std::string_view bytes) override {
    if (bytes.empty()) return;
    {
      std::lock_guard lock(connection_->body_mutex_);
      if (connection_->body_request_ != request_) return;
      connection_->body_ += bytes;
      if (connection_->body_.size() > bytes.size()) return;  // whoever wrote first has posted
    }
    connection_->Post([](HttpConnection* connection) { connection->Pump(); });
  }
  size_t Backlog() const override {
    std::lock_guard lock(connection_->body_mutex_);
    return connection_->body_request_ == request_ ? connection_->body_.size() : 0;
  }
  void End() override {
    {
      std::lock_guard lock(connection_->body_mutex_);
      if (connection_->body_request_ == request_) connection_->body_request_ = 0;
    }
    connection_->Post([request = request_](HttpConnection* connection) { connection->End(request); });
  }
  void OnDisconnect(std::function<void()> callback) override {
    connection_->Post([request = request_, callback = std::move(callback)](HttpConnection* connection) mutable {
      connection->SetOnDisconnect(request, std::move(callback));
    });
  }

 private:
  const std::shared_ptr<HttpConnection> connection_;
  const uint64_t request_;
};

HttpConnection::HttpConnection(uint64_t id, asio::ip::tcp::socket socket,
                               std::shared_ptr<const HttpConnectionContext> context)
    : id_(id),
      socket_(std::move(socket)),
      context_(std::move(context)),
      options_(*context_->options),
      timer_(socket_.get_executor()) {}

template <typename Function>
void HttpConnection::Post(Function function) {
  asio::post(socket_.get_executor(),
             [self = shared_from_this(), function = std::move(function)]() mutable { function(self.get()); });
}

void HttpConnection::Start() {
  Post([](HttpConnection* self) {
    error_code ignored;
    self->socket_.set_option(asio::ip::tcp::no_delay(true), ignored);
    self->socket_.non_blocking(true, ignored);
    // NOTE: what a slow client does not take waits here, where it can be joined, not in megabytes of the kernel's.
    setsockopt(self->socket_.native_handle(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kMaxUnsentBytes,
               sizeof(kMaxUnsentBytes));
    self->Feed();
  });
}

void HttpConnection::Drain() {
  Post([](HttpConnection* self) {
    self->is_draining_ = true;
    if (self->state_ == State::kReading) self->CloseNow();
  });
}

void HttpConnection::Close() {
  Post([](HttpConnection* self) { self->CloseNow(); });
}

// --- Reading ---

void HttpConnection::ArmRead() {
  if (is_reading_ || peer_closed_ || state_ == State::kClosed) return;
  if (in_.size() >= kMaxReadAheadBytes) return;  // goes on when the requests ahead have been answered
  is_reading_ = true;
  socket_.async_read_some(asio::buffer(read_bytes_),
                          [self = shared_from_this()](error_code error, size_t bytes) { self->OnRead(error, bytes); });
}

void HttpConnection::OnRead(error_code error, size_t bytes) {
  is_reading_ = false;
  if (state_ == State::kClosed) return;
  if (error == asio::error::eof) return OnPeerClosed();
  if (error) return CloseNow();
  in_.commit(asio::buffer_copy(in_.prepare(bytes), asio::buffer(read_bytes_, bytes)));
  switch (state_) {
    case State::kReading: return Feed();
    case State::kLingering:
      lingered_bytes_ += bytes;
      in_.consume(in_.size());
      if (lingered_bytes_ > kMaxLingerBytes) return CloseNow();
      return ArmRead();
    default: return ArmRead();
  }
}

// A client that only closed its sending half can still take an answer, if one is made at once.
void HttpConnection::OnPeerClosed() {
  peer_closed_ = true;
  if (state_ == State::kResponding) return FireDisconnect();
  CloseNow();
}

void HttpConnection::Feed() {
  while (state_ == State::kReading) {
    if (!parser_.has_value()) {
      const std::string_view ahead(static_cast<const char*>(in_.data().data()), in_.size());
      in_.consume(std::min(ahead.find_first_not_of("\r\n"), ahead.size()));  // RFC 9112, 2.2
      if (in_.size() == 0) {
        if (is_draining_ || peer_closed_) return CloseNow();
        SetDeadline(options_.idle_timeout, &HttpConnection::OnIdleTimeout);
        break;
      }
      BeginRequest();
    }
    if (!FeedParser()) break;
  }
  if (peer_closed_ && state_ == State::kReading) return CloseNow();  // the rest of the request will not come
  ArmRead();
}

// True if there may be more to do without more bytes.
bool HttpConnection::FeedParser() {
  error_code error;
  const size_t used = parser_->put(in_.data(), error);
  in_.consume(used);
  const bool needs_more = error == http::error::need_more;
  if (error && !needs_more) {
    const auto [status, message] = ParseFailure(error);
    Fail(status, message);
    return false;
  }
  if (!header_seen_ && parser_->is_header_done() && !OnHeader()) return false;
  if (parser_->is_done()) {
    Dispatch();
    return true;
  }
  if (in_.size() >= kMaxReadAheadBytes) {  // a chunk header without end
    Fail(400, "this is not a well-formed HTTP/1.1 request");
    return false;
  }
  return !needs_more && used > 0 && in_.size() > 0;
}

void HttpConnection::BeginRequest() {
  parser_.emplace();
  parser_->header_limit(static_cast<uint32_t>(options_.max_header_bytes));
  parser_->body_limit(options_.max_body_bytes);
  parser_->eager(true);
  header_seen_ = false;
  SetDeadline(options_.header_timeout, &HttpConnection::OnRequestTimeout);
}

// False if the request is not to be read on.
bool HttpConnection::OnHeader() {
  header_seen_ = true;
  // NOTE: what is said to have another coding has a length that we do not know: reading on could take a body for the
  // next request.
  if (parser_->get().count(http::field::transfer_encoding) > 0 && !parser_->chunked()) {
    Fail(501, "the only transfer coding known here is chunked");
    return false;
  }
  SetDeadline(options_.body_timeout, &HttpConnection::OnRequestTimeout);
  const bool wants_continue = boost::beast::iequals(parser_->get()[http::field::expect], "100-continue");
  if (!wants_continue || parser_->is_done() || parser_->get().version() < 11) return true;
  Queue("HTTP/1.1 100 Continue\r\n\r\n");
  Pump();
  return state_ != State::kClosed;
}

void HttpConnection::Dispatch() {
  Parser::value_type message = parser_->release();
  parser_.reset();
  ClearDeadline();
  BeginResponse();
  is_head_ = message.method() == http::verb::head;
  is_http10_ = message.version() < 11;
  keep_alive_ = message.keep_alive();

  std::string_view target(message.target().data(), message.target().size());
  if (const size_t scheme = target.find("://"); scheme != std::string_view::npos && target[0] != '/') {
    target = target.substr(std::min(target.find('/', scheme + 3), target.size()));  // absolute form: RFC 9112, 3.2.2
    if (target.empty()) target = "/";
  }
  const size_t question = std::min(target.find('?'), target.size());
  HttpRequest request;
  request.method = std::string(message.method_string());
  request.path = PercentDecode(target.substr(0, question));
  request.query = target.substr(std::min(question + 1, target.size()));
  request.body = std::move(message.body());
  request.client = absl::StrCat("http ", id_);
  auto responder = std::make_shared<Responder>(shared_from_this(), request_);
  if (is_draining_) return responder->Respond((*context_->error_format)(503, "the server is stopping"));
  context_->dispatch(std::move(request), std::move(responder));
}

void HttpConnection::Fail(int status, std::string_view message) {
  parser_.reset();
  ClearDeadline();
  BeginResponse();
  is_head_ = keep_alive_ = false;
  Respond(request_, (*context_->error_format)(status, message));
}

void HttpConnection::OnRequestTimeout() { Fail(408, "the request did not come in time"); }

// --- Responding ---

void HttpConnection::BeginResponse() {
  state_ = State::kResponding;
  ++request_;
  has_begun_ = has_ended_ = is_chunked_ = false;
  std::lock_guard lock(body_mutex_);
  body_.clear();
  body_request_ = request_;
}

std::string HttpConnection::Head(const HttpResponse& response, std::optional<size_t> body_bytes) const {
  const boost::beast::string_view reason = http::obsolete_reason(http::int_to_status(response.status));
  std::string head = absl::StrCat(
      "HTTP/1.1 ", response.status, " ", absl::string_view(reason.data(), reason.size()),
      "\r\nDate: ", absl::FormatTime("%a, %d %b %Y %H:%M:%S GMT", absl::Now(), absl::UTCTimeZone()), "\r\n");
  if (!response.content_type.empty()) absl::StrAppend(&head, "Content-Type: ", response.content_type, "\r\n");
  if (body_bytes.has_value()) {
    absl::StrAppend(&head, "Content-Length: ", *body_bytes, "\r\n");
  } else if (is_chunked_) {
    absl::StrAppend(&head, "Transfer-Encoding: chunked\r\n");
  }
  absl::StrAppend(&head, "Connection: ", keep_alive_ ? "keep-alive" : "close", "\r\n");
  for (const auto& [name, value] : response.headers) absl::StrAppend(&head, name, ": ", value, "\r\n");
  return absl::StrCat(head, "\r\n");
}

void HttpConnection::Respond(uint64_t request, HttpResponse response) {
  if (!IsCurrent(request) || has_begun_) return;
  has_begun_ = true;
  EndBody();
  if (is_draining_ || response.closes) keep_alive_ = false;
  Queue(Head(response, response.body.size()));
  if (!is_head_) Queue(std::move(response.body));
  Pump();
}

void HttpConnection::BeginBody(uint64_t request, const HttpResponse& head) {
  if (!IsCurrent(request) || has_begun_) return;
  has_begun_ = true;
  is_chunked_ = !is_http10_;
  if (is_draining_ || is_http10_) keep_alive_ = false;  // HTTP/1.0 has no other way to end a body of unknown length
  Queue(Head(head, std::nullopt));
  Pump();
}

// One chunk of all that has been written since the last one.
void HttpConnection::TakeBody() {
  if (!has_begun_) return;
  std::string bytes;
  {
    std::lock_guard lock(body_mutex_);
    bytes.swap(body_);
  }
  if (bytes.empty() || is_head_) return;
  Queue(is_chunked_ ? absl::StrCat(absl::Hex(bytes.size()), "\r\n", bytes, "\r\n") : std::move(bytes));
}

void HttpConnection::End(uint64_t request) {
  if (!IsCurrent(request) || !has_begun_) return;
  TakeBody();
  EndBody();
  if (is_chunked_ && !is_head_) Queue("0\r\n\r\n");
  Pump();
}

// From here on writes are dropped.
void HttpConnection::EndBody() {
  has_ended_ = true;
  on_disconnect_ = nullptr;
  std::lock_guard lock(body_mutex_);
  body_.clear();
  body_request_ = 0;
}

void HttpConnection::SetOnDisconnect(uint64_t request, std::function<void()> callback) {
  if (request != request_ || has_ended_) return;
  on_disconnect_ = std::move(callback);
  if (peer_closed_ || state_ == State::kClosed) FireDisconnect();
}

void HttpConnection::Queue(std::string bytes) {
  if (state_ != State::kClosed && !bytes.empty()) out_.push_back(std::move(bytes));
}

// Writes what the socket takes at once, and waits for it only when it takes no more: a token then costs a send and
// neither a trip through the event loop nor a timer. One deadline for each wait, not for the whole queue.
void HttpConnection::Pump() {
  while (!is_writing_ && state_ != State::kClosed) {
    if (out_.empty()) TakeBody();
    if (out_.empty()) {
      if (state_ == State::kResponding && has_ended_) FinishResponse();
      return;
    }
    std::vector<asio::const_buffer> buffers;
    size_t skip = out_offset_;
    for (const std::string& piece : out_) {
      buffers.push_back(asio::buffer(piece) + skip);
      skip = 0;
      if (buffers.size() == kMaxWritePieces) break;
    }
    error_code error;
    const size_t bytes = socket_.write_some(buffers, error);
    if (error == asio::error::would_block) {
      is_writing_ = true;
      if (state_ == State::kResponding) SetDeadline(options_.write_timeout, &HttpConnection::OnWriteTimeout);
      return socket_.async_wait(asio::ip::tcp::socket::wait_write,
                                [self = shared_from_this()](error_code error) { self->OnWritable(error); });
    }
    if (error) return CloseNow();
    for (out_offset_ += bytes; !out_.empty() && out_offset_ >= out_.front().size(); out_.pop_front()) {
      out_offset_ -= out_.front().size();
    }
  }
}

void HttpConnection::OnWritable(error_code error) {
  is_writing_ = false;
  if (state_ == State::kClosed) return;
  if (error) return CloseNow();
  if (state_ == State::kResponding) ClearDeadline();
  Pump();
}

void HttpConnection::FinishResponse() {
  ClearDeadline();
  if (!keep_alive_ || is_draining_) return Linger();
  state_ = State::kReading;
  Feed();
}

// --- Closing ---

// Closing with bytes unread would reset the connection and could take the answer with it.
void HttpConnection::Linger() {
  if (peer_closed_) return CloseNow();
  error_code ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  state_ = State::kLingering;
  in_.consume(in_.size());
  SetDeadline(kLingerTime, &HttpConnection::OnIdleTimeout);
  ArmRead();
}

void HttpConnection::CloseNow() {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  ClearDeadline();
  {
    std::lock_guard lock(body_mutex_);
    body_.clear();
    body_request_ = 0;
  }
  error_code ignored;
  socket_.close(ignored);
  FireDisconnect();
  context_->on_closed(id_);
}

void HttpConnection::FireDisconnect() {
  if (on_disconnect_ == nullptr) return;
  std::exchange(on_disconnect_, nullptr)();
}

// --- Deadlines ---

void HttpConnection::SetDeadline(absl::Duration timeout, void (HttpConnection::*on_expiry)()) {
  timer_.expires_after(absl::ToChronoNanoseconds(timeout));
  timer_.async_wait([self = shared_from_this(), deadline = ++deadline_, on_expiry](error_code) {
    if (deadline == self->deadline_ && self->state_ != State::kClosed) (self.get()->*on_expiry)();
  });
}

void HttpConnection::ClearDeadline() {
  ++deadline_;
  timer_.cancel();
}

}  // namespace cachalot
