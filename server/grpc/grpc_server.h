// GrpcServer: the gRPC endpoint: Cachalot's service, grpc.health.v1 and reflection.
#ifndef CACHALOT_SERVER_GRPC_GRPC_SERVER_H_
#define CACHALOT_SERVER_GRPC_GRPC_SERVER_H_

#include <grpcpp/server.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/grpc/cachalot_service.h"
#include "server/grpc/grpc_front.h"
#include "server/text/generator.h"

namespace cachalot {

// Bind, Start, in the end Stop; from one thread. SetServing may be called from any.
class GrpcServer {
 public:
  explicit GrpcServer(GrpcFrontOptions options) : front_(std::move(options)) {}
  ~GrpcServer();  // cancels what is in flight

  // Takes the port without accepting connections: one in use is known before a slow load. InvalidArgument for a host
  // that has no address, Unavailable when the port is taken.
  absl::Status Bind() { return front_.Bind(); }
  // The port bound.
  int port() const { return front_.port(); }

  // Serves from now on, `max_connections` at once. `generator` must outlive the server.
  absl::Status Start(int max_connections, Generator* generator, std::string model_name);

  // What grpc.health.v1 answers, for the whole server and for cachalot.v1.Cachalot.
  void SetServing(bool is_serving);

  // Takes no new calls, waits until every call has ended, but not longer than `grace`, and cancels what is left.
  void Stop(absl::Duration grace);

 private:
  std::unique_ptr<CachalotService> service_;
  std::unique_ptr<grpc::Server> server_;
  GrpcFront front_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_GRPC_SERVER_H_
