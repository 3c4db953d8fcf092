// CompletionService: cachalot.v1.Cachalot over the generator.
#ifndef CACHALOT_SERVER_GRPC_COMPLETION_SERVICE_H_
#define CACHALOT_SERVER_GRPC_COMPLETION_SERVICE_H_

#include <grpcpp/support/status.h>

#include <string>

#include "absl/status/status.h"
#include "cachalot/v1/cachalot.grpc.pb.h"
#include "server/text/generator.h"

namespace cachalot {

// gRPC calls the methods on its own threads.
class CompletionService final : public v1::Cachalot::CallbackService {
 public:
  // `generator` must outlive every call.
  CompletionService(Generator* generator, std::string model_name)
      : generator_(generator), model_name_(std::move(model_name)) {}

  static constexpr const char* service_full_name() { return v1::Cachalot::service_full_name(); }

  grpc::ServerWriteReactor<v1::CompleteResponse>* Complete(grpc::CallbackServerContext* context,
                                                           const v1::CompleteRequest* request) override;

 private:
  Generator* const generator_;
  const std::string model_name_;
};

// The one mapping from absl::Status to gRPC: the codes are the same, the message is kept.
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_COMPLETION_SERVICE_H_
