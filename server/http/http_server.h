// HttpServer: HTTP/1.1 bytes, connections and routes. What the bytes mean is for its handlers.
#ifndef CACHALOT_SERVER_HTTP_HTTP_SERVER_H_
#define CACHALOT_SERVER_HTTP_HTTP_SERVER_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace cachalot {

struct HttpOptions {
  std::string host = "127.0.0.1";  // name or address to listen on
  int port = 8000;                 // 0: any free one
  int num_threads = 2;
  size_t max_header_bytes = 32 << 10;                 // more: 431
  size_t max_body_bytes = 16 << 20;                   // more: 413
  absl::Duration header_timeout = absl::Seconds(10);  // from a request's first byte; longer: 408
  absl::Duration body_timeout = absl::Seconds(60);    // from the end of the header; longer: 408
  absl::Duration idle_timeout = absl::Seconds(75);    // between requests; longer: closed
  absl::Duration write_timeout = absl::Seconds(30);   // a client that takes none of its answer that long is cut off
};

struct HttpRequest {
  std::string method;  // as sent: "GET"
  std::string path;    // percent-decoded, without the query
  std::string query;   // as sent, without '?'
  std::string body;
  std::string client;  // who sent it: the connection
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;  // besides those that HTTP itself needs
  bool closes = false;                                       // the connection, afterwards
};

// Where the answer to one request goes: either Respond, or Begin, any number of Write, End. May be called from any
// thread; never blocks: what a client is slow to take is queued, and writers that could go on for long look at
// Backlog. Calls after the end or after the client has gone do nothing. Dropped without an answer: 500.
class HttpResponder {
 public:
  virtual ~HttpResponder() = default;
  virtual void Respond(HttpResponse response) = 0;
  // For a response that takes long to make: `make` is called on a thread where it may.
  virtual void RespondWith(std::function<HttpResponse()> make) = 0;
  // Status, content type and headers of `head`; its body is the first write.
  virtual void Begin(HttpResponse head) = 0;
  virtual void Write(std::string_view bytes) = 0;
  // Bytes written here that the client has not begun to take.
  virtual size_t Backlog() const = 0;
  virtual void End() = 0;
  // Closes the connection, whatever has been answered.
  virtual void Close() = 0;
  // False once the client has closed its connection or its sending half.
  virtual bool IsWanted() const = 0;
  // `callback` is called once, on an I/O thread, as soon as the client closes its connection (its sending half counts)
  // before the answer has ended; it is dropped when the answer ends.
  virtual void OnDisconnect(std::function<void()> callback) = 0;
};

// Called on an I/O thread, or, with a large body, on one where it may take long; the answer may be given later, from
// anywhere.
using HttpHandler = std::function<void(HttpRequest request, std::shared_ptr<HttpResponder> responder)>;

// Makes the answer to a request that no handler has seen (bad, too large, too slow, unknown path...).
using HttpErrorFormat = std::function<HttpResponse(int status, std::string_view message)>;

// Bind, then Handle for each route, then Start, in the end Stop; from one thread.
class HttpServer {
 public:
  HttpServer(HttpOptions options, HttpErrorFormat error_format);
  ~HttpServer();  // stops at once

  // Takes the address without accepting connections. InvalidArgument for a host that has no address, Unavailable when
  // the port is taken or may not be used.
  absl::Status Bind();
  // The port bound.
  int port() const;

  // `path` matches exactly, or as a prefix when it ends in "/*". A path with handlers for other methods only answers
  // 405; HEAD is answered by GET's handler, without the body.
  void Handle(std::string method, std::string path, HttpHandler handler);

  // Accepts connections from now on, on threads of its own. Unavailable when another process was faster.
  absl::Status Start();

  // Accepts no more connections and takes no more requests on those there are. Answers in progress go on.
  void StopAccepting();

  // StopAccepting, waits until every answer has ended, but not longer than `grace`, and closes what is left.
  void Stop(absl::Duration grace);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_HTTP_SERVER_H_
