// GrpcFront: the port in front of gRPC: accepts connections, watches what clients send, and passes the rest on.
#ifndef CACHALOT_SERVER_GRPC_GRPC_FRONT_H_
#define CACHALOT_SERVER_GRPC_GRPC_FRONT_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace cachalot {

struct GrpcFrontOptions {
  std::string host = "127.0.0.1";
  int port = 0;  // 0: any free one
  int num_threads = 2;
  absl::Duration begin_timeout = absl::Seconds(10);  // to send HTTP/2's preface and settings; longer: closed
  absl::Duration write_timeout = absl::Seconds(30);  // a client that takes nothing that long is cut off
};

// gRPC gets one end of a pair of local sockets for each connection, never the client's own. It cannot run out of
// descriptors that way (its own listener ends with the first EMFILE), and nothing reaches it that Http2Guard has not
// let pass. What one side does not take is not read from the other.
//
// Bind, Start, then StopAccepting and Stop; from one thread.
class GrpcFront {
 public:
  static constexpr int kFilesAConnection = 3;

  explicit GrpcFront(GrpcFrontOptions options);
  ~GrpcFront();  // stops at once

  // As Listener's.
  absl::Status Bind();
  int port() const;

  // Accepts connections from now on; `serve` is given gRPC's end of each, to own, on an I/O thread.
  absl::Status Start(int max_connections, std::function<void(int fd)> serve);
  void StopAccepting();
  // StopAccepting, waits until gRPC has closed its ends and clients have been given what it wrote, but not longer than
  // `grace`, and closes what is left.
  void Stop(absl::Duration grace);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_GRPC_FRONT_H_
