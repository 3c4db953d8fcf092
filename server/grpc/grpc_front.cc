// GrpcFront: a listener, I/O threads, and a relay for each connection.
#include "server/grpc/grpc_front.h"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "server/grpc/grpc_relay.h"
#include "server/listener.h"
#include "server/mutex.h"

namespace cachalot {

namespace asio = boost::asio;

struct GrpcFront::Impl {
  explicit Impl(GrpcFrontOptions options) : options(std::move(options)) {}

  void AddConnection(asio::ip::tcp::socket socket);
  void OnClosed(uint64_t id);

  const GrpcFrontOptions options;
  asio::io_context io;
  asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
  ResetRate reset_rate{absl::Now()};
  Listener listener{&io, options.host, options.port};
  std::function<void(int fd)> serve;
  std::vector<std::thread> threads;

  Mutex mutex;
  CondVar all_closed;
  std::map<uint64_t, std::weak_ptr<GrpcRelay>> relays ABSL_GUARDED_BY(mutex);
  uint64_t next_id ABSL_GUARDED_BY(mutex) = 0;
  bool is_stopping ABSL_GUARDED_BY(mutex) = false;
};

void GrpcFront::Impl::AddConnection(asio::ip::tcp::socket socket) {
  std::shared_ptr<GrpcRelay> relay;
  {
    MutexLock lock(&mutex);
    if (is_stopping) return;
    const uint64_t id = next_id++;
    relay = std::make_shared<GrpcRelay>(std::move(socket), options, &reset_rate, [this, id] { OnClosed(id); });
    relays.emplace(id, relay);
  }
  const int fd = relay->Open();
  if (fd < 0) return relay->Close();
  serve(fd);
  relay->Start();
}

void GrpcFront::Impl::OnClosed(uint64_t id) {
  listener.OnClosed();
  MutexLock lock(&mutex);
  relays.erase(id);
  if (relays.empty()) all_closed.NotifyAll();
}

GrpcFront::GrpcFront(GrpcFrontOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}

GrpcFront::~GrpcFront() { Stop(absl::ZeroDuration()); }

absl::Status GrpcFront::Bind() { return impl_->listener.Bind(); }

int GrpcFront::port() const { return impl_->listener.port(); }

absl::Status GrpcFront::Start(int max_connections, std::function<void(int fd)> serve) {
  impl_->serve = std::move(serve);
  absl::Status status = impl_->listener.Start(
      max_connections, [impl = impl_.get()](asio::ip::tcp::socket socket) { impl->AddConnection(std::move(socket)); });
  if (!status.ok()) return status;
  for (int i = 0; i < impl_->options.num_threads; ++i) {
    impl_->threads.emplace_back([impl = impl_.get()] { impl->io.run(); });
  }
  return absl::OkStatus();
}

void GrpcFront::StopAccepting() {
  impl_->listener.Stop();
  MutexLock lock(&impl_->mutex);
  impl_->is_stopping = true;
}

void GrpcFront::Stop(absl::Duration grace) {
  StopAccepting();
  {
    const absl::Time deadline = absl::Now() + grace;
    MutexLock lock(&impl_->mutex);
    while (!impl_->relays.empty() && impl_->all_closed.WaitUntil(&impl_->mutex, deadline)) {
    }
    for (const auto& [id, weak] : impl_->relays) {
      if (const auto relay = weak.lock()) relay->Close();
    }
  }
  impl_->work.reset();
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
}

}  // namespace cachalot
