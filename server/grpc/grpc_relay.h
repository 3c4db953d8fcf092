// GrpcRelay: one client's connection: bytes between its socket and the one that gRPC holds.
#ifndef CACHALOT_SERVER_GRPC_GRPC_RELAY_H_
#define CACHALOT_SERVER_GRPC_GRPC_RELAY_H_

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/steady_timer.hpp>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "server/grpc/grpc_front.h"
#include "server/grpc/http2_guard.h"

namespace cachalot {

// Everything runs on the client socket's strand, to which Start and Close post. Keeps itself alive while an operation
// is under way.
class GrpcRelay : public std::enable_shared_from_this<GrpcRelay> {
 public:
  // `options` and `reset_rate` must outlive this. `on_closed` is called once, on the strand.
  GrpcRelay(boost::asio::ip::tcp::socket client, const GrpcFrontOptions& options, ResetRate* reset_rate,
            std::function<void()> on_closed);

  // Makes the pair of sockets; gRPC's end, or -1 when there is no descriptor left. Before Start.
  int Open();
  void Start();
  void Close();

 private:
  void FromClient();
  void FromServer();
  template <typename From, typename To>
  void Pump(From* from, To* to, std::string* pending, void (GrpcRelay::*again)());
  template <typename To>
  bool Write(To* to, std::string_view bytes, std::string* pending);
  template <typename Socket>
  void Await(Socket* socket, boost::asio::socket_base::wait_type what, void (GrpcRelay::*then)());
  // How long what was read has to wait before it is passed on.
  absl::Duration OnRead(const boost::asio::ip::tcp::socket* client, std::string_view bytes);
  absl::Duration OnRead(const boost::asio::local::stream_protocol::socket* server, std::string_view bytes);
  void Pause(absl::Duration pause, void (GrpcRelay::*then)());
  void OnEnd(const boost::asio::ip::tcp::socket* client);
  void OnEnd(const boost::asio::local::stream_protocol::socket* server);
  void SetDeadline(absl::Duration timeout);
  void ClearDeadline();
  void CloseNow();

  const GrpcFrontOptions& options_;
  ResetRate& reset_rate_;
  boost::asio::ip::tcp::socket client_;
  boost::asio::local::stream_protocol::socket server_;  // gRPC has the other end
  std::string to_server_, to_client_;                   // read from one side, not yet taken by the other
  Http2Guard guard_;
  bool is_closed_ = false;
  std::function<void()> on_closed_;
  boost::asio::steady_timer pause_;
  boost::asio::steady_timer timer_;
  uint64_t deadline_ = 0;  // number of the deadline set last
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_GRPC_GRPC_RELAY_H_
