// HttpServer: one acceptor, a pool of I/O threads, a table of routes, and the set of live connections.
#include "server/http/http_server.h"

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/http/http_connection.h"

namespace cachalot {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

// What is in a larger body takes milliseconds to read, which an I/O thread has not.
constexpr size_t kLargeBodyBytes = 64 << 10;
constexpr absl::Duration kAcceptRetry = absl::Milliseconds(100);  // out of file descriptors

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
  void Accept();
  void AddConnection(tcp::socket socket);

  const HttpOptions options;
  const HttpErrorFormat error_format;
  std::vector<Route> routes;

  asio::io_context io;
  asio::executor_work_guard<asio::io_context::executor_type> work{io.get_executor()};
  asio::strand<asio::io_context::executor_type> accept_strand{io.get_executor()};
  tcp::acceptor acceptor{accept_strand};
  asio::steady_timer accept_timer{accept_strand};
  std::shared_ptr<HttpConnectionContext> context = std::make_shared<HttpConnectionContext>();
  std::vector<std::thread> threads;
  asio::thread_pool workers{static_cast<size_t>(options.num_threads)};  // for what takes long

  std::mutex mutex;  // guards all below
  std::condition_variable all_closed;
  std::map<uint64_t, std::weak_ptr<HttpConnection>> connections;
  uint64_t next_id = 0;
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
      asio::post(workers, [this, handler = &handler->second, request = std::move(request),
                           responder = std::move(responder)]() mutable {
        if (is_draining) return responder->Respond(error_format(503, "the server is stopping"));
        if (!responder->IsWanted()) return responder->Close();
        (*handler)(std::move(request), std::move(responder));
      });
      return;
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

void HttpServer::Impl::Accept() {
  acceptor.async_accept(asio::make_strand(io), [this](error_code error, tcp::socket socket) {
    if (!acceptor.is_open()) return;
    if (!error) {
      AddConnection(std::move(socket));
      return Accept();
    }
    accept_timer.expires_after(absl::ToChronoNanoseconds(kAcceptRetry));
    accept_timer.async_wait([this](error_code) {
      if (acceptor.is_open()) Accept();
    });
  });
}

void HttpServer::Impl::AddConnection(tcp::socket socket) {
  std::shared_ptr<HttpConnection> connection;
  {
    std::lock_guard lock(mutex);
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
  impl->context->dispatch = [impl](HttpRequest request, std::shared_ptr<HttpResponder> responder) {
    impl->Dispatch(std::move(request), std::move(responder));
  };
  impl->context->run_slowly = [impl](std::function<void()> task) { asio::post(impl->workers, std::move(task)); };
  impl->context->on_closed = [impl](uint64_t id) {
    std::lock_guard lock(impl->mutex);
    impl->connections.erase(id);
    if (impl->connections.empty()) impl->all_closed.notify_all();
  };
}

HttpServer::~HttpServer() { Stop(absl::ZeroDuration()); }

absl::Status HttpServer::Bind() {
  const HttpOptions& options = impl_->options;
  const std::string name = absl::StrCat(options.host, ":", options.port);
  error_code error;
  tcp::resolver resolver(impl_->io);
  const tcp::resolver::results_type found =
      resolver.resolve(options.host, absl::StrCat(options.port), tcp::resolver::passive, error);
  if (error || found.empty())
    return absl::InvalidArgumentError(absl::StrCat("cannot resolve ", name, ": ", error.message()));
  const tcp::endpoint endpoint = found.begin()->endpoint();
  tcp::acceptor& acceptor = impl_->acceptor;
  acceptor.open(endpoint.protocol(), error);
  if (!error) acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor.bind(endpoint, error);
  if (error) return absl::UnavailableError(absl::StrCat("cannot listen on ", name, ": ", error.message()));
  return absl::OkStatus();
}

int HttpServer::port() const {
  error_code error;
  const tcp::endpoint endpoint = impl_->acceptor.local_endpoint(error);
  return error ? 0 : endpoint.port();
}

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

absl::Status HttpServer::Start() {
  error_code error;
  impl_->acceptor.listen(tcp::acceptor::max_listen_connections, error);
  if (error) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", impl_->options.host, ":", impl_->options.port, ": ", error.message()));
  }
  asio::post(impl_->accept_strand, [impl = impl_.get()] { impl->Accept(); });
  for (int i = 0; i < impl_->options.num_threads; ++i) {
    impl_->threads.emplace_back([impl = impl_.get()] { impl->io.run(); });
  }
  return absl::OkStatus();
}

void HttpServer::StopAccepting() {
  asio::post(impl_->accept_strand, [impl = impl_.get()] {
    error_code ignored;
    impl->acceptor.close(ignored);
    impl->accept_timer.cancel();
  });
  std::lock_guard lock(impl_->mutex);
  impl_->is_draining = true;
  for (const auto& [id, weak] : impl_->connections) {
    if (const auto connection = weak.lock()) connection->Drain();
  }
}

void HttpServer::Stop(absl::Duration grace) {
  StopAccepting();
  {
    std::unique_lock lock(impl_->mutex);
    const auto all_closed = [this] { return impl_->connections.empty(); };
    if (!impl_->threads.empty()) impl_->all_closed.wait_for(lock, absl::ToChronoNanoseconds(grace), all_closed);
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
