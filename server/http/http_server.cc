// HttpServer: one acceptor, a pool of I/O threads, a table of routes, and the set of live connections.
#include "server/http/http_server.h"

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <map>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "server/http/http_connection.h"
#include "server/listener.h"
#include "server/mutex.h"

namespace cachalot {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;

// What is in a larger body takes milliseconds to read, which an I/O thread has not.
constexpr size_t kLargeBodyBytes = 64 << 10;
// What is made of a still larger one is many times its size: of these, one at a time.
constexpr size_t kHugeBodyBytes = 1 << 20;

struct Route {
  std::string path;  // without the star
  bool is_prefix = false;
  std::map<std::string, HttpHandler> handlers;  // by method

  bool Matches(std::string_view request_path) const {
    return is_prefix ? request_path.size() > path.size() && request_path.substr(0, path.size()) == path
                     : request_path == path;
  }
  // The methods that have a handler, and those that need none of their own.
  std::string Allow() const {
    std::vector<std::string> methods;
    for (const auto& [method, unused] : handlers) methods.push_back(method);
    if (handlers.count("GET") > 0) methods.emplace_back("HEAD");
    methods.emplace_back("OPTIONS");
    return absl::StrJoin(methods, ", ");
  }
};

}  // namespace

struct HttpServer::Impl {
  Impl(HttpOptions options, HttpErrorFormat error_format)
      : options(std::move(options)), error_format(std::move(error_format)) {}

  void Dispatch(HttpRequest request, std::shared_ptr<HttpResponder> responder);
  void AddConnection(tcp::socket socket);

  const HttpOptions options;
  const HttpErrorFormat error_format;
  BodyBudget bodies{options.max_held_bytes};
  std::vector<Route> routes;

  asio::io_context io;
  asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
  Listener listener{&io, options.host, options.port};
  std::shared_ptr<HttpConnectionContext> context = std::make_shared<HttpConnectionContext>();
  std::vector<std::thread> threads;
  asio::thread_pool workers{static_cast<size_t>(options.num_threads)};  // for what takes long
  asio::strand<asio::thread_pool::executor_type> one_worker{workers.get_executor()};

  Mutex mutex;
  CondVar all_closed;
  std::map<uint64_t, std::weak_ptr<HttpConnection>> connections ABSL_GUARDED_BY(mutex);
  uint64_t next_id ABSL_GUARDED_BY(mutex) = 0;
  std::atomic<bool> is_draining = false;
};

void HttpServer::Impl::Dispatch(HttpRequest request, std::shared_ptr<HttpResponder> responder) {
  for (const Route& route : routes) {
    if (!route.Matches(request.path)) continue;
    auto handler = route.handlers.find(request.method);
    if (handler == route.handlers.end() && request.method == "HEAD") handler = route.handlers.find("GET");
    if (handler != route.handlers.end() && request.body.size() <= kLargeBodyBytes) {
      return handler->second(std::move(request), std::move(responder));
    }
    if (handler != route.handlers.end()) {
      const bool is_huge = request.body.size() > kHugeBodyBytes;
      auto task = [this, handler = &handler->second, request = std::move(request),
                   responder = std::move(responder)]() mutable {
        if (is_draining) return responder->Respond(error_format(503, "the server is stopping"));
        if (!responder->IsWanted()) return responder->Close();
        (*handler)(std::move(request), std::move(responder));
      };
      return is_huge ? asio::post(one_worker, std::move(task)) : asio::post(workers, std::move(task));
    }
    HttpResponse response = {.content_type = "", .body = "", .headers = {}};
    if (request.method != "OPTIONS") {
      response = error_format(405, absl::StrCat(request.method, " is not allowed for ", request.path));
    }
    response.headers.emplace_back("Allow", route.Allow());
    return responder->Respond(std::move(response));
  }
  if (request.method == "OPTIONS" && request.path == "*") {  // of the server: RFC 9110, 9.3.7
    return responder->Respond({.content_type = "", .body = "", .headers = {}});
  }
  responder->Respond(error_format(404, absl::StrCat("there is no ", request.path, " here")));
}

void HttpServer::Impl::AddConnection(tcp::socket socket) {
  std::shared_ptr<HttpConnection> connection;
  {
    MutexLock lock(&mutex);
    if (is_draining) return;
    const uint64_t id = next_id++;
    connection = std::make_shared<HttpConnection>(id, std::move(socket), context);
    connections.emplace(id, connection);
  }
  connection->Start();
}

HttpServer::HttpServer(HttpOptions options, HttpErrorFormat error_format)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(error_format))) {
  Impl* impl = impl_.get();
  impl->context->options = &impl->options;
  impl->context->error_format = &impl->error_format;
  impl->context->bodies = &impl->bodies;
  impl->context->dispatch = [impl](HttpRequest request, std::shared_ptr<HttpResponder> responder) {
    impl->Dispatch(std::move(request), std::move(responder));
  };
  impl->context->run_slowly = [impl](std::function<void()> task) { asio::post(impl->workers, std::move(task)); };
  impl->context->on_closed = [impl](uint64_t id) {
    impl->listener.OnClosed();
    MutexLock lock(&impl->mutex);
    impl->connections.erase(id);
    if (impl->connections.empty()) impl->all_closed.NotifyAll();
  };
}

HttpServer::~HttpServer() { Stop(absl::ZeroDuration()); }

absl::Status HttpServer::Bind() { return impl_->listener.Bind(); }

int HttpServer::port() const { return impl_->listener.port(); }

void HttpServer::Handle(std::string method, std::string path, HttpHandler handler) {
  const bool is_prefix = absl::EndsWith(path, "/*");
  if (is_prefix) path.pop_back();
  for (Route& route : impl_->routes) {
    if (route.path != path || route.is_prefix != is_prefix) continue;
    route.handlers[std::move(method)] = std::move(handler);
    return;
  }
  Route route{.path = std::move(path), .is_prefix = is_prefix, .handlers = {}};
  route.handlers[std::move(method)] = std::move(handler);
  impl_->routes.push_back(std::move(route));
}

absl::Status HttpServer::Start(int max_connections) {
  absl::Status status = impl_->listener.Start(
      max_connections, [impl = impl_.get()](tcp::socket socket) { impl->AddConnection(std::move(socket)); });
  if (!status.ok()) return status;
  for (int i = 0; i < impl_->options.num_threads; ++i) {
    impl_->threads.emplace_back([impl = impl_.get()] { impl->io.run(); });
  }
  return absl::OkStatus();
}

void HttpServer::StopAccepting() {
  impl_->listener.Stop();
  MutexLock lock(&impl_->mutex);
  impl_->is_draining = true;
  for (const auto& [id, weak] : impl_->connections) {
    if (const auto connection = weak.lock()) connection->Drain();
  }
}

void HttpServer::Stop(absl::Duration grace) {
  StopAccepting();
  {
    const absl::Time deadline = absl::Now() + grace;
    MutexLock lock(&impl_->mutex);
    while (!impl_->connections.empty() && impl_->all_closed.WaitUntil(&impl_->mutex, deadline)) {
    }
    for (const auto& [id, weak] : impl_->connections) {
      if (const auto connection = weak.lock()) connection->Close();
    }
  }
  impl_->workers.join();
  impl_->work.reset();
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
}

}  // namespace cachalot
