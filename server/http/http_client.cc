// Blocking reads that look up ten times a second.
#include "server/http/http_client.h"

#include <poll.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/error.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

constexpr int kPollMilliseconds = 100;
constexpr size_t kReadBytes = 64 << 10;

}  // namespace

absl::StatusOr<HttpClient> HttpClient::Create(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  const auto bad = [&url] {
    return absl::InvalidArgumentError(absl::StrCat("'", url, "' is no address of the form http://HOST:PORT"));
  };
  if (url.rfind(kScheme, 0) != 0) return bad();
  std::string rest = url.substr(kScheme.size());
  HttpClient client;
  if (const size_t slash = rest.find('/'); slash != std::string::npos) {
    client.prefix_ = rest.substr(slash);
    rest.resize(slash);
  }
  while (!client.prefix_.empty() && client.prefix_.back() == '/') client.prefix_.pop_back();
  // NOTE: an IPv6 address has brackets: [::1]:8000.
  const size_t host_end = rest.rfind(']') == std::string::npos ? 0 : rest.rfind(']');
  const size_t colon = rest.find(':', host_end);
  client.host_ = rest.substr(0, colon);
  client.port_ = colon == std::string::npos ? "80" : rest.substr(colon + 1);
  if (client.host_.size() > 2 && client.host_.front() == '[') client.host_ = client.host_.substr(1, host_end - 1);
  const bool is_port = !client.port_.empty() && client.port_.find_first_not_of("0123456789") == std::string::npos;
  if (client.host_.empty() || !is_port) return bad();
  return client;
}

absl::StatusOr<HttpClient::Response> HttpClient::Get(const std::string& path) const {
  return Send("GET", path, "", nullptr, nullptr);
}

absl::StatusOr<HttpClient::Response> HttpClient::Post(const std::string& path, const std::string& body,
                                                      const OnBody& on_body, const IsStopped& is_stopped) const {
  return Send("POST", path, body, on_body, is_stopped);
}

absl::StatusOr<HttpClient::Response> HttpClient::Send(const char* method, const std::string& path,
                                                      const std::string& body, const OnBody& on_body,
                                                      const IsStopped& is_stopped) const {
  asio::io_context io;
  tcp::socket socket(io);
  error_code error;
  const auto failed = [&](const char* what) {
    return absl::UnavailableError(absl::StrCat(what, " ", host_, ":", port_, ": ", error.message()));
  };
  const auto addresses = tcp::resolver(io).resolve(host_, port_, error);
  if (!error) asio::connect(socket, addresses, error);
  if (error) return failed("cannot reach");

  const std::string host = host_.find(':') == std::string::npos ? host_ : absl::StrCat("[", host_, "]");
  std::string request =
      absl::StrCat(method, " ", prefix_, path, " HTTP/1.1\r\nHost: ", host, ":", port_, "\r\nConnection: close\r\n");
  if (!body.empty())
    absl::StrAppend(&request, "Content-Type: application/json\r\nContent-Length: ", body.size(), "\r\n");
  absl::StrAppend(&request, "\r\n", body);
  asio::write(socket, asio::buffer(request), error);
  if (error) return failed("cannot write to");

  http::response_parser<http::string_body> parser;
  parser.body_limit(std::numeric_limits<uint64_t>::max());
  parser.eager(true);
  boost::beast::flat_buffer buffer;
  size_t told = 0;
  while (!parser.is_done()) {
    pollfd ready = {.fd = socket.native_handle(), .events = POLLIN, .revents = 0};
    const int num_ready = poll(&ready, 1, kPollMilliseconds);
    if (is_stopped != nullptr && is_stopped()) return absl::CancelledError("given up");
    if (num_ready <= 0) continue;
    const size_t bytes = socket.read_some(buffer.prepare(kReadBytes), error);
    buffer.commit(bytes);
    if (error == asio::error::eof) {
      parser.put_eof(error);
      if (error || !parser.is_done()) return failed("the connection broke off:");
    } else if (error) {
      return failed("cannot read from");
    }
    while (buffer.size() > 0 && !parser.is_done()) {
      const size_t used = parser.put(buffer.data(), error);
      buffer.consume(used);
      if (error == http::error::need_more) break;
      if (error) return failed("no HTTP from");
      if (used == 0) break;
    }
    const std::string& received = parser.get().body();
    if (on_body != nullptr && received.size() > told) {
      if (!on_body(parser.get().result_int(), std::string_view(received).substr(told))) {
        return absl::CancelledError("given up");
      }
      told = received.size();
    }
  }
  return Response{static_cast<int>(parser.get().result_int()), std::move(parser.get().body())};
}

}  // namespace cachalot
