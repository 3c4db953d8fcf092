// Two loops that read what is there and write what is taken.
#include "server/grpc/grpc_relay.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/buffer.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>
#include <utility>

#include "absl/time/clock.h"

namespace cachalot {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using asio::local::stream_protocol;
using boost::system::error_code;

constexpr size_t kPieceBytes = 64 << 10;  // of one read
constexpr int kMaxPieces = 8;             // in a row, before other connections have their turn
constexpr int kMaxUnsentBytes = 128 << 10;

}  // namespace

GrpcRelay::GrpcRelay(tcp::socket client, const GrpcFrontOptions& options, ResetRate* reset_rate,
                     std::function<void()> on_closed)
    : options_(options),
      reset_rate_(*reset_rate),
      client_(std::move(client)),
      server_(client_.get_executor()),
      guard_(absl::Now()),
      on_closed_(std::move(on_closed)),
      pause_(client_.get_executor()),
      timer_(client_.get_executor()) {}

int GrpcRelay::Open() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0) return -1;
  error_code error;
  server_.assign(stream_protocol(), ends[0], error);
  if (!error) return ends[1];
  close(ends[0]);
  close(ends[1]);
  return -1;
}

void GrpcRelay::Start() {
  asio::post(client_.get_executor(), [self = shared_from_this()] {
    error_code ignored;
    self->client_.non_blocking(true, ignored);
    self->server_.non_blocking(true, ignored);
    self->client_.set_option(tcp::no_delay(true), ignored);
    // NOTE: what a slow client does not take stays with gRPC, which counts it, not in megabytes of the kernel's.
    setsockopt(self->client_.native_handle(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kMaxUnsentBytes,
               sizeof(kMaxUnsentBytes));
    self->SetDeadline(self->options_.begin_timeout);
    self->FromClient();
    self->FromServer();
  });
}

void GrpcRelay::Close() {
  asio::post(client_.get_executor(), [self = shared_from_this()] { self->CloseNow(); });
}

void GrpcRelay::FromClient() { Pump(&client_, &server_, &to_server_, &GrpcRelay::FromClient); }

void GrpcRelay::FromServer() { Pump(&server_, &client_, &to_client_, &GrpcRelay::FromServer); }

template <typename From, typename To>
void GrpcRelay::Pump(From* from, To* to, std::string* pending, void (GrpcRelay::*again)()) {
  char piece[kPieceBytes];
  for (int i = 0; i < kMaxPieces && !is_closed_; ++i) {
    if (!pending->empty()) {
      const std::string bytes = std::exchange(*pending, {});
      if (!Write(to, bytes, pending)) return Await(to, asio::socket_base::wait_write, again);
    }
    error_code error;
    const size_t size = from->read_some(asio::buffer(piece), error);
    if (error == asio::error::would_block) return Await(from, asio::socket_base::wait_read, again);
    if (error == asio::error::eof) return OnEnd(from);
    if (error) return CloseNow();
    const std::string_view bytes(piece, size);
    if (const absl::Duration pause = OnRead(from, bytes); pause > absl::ZeroDuration()) {
      pending->assign(bytes);
      return Pause(pause, again);
    }
    if (is_closed_) return;
    if (!Write(to, bytes, pending)) return Await(to, asio::socket_base::wait_write, again);
    if (size < sizeof(piece)) return Await(from, asio::socket_base::wait_read, again);
  }
  if (is_closed_) return;
  asio::post(client_.get_executor(), [self = shared_from_this(), again] { (self.get()->*again)(); });
}

// True if all of it was taken; otherwise the rest is in `pending`.
template <typename To>
bool GrpcRelay::Write(To* to, std::string_view bytes, std::string* pending) {
  while (!bytes.empty()) {
    error_code error;
    const size_t size = to->write_some(asio::buffer(bytes.data(), bytes.size()), error);
    if (error == asio::error::would_block) break;
    if (error) {
      CloseNow();
      break;
    }
    bytes.remove_prefix(size);
  }
  pending->assign(bytes);
  return bytes.empty();
}

template <typename Socket>
void GrpcRelay::Await(Socket* socket, asio::socket_base::wait_type what, void (GrpcRelay::*then)()) {
  if (is_closed_) return;
  const bool is_slow_client = socket == static_cast<void*>(&client_) && what == asio::socket_base::wait_write;
  if (is_slow_client) SetDeadline(options_.write_timeout);
  socket->async_wait(what, [self = shared_from_this(), is_slow_client, then](error_code error) {
    if (self->is_closed_) return;
    if (error) return self->CloseNow();
    if (is_slow_client) self->ClearDeadline();
    (self.get()->*then)();
  });
}

absl::Duration GrpcRelay::OnRead(const tcp::socket*, std::string_view bytes) {
  const bool had_begun = guard_.has_begun();
  const absl::Time now = absl::Now();
  if (const absl::Status status = guard_.OnReceived(bytes, now); !status.ok()) {
    error_code ignored;
    const auto client = client_.remote_endpoint(ignored);
    spdlog::warn("gRPC: the connection of {} port {} was cut: {}", client.address().to_string(), client.port(),
                 std::string(status.message()));
    CloseNow();
    return absl::ZeroDuration();
  }
  if (!had_begun && guard_.has_begun()) ClearDeadline();
  return reset_rate_.Spend(guard_.TakeResets(), now);
}

absl::Duration GrpcRelay::OnRead(const stream_protocol::socket*, std::string_view bytes) {
  guard_.OnSent(bytes.size());
  return absl::ZeroDuration();
}

void GrpcRelay::Pause(absl::Duration pause, void (GrpcRelay::*then)()) {
  pause_.expires_after(absl::ToChronoNanoseconds(pause));
  pause_.async_wait([self = shared_from_this(), then](error_code) { (self.get()->*then)(); });
}

// gRPC ends its side when it has seen the client's end.
void GrpcRelay::OnEnd(const tcp::socket*) {
  error_code ignored;
  server_.shutdown(stream_protocol::socket::shutdown_send, ignored);
}

void GrpcRelay::OnEnd(const stream_protocol::socket*) { CloseNow(); }

void GrpcRelay::CloseNow() {
  if (std::exchange(is_closed_, true)) return;
  ClearDeadline();
  pause_.cancel();
  error_code ignored;
  client_.shutdown(tcp::socket::shutdown_both, ignored);
  client_.close(ignored);
  server_.close(ignored);
  on_closed_();
}

void GrpcRelay::SetDeadline(absl::Duration timeout) {
  timer_.expires_after(absl::ToChronoNanoseconds(timeout));
  timer_.async_wait([self = shared_from_this(), deadline = ++deadline_](error_code) {
    if (deadline == self->deadline_) self->CloseNow();
  });
}

void GrpcRelay::ClearDeadline() {
  ++deadline_;
  timer_.cancel();
}

}  // namespace cachalot
