// Listener: one TCP address: taken early, accepted from later, with no more connections than there are descriptors for.
#ifndef CACHALOT_SERVER_LISTENER_H_
#define CACHALOT_SERVER_LISTENER_H_

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace cachalot {

// Bind, then Start, then Stop; from one thread. OnClosed may be called from any.
class Listener {
 public:
  // `io` runs everything, and must have been stopped before this is destroyed.
  Listener(boost::asio::io_context* io, std::string host, int port);

  // Takes the address without accepting connections. InvalidArgument for a host that has no address, Unavailable when
  // the port is taken or may not be used.
  absl::Status Bind();
  // The port bound; 0 before.
  int port() const;

  // `on_accept` gets each connection, with a strand of its own, on an I/O thread. When `max_connections` are open,
  // others wait to be accepted until one has closed. Unavailable when another process was faster.
  absl::Status Start(int max_connections, std::function<void(boost::asio::ip::tcp::socket)> on_accept);
  // One of the connections has been closed.
  void OnClosed();
  // Accepts no more.
  void Stop();

 private:
  void Accept();
  void SayFull();
  std::string name() const;

  boost::asio::io_context& io_;
  const std::string host_;
  const int port_;
  boost::asio::strand<boost::asio::io_context::executor_type> strand_;
  boost::asio::ip::tcp::acceptor acceptor_;  // this and what follows: used on the strand
  boost::asio::steady_timer retry_;
  std::function<void(boost::asio::ip::tcp::socket)> on_accept_;
  int max_connections_ = 0, num_open_ = 0;
  bool is_full_ = false;
  absl::Time said_full_ = absl::InfinitePast();
};

// Raises the process's limit of open files to what it may have.
void RaiseFileLimit();

// How many connections of `files_each` descriptors fit when they may take `share` of the descriptors that are left now;
// at least 1, at most `most`.
int MaxConnections(double share, int files_each, int most);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_LISTENER_H_
