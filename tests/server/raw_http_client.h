// RawHttpClient: a blocking HTTP client over a raw socket, for tests that look at bytes.
#ifndef CACHALOT_TESTS_SERVER_RAW_HTTP_CLIENT_H_
#define CACHALOT_TESTS_SERVER_RAW_HTTP_CLIENT_H_

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

namespace cachalot {

struct ClientResponse {
  int status = 0;                              // 0: none came
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
};

class RawHttpClient {
 public:
  // `receive_buffer_bytes` > 0 makes the window small, for slow readers.
  explicit RawHttpClient(int port, int receive_buffer_bytes = 0) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    const timeval timeout = {.tv_sec = 20, .tv_usec = 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (receive_buffer_bytes > 0) {
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(receive_buffer_bytes));
    }
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  ~RawHttpClient() { Close(); }
  RawHttpClient(const RawHttpClient&) = delete;
  RawHttpClient& operator=(const RawHttpClient&) = delete;

  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }
  // Like a process that was killed: the server sees a reset.
  void Reset() {
    const linger now = {.l_onoff = 1, .l_linger = 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    Close();
  }
  void CloseSendingHalf() { shutdown(fd_, SHUT_WR); }

  // False when the server has closed.
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(sent);
    }
    return true;
  }

  // Reads until `text` has come; false when the connection ended first. What came is in buffer().
  bool ReadUntil(std::string_view text) {
    while (buffer_.find(text) == std::string::npos) {
      if (!ReadSome()) return false;
    }
    return true;
  }
  void ReadAtLeast(size_t size) {
    while (buffer_.size() < size && ReadSome()) {
    }
  }
  // True if the server sends something, or closes, in that time.
  bool HasBytesWithin(absl::Duration timeout) {
    pollfd readable = {.fd = fd_, .events = POLLIN, .revents = 0};
    return poll(&readable, 1, static_cast<int>(absl::ToInt64Milliseconds(timeout))) != 0;
  }
  // True if the server closes without another byte.
  bool IsClosedByServer() {
    while (ReadSome()) {
    }
    return buffer_.empty();
  }
  const std::string& buffer() const { return buffer_; }

  ClientResponse ReadResponse(bool is_head = false) {
    ClientResponse response;
    if (!ReadUntil("\r\n\r\n")) return response;
    const size_t end = buffer_.find("\r\n\r\n");
    ParseHead(buffer_.substr(0, end), &response);
    buffer_.erase(0, end + 4);
    if (is_head || response.status == 100) return response;
    if (response.headers.count("content-length") > 0) {
      response.body = Take(std::stoul(response.headers["content-length"]));
    } else if (response.headers["transfer-encoding"] == "chunked") {
      for (std::string chunk = TakeChunk(); !chunk.empty(); chunk = TakeChunk()) response.body += chunk;
    } else {
      while (ReadSome()) {
      }
      response.body.swap(buffer_);
    }
    return response;
  }

  ClientResponse Get(const std::string& path) {
    Send(absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: test\r\n\r\n"));
    return ReadResponse();
  }
  ClientResponse Post(const std::string& path, const std::string& body) {
    SendPost(path, body);
    return ReadResponse();
  }
  void SendPost(const std::string& path, const std::string& body) {
    Send(absl::StrCat("POST ", path, " HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: ",
                      body.size(), "\r\n\r\n", body));
  }

 private:
  bool ReadSome() {
    char bytes[4096];
    const ssize_t received = recv(fd_, bytes, sizeof(bytes), 0);
    if (received > 0) buffer_.append(bytes, received);
    return received > 0;
  }
  std::string Take(size_t size) {
    ReadAtLeast(size);
    std::string taken = buffer_.substr(0, size);
    buffer_.erase(0, size);
    return taken;
  }
  std::string TakeChunk() {
    if (!ReadUntil("\r\n")) return "";
    const size_t size = std::strtoul(buffer_.c_str(), nullptr, 16);
    buffer_.erase(0, buffer_.find("\r\n") + 2);
    std::string chunk = Take(size + 2);
    chunk.resize(std::min(chunk.size(), size));
    return chunk;
  }
  static void ParseHead(const std::string& head, ClientResponse* response) {
    response->status = std::atoi(head.substr(head.find(' ') + 1).c_str());
    for (size_t at = head.find("\r\n"); at != std::string::npos; at = head.find("\r\n", at + 2)) {
      const std::string line = head.substr(at + 2, head.find("\r\n", at + 2) - at - 2);
      const size_t colon = line.find(": ");
      response->headers[absl::AsciiStrToLower(line.substr(0, colon))] = line.substr(colon + 2);
    }
  }

  int fd_;
  std::string buffer_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_RAW_HTTP_CLIENT_H_
