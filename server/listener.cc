// One acceptor that waits while connections are too many or descriptors too few.
#include "server/listener.h"

#include <dirent.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace cachalot {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr std::chrono::milliseconds kAcceptRetry{100};  // out of descriptors all the same
constexpr absl::Duration kSayAgain = absl::Minutes(1);
constexpr int kSpareFiles = 16;  // for what is opened now and then

int NumOpenFiles() {
  DIR* const folder = opendir("/proc/self/fd");
  if (folder == nullptr) return 0;
  int count = -3;  // ".", ".." and the folder itself
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

}  // namespace

Listener::Listener(asio::io_context* io, std::string host, int port)
    : io_(*io), host_(std::move(host)), port_(port), strand_(io->get_executor()), acceptor_(strand_), retry_(strand_) {}

std::string Listener::name() const { return absl::StrCat(host_, ":", port_); }

absl::Status Listener::Bind() {
  error_code error;
  tcp::resolver resolver(io_);
  const tcp::resolver::results_type found = resolver.resolve(host_, absl::StrCat(port_), tcp::resolver::passive, error);
  if (error || found.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("cannot resolve ", name(), ": ", error.message()));
  }
  const tcp::endpoint endpoint = found.begin()->endpoint();
  acceptor_.open(endpoint.protocol(), error);
  if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) acceptor_.bind(endpoint, error);
  if (!error) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot listen on ", name(), ": ", error.message()));
}

int Listener::port() const {
  error_code error;
  const tcp::endpoint endpoint = acceptor_.local_endpoint(error);
  return error ? 0 : endpoint.port();
}

absl::Status Listener::Start(int max_connections, std::function<void(tcp::socket)> on_accept) {
  max_connections_ = max_connections;
  on_accept_ = std::move(on_accept);
  error_code error;
  acceptor_.listen(tcp::acceptor::max_listen_connections, error);
  if (error) return absl::UnavailableError(absl::StrCat("cannot listen on ", name(), ": ", error.message()));
  asio::post(strand_, [this] { Accept(); });
  return absl::OkStatus();
}

void Listener::Accept() {
  is_full_ = num_open_ >= max_connections_;
  if (is_full_) return SayFull();
  acceptor_.async_accept(asio::make_strand(io_), [this](error_code error, tcp::socket socket) {
    if (!acceptor_.is_open()) return;
    if (!error) {
      ++num_open_;
      on_accept_(std::move(socket));
      return Accept();
    }
    retry_.expires_after(kAcceptRetry);
    retry_.async_wait([this](error_code) {
      if (acceptor_.is_open()) Accept();
    });
  });
}

void Listener::SayFull() {
  const absl::Time now = absl::Now();
  if (now - said_full_ < kSayAgain) return;
  said_full_ = now;
  spdlog::warn("{} connections are open on port {}, as many as there may be: others wait", num_open_, port());
}

void Listener::OnClosed() {
  asio::post(strand_, [this] {
    --num_open_;
    if (is_full_ && acceptor_.is_open()) Accept();
  });
}

void Listener::Stop() {
  asio::post(strand_, [this] {
    error_code ignored;
    acceptor_.close(ignored);
    retry_.cancel();
  });
}

void RaiseFileLimit() {
  rlimit files = {};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
}

int MaxConnections(double share, int files_each, int most) {
  rlimit files = {};
  if (getrlimit(RLIMIT_NOFILE, &files) != 0) return most;
  const double left = static_cast<double>(files.rlim_cur) - NumOpenFiles() - kSpareFiles;
  return static_cast<int>(std::clamp<double>(left * share / files_each, 1, most));
}

}  // namespace cachalot
