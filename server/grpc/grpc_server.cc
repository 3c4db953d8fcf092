// Building and stopping grpc::Server.
#include "server/grpc/grpc_server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpc/grpc.h>
#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/server_posix.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <latch>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "server/grpc/http2_guard.h"

namespace cachalot {
namespace {

constexpr int kMaxMessageBytes = 16 << 20;  // as the HTTP body limit

constexpr absl::Duration kGoodbye = absl::Milliseconds(200);  // for clients to take the last bytes, and to leave
constexpr size_t kMaxMemory = 256 << 20;                      // of what connections and calls hold within gRPC
constexpr int kMaxMetadataBytes = 16 << 10;                   // of a call

// Few lines: by default gRPC logs errors alone.
void Log(gpr_log_func_args* line) {
  const auto level = line->severity == GPR_LOG_SEVERITY_ERROR ? spdlog::level::err : spdlog::level::info;
  spdlog::log(level, "gRPC: {}", line->message);
}

// gRPC aborts without a word where it gets no thread: as many as it begins with are made here before, all at once, and
// where the system refuses one the program ends as everywhere else.
void TryThreads() {
  constexpr int kNumThreads = 12;
  std::latch all(kNumThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kNumThreads; ++i) threads.emplace_back([&all] { all.arrive_and_wait(); });
  for (std::thread& thread : threads) thread.join();
}

// What Protobuf has to say is of requests that it cannot parse: their senders are told.
void LogOfProtobuf(google::protobuf::LogLevel, const char*, int, const std::string& message) {
  spdlog::debug("Protobuf: {}", message);
}

}  // namespace

absl::Status GrpcServer::Start(int max_connections, Generator* generator, std::string model_name) {
  // NOTE: Debian's Abseil looks for deadlocks at every lock that gRPC takes.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  // NOTE: otherwise they write to stderr themselves, and wait there for whoever reads it.
  gpr_set_log_function(Log);
  google::protobuf::SetLogHandler(LogOfProtobuf);
  TryThreads();
  // NOTE: without an end: gRPC's own, at its last object's, waits for threads of its that may never have been made.
  grpc_init();
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  service_ = std::make_unique<CachalotService>(generator, std::move(model_name));
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 300'000);  // finds clients that are gone without a word
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, Http2Guard::kMaxStreams);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetResourceQuota(grpc::ResourceQuota("cachalot").Resize(kMaxMemory));
  builder.RegisterService(service_.get());
  server_ = builder.BuildAndStart();
  if (server_ == nullptr) return absl::InternalError("gRPC cannot be started");
  SetServing(true);
  return front_.Start(max_connections, [this](int fd) { grpc::AddInsecureChannelFromFd(server_.get(), fd); });
}

GrpcServer::~GrpcServer() { Stop(absl::ZeroDuration()); }

void GrpcServer::SetServing(bool is_serving) {
  if (server_ == nullptr) return;
  server_->GetHealthCheckService()->SetServingStatus(is_serving);
  server_->GetHealthCheckService()->SetServingStatus(CachalotService::service_full_name(), is_serving);
}

void GrpcServer::Stop(absl::Duration grace) {
  front_.StopAccepting();
  // NOTE: gRPC would wait for every connection to be closed by its client, and for streams that watch our health.
  if (server_ != nullptr) {
    service_->live_calls().AwaitNone(grace);
    server_->Shutdown(absl::ToChronoTime(absl::Now() + std::min(grace, kGoodbye)));
  }
  front_.Stop(std::min(grace, kGoodbye));
}

}  // namespace cachalot
