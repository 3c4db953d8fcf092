// CachalotService: cachalot.v1.Cachalot over the generator.
#ifndef CACHALOT_SERVER_GRPC_CACHALOT_SERVICE_H_
#define CACHALOT_SERVER_GRPC_CACHALOT_SERVICE_H_

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "cachalot/v1/cachalot.grpc.pb.h"
#include "server/grpc/live_calls.h"
#include "server/mutex.h"
#include "server/text/generator.h"

namespace cachalot {

namespace internal {

// NOTE: messages come and go as bytes, because of requests that cannot be parsed (ill-formed UTF-8 in a string): gRPC
// would answer them with UNIMPLEMENTED and no message.
using V1 = v1::Cachalot;
using RawCompletions = V1::WithRawCallbackMethod_Complete<V1::WithRawCallbackMethod_CompleteUnary<V1::Service>>;
using RawChats = V1::WithRawCallbackMethod_Chat<V1::WithRawCallbackMethod_ChatUnary<RawCompletions>>;
using RawService = V1::WithRawCallbackMethod_Tokenize<
    V1::WithRawCallbackMethod_Detokenize<V1::WithRawCallbackMethod_ModelInfo<RawChats>>>;

}  // namespace internal

// gRPC calls the methods on its own threads. See proto/cachalot/v1/cachalot.proto for what they promise.
class CachalotService final : public internal::RawService {
 public:
  // `generator` must outlive every call.
  CachalotService(Generator* generator, std::string model_name)
      : generator_(generator), model_name_(std::move(model_name)) {}

  // Those that generate.
  LiveCalls& live_calls() { return live_calls_; }

  static constexpr const char* service_full_name() { return v1::Cachalot::service_full_name(); }

 private:
  using Context = grpc::CallbackServerContext;
  using Bytes = grpc::ByteBuffer;

  grpc::ServerWriteReactor<Bytes>* Complete(Context* context, const Bytes* request) override;
  grpc::ServerUnaryReactor* CompleteUnary(Context* context, const Bytes* request, Bytes* response) override;
  grpc::ServerWriteReactor<Bytes>* Chat(Context* context, const Bytes* request) override;
  grpc::ServerUnaryReactor* ChatUnary(Context* context, const Bytes* request, Bytes* response) override;
  grpc::ServerUnaryReactor* Tokenize(Context* context, const Bytes* request, Bytes* response) override;
  grpc::ServerUnaryReactor* Detokenize(Context* context, const Bytes* request, Bytes* response) override;
  grpc::ServerUnaryReactor* ModelInfo(Context* context, const Bytes* request, Bytes* response) override;

  template <typename Request, typename Reactor>
  Reactor* Run(Reactor* reactor, Context* context, const Bytes& bytes) const;
  template <typename Request>
  absl::Status Parse(const Bytes& bytes, Request* request) const;
  template <typename Work>
  auto OneIfLarge(const Bytes& bytes, const Work& work) const;

  absl::Status Answer(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const;
  absl::Status Answer(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) const;
  absl::Status Answer(const v1::ModelInfoRequest& request, v1::ModelInfoResponse* response) const;
  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Reply(Context* context, const Bytes& bytes, Bytes* buffer) const;

  Generator* const generator_;
  const std::string model_name_;
  LiveCalls live_calls_;
  mutable Mutex large_;  // held by the one large request that is being read
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_CACHALOT_SERVICE_H_
