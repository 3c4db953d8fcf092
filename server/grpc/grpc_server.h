// GrpcServer: the gRPC endpoint: Cachalot's service, grpc.health.v1 and reflection.
#ifndef CACHALOT_SERVER_GRPC_GRPC_SERVER_H_
#define CACHALOT_SERVER_GRPC_GRPC_SERVER_H_

#include <grpcpp/server.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/grpc/cachalot_service.h"
#include "server/text/generator.h"

namespace cachalot {

// Methods may be called from any thread.
class GrpcServer {
 public:
  // Unavailable, with one line, when `port` of `host` is taken: to be known before a slow load. 0 is always free.
  static absl::Status CheckPort(const std::string& host, int port);

  // Listens and serves at once; port 0: any free one. Unavailable when the port is taken. `generator` must outlive the
  // server.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const std::string& host, int port, Generator* generator,
                                                           std::string model_name);

  ~GrpcServer();  // cancels what is in flight

  int port() const { return port_; }
  // What grpc.health.v1 answers, for the whole server and for cachalot.v1.Cachalot.
  void SetServing(bool is_serving);

  // Takes no new calls, waits until every call has ended, but not longer than `grace`, and cancels what is left.
  void Stop(absl::Duration grace);

 private:
  GrpcServer(Generator* generator, std::string model_name) : service_(generator, std::move(model_name)) {}

  CachalotService service_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_GRPC_SERVER_H_
