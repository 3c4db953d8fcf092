// Socket: a TCP connection, or what listens for some; every wait has a deadline.
#ifndef CACHALOT_KERNELS_SOCKET_H_
#define CACHALOT_KERNELS_SOCKET_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace cachalot {

// Owns a descriptor, which never blocks. Addresses are HOST:PORT, of IPv6 [HOST]:PORT; a host may be a name.
// InvalidArgument for what is none, Unavailable for what the network refuses, DeadlineExceeded.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();

  static absl::StatusOr<Socket> Listen(const std::string& address);  // port 0: any that is free
  static absl::StatusOr<Socket> Connect(const std::string& address, absl::Time deadline);
  absl::StatusOr<Socket> Accept(absl::Time deadline) const;

  // All of it. Unavailable when the other end has closed.
  absl::Status Send(std::string_view bytes, absl::Time deadline) const;
  absl::Status Receive(char* bytes, size_t size, absl::Time deadline) const;

  int fd() const { return fd_; }  // -1: none
  // In numbers; "" where it has none.
  std::string local_address() const;
  std::string peer_address() const;

 private:
  int fd_ = -1;
};

// "[::1]:80" -> "::1" and "80". InvalidArgument where it is no HOST:PORT.
absl::StatusOr<std::pair<std::string, std::string>> SplitAddress(std::string_view address);
std::string JoinAddress(std::string_view host, std::string_view port);

// "Connection refused" of an errno.
std::string ErrorText(int error);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_SOCKET_H_
