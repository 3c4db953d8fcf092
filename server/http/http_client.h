// HttpClient: requests to a server, one at a time, answers read as they come.
#ifndef CACHALOT_SERVER_HTTP_HTTP_CLIENT_H_
#define CACHALOT_SERVER_HTTP_HTTP_CLIENT_H_

#include <functional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace cachalot {

// For one thread. Every request makes its own connection.
class HttpClient {
 public:
  // `url`: http://HOST[:PORT][/PREFIX]. InvalidArgument for anything else.
  static absl::StatusOr<HttpClient> Create(const std::string& url);

  struct Response {
    int status = 0;
    std::string body;
  };
  // Told of the body as it grows; false gives the request up.
  using OnBody = std::function<bool(int status, std::string_view more)>;
  // Asked ten times a second while nothing comes; true gives the request up.
  using IsStopped = std::function<bool()>;

  // GET, or POST when there is a body (JSON). `path` begins with '/'. Unavailable when the server cannot be reached or
  // breaks off; Cancelled when given up. An error that the server answers is a response.
  absl::StatusOr<Response> Get(const std::string& path) const;
  absl::StatusOr<Response> Post(const std::string& path, const std::string& body, const OnBody& on_body,
                                const IsStopped& is_stopped) const;

 private:
  absl::StatusOr<Response> Send(const char* method, const std::string& path, const std::string& body,
                                const OnBody& on_body, const IsStopped& is_stopped) const;

  std::string host_, port_, prefix_;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_HTTP_CLIENT_H_
