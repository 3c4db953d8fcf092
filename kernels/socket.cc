// Socket: descriptors that never block, and poll where one would.
#include "kernels/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace cachalot {
namespace {

using AddressInfo = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

absl::StatusOr<AddressInfo> Resolve(const std::string& address, bool to_listen) {
  const auto parts = SplitAddress(address);
  if (!parts.ok()) return parts.status();
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = to_listen ? AI_PASSIVE : 0;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(parts->first.c_str(), parts->second.c_str(), &hints, &found);
  if (error == 0 && found != nullptr) return AddressInfo(found, &freeaddrinfo);
  // NOTE: a name may come to be: a leader's is there once its pod is.
  return absl::UnavailableError(absl::StrCat("cannot resolve ", address, ": ", gai_strerror(error)));
}

Socket Open(const addrinfo& address) {
  return Socket(socket(address.ai_family, address.ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, address.ai_protocol));
}

absl::Status WaitFor(int fd, int16_t events, absl::Time deadline) {
  while (true) {
    const int64_t left = absl::ToInt64Milliseconds(absl::Ceil(deadline - absl::Now(), absl::Milliseconds(1)));
    pollfd waited = {.fd = fd, .events = events, .revents = 0};
    const int ready = poll(&waited, 1, static_cast<int>(std::clamp<int64_t>(left, 0, 60'000)));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return absl::UnavailableError(ErrorText(errno));
    if (left <= 0) return absl::DeadlineExceededError("nothing came in time");
  }
}

std::string NameOf(const sockaddr_storage& address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  const int error = getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, host, sizeof(host), port,
                                sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
  return error == 0 ? JoinAddress(host, port) : "";
}

bool WouldBlock() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

}  // namespace

std::string ErrorText(int error) { return std::generic_category().message(error); }

absl::StatusOr<std::pair<std::string, std::string>> SplitAddress(std::string_view address) {
  const size_t colon = address.rfind(':');
  std::string_view host = address.substr(0, colon);
  const std::string_view port = colon == std::string_view::npos ? "" : address.substr(colon + 1);
  const bool is_bracketed = host.size() >= 2 && host.front() == '[' && host.back() == ']';
  if (is_bracketed) host = host.substr(1, host.size() - 2);
  int number = 0;
  const bool is_port = absl::SimpleAtoi(absl::string_view(port.data(), port.size()), &number) && number >= 0;
  if (host.empty() || !is_port || number > 65535 || (!is_bracketed && host.find(':') != std::string_view::npos)) {
    return absl::InvalidArgumentError(absl::StrCat("found \"", std::string(address), "\", expected HOST:PORT"));
  }
  return std::pair(std::string(host), std::string(port));
}

std::string JoinAddress(std::string_view host, std::string_view port) {
  const bool has_colon = host.find(':') != std::string_view::npos;
  return absl::StrCat(has_colon ? "[" : "", std::string(host), has_colon ? "]:" : ":", std::string(port));
}

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<Socket> Socket::Listen(const std::string& address) {
  const auto found = Resolve(address, /*to_listen=*/true);
  if (!found.ok()) return found.status();
  Socket socket = Open(**found);
  const int on = 1;
  const bool is_listening =
      socket.fd() >= 0 && setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) == 0 &&
      bind(socket.fd(), (*found)->ai_addr, (*found)->ai_addrlen) == 0 && listen(socket.fd(), SOMAXCONN) == 0;
  if (is_listening) return socket;
  return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": ", ErrorText(errno)));
}

absl::StatusOr<Socket> Socket::Connect(const std::string& address, absl::Time deadline) {
  const auto found = Resolve(address, /*to_listen=*/false);
  if (!found.ok()) return found.status();
  const auto refused = [&address](const std::string& why) {
    return absl::UnavailableError(absl::StrCat("cannot connect to ", address, ": ", why));
  };
  Socket socket = Open(**found);
  if (socket.fd() < 0) return refused(ErrorText(errno));
  if (connect(socket.fd(), (*found)->ai_addr, (*found)->ai_addrlen) != 0) {
    if (errno != EINPROGRESS) return refused(ErrorText(errno));
    if (!WaitFor(socket.fd(), POLLOUT, deadline).ok()) return refused("no answer");
    int error = 0;
    socklen_t size = sizeof(error);
    if (getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &size) != 0) error = errno;
    if (error != 0) return refused(ErrorText(error));
  }
  const int on = 1;
  setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return socket;
}

absl::StatusOr<Socket> Socket::Accept(absl::Time deadline) const {
  while (true) {
    Socket socket(accept4(fd_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket.fd() >= 0) {
      const int on = 1;
      setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
      return socket;
    }
    // NOTE: of one that has hung up meanwhile, not of ours.
    const bool is_theirs = errno == ECONNABORTED || errno == EPROTO;
    if (!WouldBlock() && !is_theirs) return absl::UnavailableError(absl::StrCat("cannot accept: ", ErrorText(errno)));
    if (absl::Status status = WaitFor(fd_, POLLIN, deadline); !status.ok()) return status;
  }
}

absl::Status Socket::Send(std::string_view bytes, absl::Time deadline) const {
  while (!bytes.empty()) {
    const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent >= 0) {
      bytes.remove_prefix(sent);
      continue;
    }
    if (!WouldBlock()) return absl::UnavailableError(ErrorText(errno));
    if (absl::Status status = WaitFor(fd_, POLLOUT, deadline); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Socket::Receive(char* bytes, size_t size, absl::Time deadline) const {
  while (size > 0) {
    const ssize_t got = recv(fd_, bytes, size, 0);
    if (got == 0) return absl::UnavailableError("the connection was closed");
    if (got > 0) {
      bytes += got;
      size -= got;
      continue;
    }
    if (!WouldBlock()) return absl::UnavailableError(ErrorText(errno));
    if (absl::Status status = WaitFor(fd_, POLLIN, deadline); !status.ok()) return status;
  }
  return absl::OkStatus();
}

std::string Socket::local_address() const {
  sockaddr_storage address;
  socklen_t size = sizeof(address);
  return getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) == 0 ? NameOf(address, size) : "";
}

std::string Socket::peer_address() const {
  sockaddr_storage address;
  socklen_t size = sizeof(address);
  return getpeername(fd_, reinterpret_cast<sockaddr*>(&address), &size) == 0 ? NameOf(address, size) : "";
}

}  // namespace cachalot
