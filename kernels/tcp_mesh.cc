// TcpMesh: whoever exchanges sends what the connections take at once; a thread sends the rest, receives, and listens
// for who is gone.
#include "kernels/tcp_mesh.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

using tcp_mesh::Header;
using tcp_mesh::Hello;
using tcp_mesh::Kind;

constexpr absl::Duration kHelloTime = absl::Seconds(2);  // of one who has connected
constexpr absl::Duration kLeaveTime = absl::Seconds(1);  // for the last words, and their answers
constexpr absl::Duration kRetry = absl::Milliseconds(50);
constexpr int kReadsAtOnce = 64;  // of one connection, before the others have their turn

struct Message {
  std::string head;  // the header, and the whole of a message that is not kRows
  Mesh::Bytes rows;  // in an outbox
  size_t num_sent = 0;
};

// A connection. The mesh's mutex guards what is said to be sent.
struct Peer {
  Socket socket;
  std::string name;  // "rank 3 (10.0.0.2:29500)"

  // To be sent.
  std::deque<Message> queue;
  absl::Time last_sent;
  bool is_last_queued = false, is_write_closed = false;

  // Received, by the receiving thread; guarded: num_received, has_left.
  Header header;
  size_t num_header_bytes = 0, num_body_bytes = 0;
  std::vector<char> reason;
  absl::Time last_heard;
  uint64_t num_received = 0;  // whole kRows
  bool has_left = false;
};

class TcpMesh : public Mesh {
 public:
  TcpMesh(int rank, const TcpMeshOptions& options, absl::Time deadline, std::vector<Peer> peers);
  ~TcpMesh() override;

  int rank() const override { return rank_; }
  int num_ranks() const override { return static_cast<int>(peers_.size()); }
  // NOTE: what of an exchange that failed is still being sent stays as it is.
  std::vector<char>& outbox(int to) override { return has_failed_ ? scrap_ : outboxes_[(round_ + 1) % 2][to]; }
  absl::StatusOr<std::vector<Bytes>> Exchange() override;
  void OnAwaited(std::function<void(uint64_t)> wake) override {
    std::lock_guard lock(mutex_);
    wake_ = std::move(wake);
  }
  void Abort(const absl::Status& reason) override {
    CHECK(!reason.ok());
    std::lock_guard lock(mutex_);
    AbortLocked(reason);
  }

 private:
  void AbortLocked(const absl::Status& reason);
  void Lose(const Peer& peer, const std::string& what);
  void Queue(Peer& peer, Kind kind, std::string_view text, Bytes rows = {});
  void Flush(Peer& peer);
  void Close(Peer& peer);
  void WakeThread();
  bool IsComplete() const;

  void Run();
  void Receive(Peer& peer);
  bool HasHeader(Peer& peer);
  char* Body(Peer& peer);
  void HasMessage(Peer& peer);
  void LookAfter(Peer& peer, absl::Time now);

  const int rank_;
  const absl::Duration heartbeat_, silence_;
  const int wake_event_;

  std::mutex mutex_;
  std::condition_variable complete_;
  std::vector<Peer> peers_;  // [ranks]; of this one, no socket
  absl::Status aborted_;
  absl::Time leave_until_ = absl::InfiniteFuture();  // once it is being destroyed
  std::function<void(uint64_t)> wake_;
  uint64_t round_ = 0;  // exchanges begun; written by the thread that exchanges
  bool has_failed_ = false;

  // [round % 2][rank]. NOTE: a rank begins the round after the next when it has the next of all, who then have had this
  // one: two are enough, for what is sent and for what comes.
  std::array<std::vector<std::vector<char>>, 2> outboxes_, inboxes_;
  std::vector<char> scrap_;
  std::thread thread_;
};

TcpMesh::TcpMesh(int rank, const TcpMeshOptions& options, absl::Time deadline, std::vector<Peer> peers)
    : rank_(rank),
      heartbeat_(options.heartbeat),
      silence_(options.silence),
      wake_event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      peers_(std::move(peers)) {
  CHECK(wake_event_ >= 0);
  for (auto& boxes : outboxes_) boxes.resize(peers_.size());
  for (auto& boxes : inboxes_) boxes.resize(peers_.size());
  const auto milliseconds = static_cast<unsigned>(absl::ToInt64Milliseconds(silence_));
  for (Peer& peer : peers_) {
    peer.last_sent = absl::InfinitePast();  // it is told at once that we are here,
    peer.last_heard = deadline;             // and may itself be waiting for others yet
    setsockopt(peer.socket.fd(), IPPROTO_TCP, TCP_USER_TIMEOUT, &milliseconds, sizeof(milliseconds));
  }
  thread_ = std::thread([this] { Run(); });
}

TcpMesh::~TcpMesh() {
  {
    std::lock_guard lock(mutex_);
    wake_ = nullptr;
    leave_until_ = absl::Now() + kLeaveTime;
    for (Peer& peer : peers_) {
      Queue(peer, Kind::kLeave, "");
      peer.is_last_queued = true;
    }
  }
  WakeThread();
  thread_.join();
  close(wake_event_);
}

absl::StatusOr<std::vector<Mesh::Bytes>> TcpMesh::Exchange() {
  std::unique_lock lock(mutex_);
  if (!aborted_.ok()) {
    has_failed_ = true;
    return aborted_;
  }
  ++round_;
  auto& outboxes = outboxes_[round_ % 2];
  bool is_all_sent = true;
  for (size_t r = 0; r < peers_.size(); ++r) {
    Peer& peer = peers_[r];
    if (static_cast<int>(r) == rank_) continue;
    if (peer.has_left && peer.num_received < round_)
      AbortLocked(absl::AbortedError(absl::StrCat(peer.name, " has left")));
    if (outboxes[r].size() > tcp_mesh::kMaxRows) AbortLocked(absl::ResourceExhaustedError("too much for one message"));
    if (!aborted_.ok()) break;
    Queue(peer, Kind::kRows, "", outboxes[r]);
    Flush(peer);
    is_all_sent &= peer.queue.empty();
  }
  if (!is_all_sent) WakeThread();
  complete_.wait(lock, [this] { return IsComplete() || !aborted_.ok(); });
  if (!IsComplete()) {
    has_failed_ = true;
    return aborted_;
  }
  std::vector<Bytes> came(peers_.size());
  for (size_t r = 0; r < peers_.size(); ++r) came[r] = inboxes_[round_ % 2][r];
  came[rank_] = outboxes[rank_];
  return came;
}

// Whether the round has come from all. NOTE: it succeeds then, whatever has become of the mesh: it does elsewhere.
bool TcpMesh::IsComplete() const {
  return std::all_of(peers_.begin(), peers_.end(),
                     [this](const Peer& peer) { return &peer == &peers_[rank_] || peer.num_received >= round_; });
}

// All that follows until Run holds the mutex.

void TcpMesh::AbortLocked(const absl::Status& reason) {
  if (!aborted_.ok()) return;
  aborted_ = reason;
  const auto code = static_cast<int32_t>(reason.code());
  std::string text(reinterpret_cast<const char*>(&code), sizeof(code));
  text.append(reason.message().data(), std::min<size_t>(reason.message().size(), tcp_mesh::kMaxReason - sizeof(code)));
  for (Peer& peer : peers_) {
    Queue(peer, Kind::kAbort, text);
    peer.is_last_queued = true;
  }
  complete_.notify_all();
  WakeThread();
}

// NOTE: called by the receiving thread: whoever sleeps elsewhere in this process is told.
void TcpMesh::Lose(const Peer& peer, const std::string& what) {
  const bool is_first = aborted_.ok();
  AbortLocked(absl::AbortedError(absl::StrCat(peer.name, " ", what)));
  if (is_first && wake_ != nullptr) wake_(0);
}

void TcpMesh::Queue(Peer& peer, Kind kind, std::string_view text, Bytes rows) {
  if (peer.is_last_queued || peer.socket.fd() < 0) return;
  const Header header = {kind, 0, text.size() + rows.size()};
  std::string head(reinterpret_cast<const char*>(&header), sizeof(header));
  peer.queue.push_back({std::move(head.append(text)), rows});
}

// Sends what the connection takes.
void TcpMesh::Flush(Peer& peer) {
  while (!peer.queue.empty()) {
    Message& message = peer.queue.front();
    const size_t from_head = std::min(message.num_sent, message.head.size()), from_rows = message.num_sent - from_head;
    iovec parts[] = {{message.head.data() + from_head, message.head.size() - from_head},
                     {const_cast<char*>(message.rows.data()) + from_rows, message.rows.size() - from_rows}};
    msghdr what = {};
    what.msg_iov = parts;
    what.msg_iovlen = std::size(parts);
    const ssize_t sent = sendmsg(peer.socket.fd(), &what, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
    if (sent < 0) {
      peer.queue.clear();  // that it is gone, and whether it says why, is seen where its end is received
      peer.is_last_queued = peer.is_write_closed = true;
      return;
    }
    peer.last_sent = absl::Now();
    message.num_sent += sent;
    if (message.num_sent == message.head.size() + message.rows.size()) peer.queue.pop_front();
  }
  if (peer.is_last_queued && !std::exchange(peer.is_write_closed, true)) shutdown(peer.socket.fd(), SHUT_WR);
}

// With what it may yet be told at once: why.
void TcpMesh::Close(Peer& peer) {
  Flush(peer);
  peer.socket = Socket();
  peer.queue.clear();
}

void TcpMesh::WakeThread() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t ignored = write(wake_event_, &one, sizeof(one));
}

// Until all have heard the last words; NOTE: and have said theirs, as what is not received when a connection is closed
// resets it, and what was sent may be lost with that.
void TcpMesh::Run() {
  std::vector<pollfd> waited(peers_.size() + 1);
  const absl::Duration tick = std::min(heartbeat_ / 2, absl::Milliseconds(200));
  while (true) {
    bool is_open = false;
    {
      std::lock_guard lock(mutex_);
      for (size_t r = 0; r < peers_.size(); ++r) {
        const bool has_more = !peers_[r].queue.empty() || (peers_[r].is_last_queued && !peers_[r].is_write_closed);
        waited[r] = {peers_[r].socket.fd(), static_cast<int16_t>(POLLIN | (has_more ? POLLOUT : 0)), 0};
        is_open |= peers_[r].socket.fd() >= 0;
      }
      const bool is_leaving = leave_until_ != absl::InfiniteFuture();
      if (is_leaving && (!is_open || absl::Now() > leave_until_)) return;
    }
    waited.back() = {wake_event_, POLLIN, 0};
    poll(waited.data(), waited.size(), static_cast<int>(absl::ToInt64Milliseconds(tick)));
    uint64_t ignored;
    while (read(wake_event_, &ignored, sizeof(ignored)) > 0) continue;
    for (size_t r = 0; r < peers_.size(); ++r) {
      if (waited[r].fd >= 0 && (waited[r].revents & ~POLLOUT) != 0) Receive(peers_[r]);
    }
    std::lock_guard lock(mutex_);
    const absl::Time now = absl::Now();
    for (Peer& peer : peers_) LookAfter(peer, now);
  }
}

void TcpMesh::LookAfter(Peer& peer, absl::Time now) {
  if (peer.socket.fd() < 0) return;
  if (peer.queue.empty() && now - peer.last_sent >= heartbeat_) Queue(peer, Kind::kHeartbeat, "");
  Flush(peer);
  if (!peer.has_left && now - peer.last_heard >= silence_) {
    Lose(peer, absl::StrCat("has not been heard of for ", absl::FormatDuration(silence_)));
  }
}

// What has come of it. Only the receiving thread calls this and what follows, without the mutex.
void TcpMesh::Receive(Peer& peer) {
  for (int i = 0; i < kReadsAtOnce; ++i) {
    const bool is_header = peer.num_header_bytes < sizeof(Header);
    char* const to =
        is_header ? reinterpret_cast<char*>(&peer.header) + peer.num_header_bytes : Body(peer) + peer.num_body_bytes;
    const size_t size = is_header ? sizeof(Header) - peer.num_header_bytes : peer.header.length - peer.num_body_bytes;
    const ssize_t got = recv(peer.socket.fd(), to, size, 0);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
    if (got <= 0) {
      const int error = got < 0 ? errno : 0;
      std::lock_guard lock(mutex_);
      if (!peer.has_left && error == ETIMEDOUT) {
        Lose(peer, absl::StrCat("has not been heard of for ", absl::FormatDuration(silence_)));
      } else if (!peer.has_left) {
        Lose(peer, error == 0 ? "has closed its connection" : absl::StrCat("is gone: ", ErrorText(error)));
      }
      Close(peer);
      return;
    }
    peer.last_heard = absl::Now();
    (is_header ? peer.num_header_bytes : peer.num_body_bytes) += got;
    if (peer.num_header_bytes < sizeof(Header)) continue;
    if (is_header && !HasHeader(peer)) return;
    if (peer.num_body_bytes == peer.header.length) HasMessage(peer);
  }
}

char* TcpMesh::Body(Peer& peer) {
  if (peer.header.kind != Kind::kRows) return peer.reason.data();
  return inboxes_[(peer.num_received + 1) % 2][&peer - peers_.data()].data();
}

// False where it is none of ours: the connection is closed.
bool TcpMesh::HasHeader(Peer& peer) {
  const Kind kind = peer.header.kind;
  const bool is_rows = kind == Kind::kRows, is_empty = kind == Kind::kHeartbeat || kind == Kind::kLeave;
  const uint64_t most = is_rows ? tcp_mesh::kMaxRows : is_empty ? 0 : tcp_mesh::kMaxReason;
  const uint64_t least = kind == Kind::kAbort ? sizeof(int32_t) : 0;
  std::unique_lock lock(mutex_);
  // NOTE: one round ahead is what a rank may be: it has had ours of this one, not of the next.
  const bool is_early = is_rows && peer.num_received > round_;
  if ((!is_rows && !is_empty && kind != Kind::kAbort) || peer.header.length > most || peer.header.length < least ||
      is_early || peer.has_left) {
    Lose(peer, absl::StrFormat("speaks another language: kind %#x, %d bytes", static_cast<uint32_t>(kind),
                               peer.header.length));
    peer.has_left = true;
    Close(peer);
    return false;
  }
  if (is_rows && peer.num_received == round_ && wake_ != nullptr) wake_(round_ + 1);
  lock.unlock();
  if (is_rows) inboxes_[(peer.num_received + 1) % 2][&peer - peers_.data()].resize(peer.header.length);
  if (kind == Kind::kAbort) peer.reason.resize(peer.header.length);
  return true;
}

void TcpMesh::HasMessage(Peer& peer) {
  peer.num_header_bytes = peer.num_body_bytes = 0;
  if (peer.header.kind == Kind::kHeartbeat) return;
  std::lock_guard lock(mutex_);
  if (peer.header.kind == Kind::kRows) {
    ++peer.num_received;
    if (peer.num_received == round_ && IsComplete()) complete_.notify_all();
    return;
  }
  // It says no more, and is told no more.
  peer.has_left = true;
  if (peer.header.kind == Kind::kLeave) {
    if (peer.num_received < round_) Lose(peer, "has left");
    peer.is_last_queued = true;
    return;
  }
  int32_t code;
  std::memcpy(&code, peer.reason.data(), sizeof(code));
  const bool is_first = aborted_.ok();
  const bool is_code = code > 0 && code <= static_cast<int32_t>(absl::StatusCode::kUnauthenticated);
  AbortLocked(absl::Status(is_code ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kAborted,
                           absl::string_view(peer.reason.data() + sizeof(code), peer.reason.size() - sizeof(code))));
  if (is_first && wake_ != nullptr) wake_(0);
}

// [mesh][local rank][rank] of this process, as connections come to be; guarded by the mutex.
struct Connections {
  std::mutex mutex;
  std::vector<std::vector<std::vector<Socket>>> sockets;
  int num_missing = 0;  // of those that others make
  absl::Status status;
};

absl::Status Accept(const Socket& listener, const TcpMeshOptions& options, absl::Time deadline, Connections* all) {
  const int first = options.node * options.ranks_per_node;
  const int num_ranks = static_cast<int>(options.nodes.size()) * options.ranks_per_node;
  while (all->num_missing > 0) {
    auto socket = listener.Accept(deadline);
    if (absl::IsDeadlineExceeded(socket.status())) {
      return absl::DeadlineExceededError(
          absl::StrFormat("node %d: %d connections of other ranks are missing", options.node, all->num_missing));
    }
    if (!socket.ok()) return socket.status();
    Hello hello;
    if (!socket->Receive(reinterpret_cast<char*>(&hello), sizeof(hello), absl::Now() + kHelloTime).ok()) continue;
    const bool is_one_of_us = hello.magic == Hello().magic && hello.session == options.session && hello.mesh >= 0 &&
                              hello.mesh < options.num_meshes && hello.to >= first &&
                              hello.to < first + options.ranks_per_node && hello.from > hello.to &&
                              hello.from < num_ranks;
    if (!is_one_of_us) continue;
    std::lock_guard lock(all->mutex);
    Socket& place = all->sockets[hello.mesh][hello.to - first][hello.from];
    if (place.fd() >= 0) continue;
    place = *std::move(socket);
    --all->num_missing;
  }
  return absl::OkStatus();
}

absl::StatusOr<Socket> Connect(const std::string& address, const Hello& hello, absl::Time deadline) {
  while (true) {
    auto socket = Socket::Connect(address, deadline);
    if (socket.ok()) {
      const std::string_view bytes(reinterpret_cast<const char*>(&hello), sizeof(hello));
      if (absl::Status status = socket->Send(bytes, deadline); !status.ok()) return status;
      return socket;
    }
    if (absl::IsInvalidArgument(socket.status()) || absl::Now() >= deadline) return socket.status();
    absl::SleepFor(kRetry);
  }
}

}  // namespace

absl::StatusOr<std::vector<std::vector<std::unique_ptr<Mesh>>>> ConnectTcpMeshes(const Socket& listener,
                                                                                 const TcpMeshOptions& options,
                                                                                 absl::Time deadline) {
  const int num_local = options.ranks_per_node, num_ranks = static_cast<int>(options.nodes.size()) * num_local;
  const int first = options.node * num_local;
  Connections all;
  all.sockets.resize(options.num_meshes);
  for (auto& mesh : all.sockets) {
    for (int local = 0; local < num_local; ++local) {
      mesh.emplace_back(num_ranks);
      all.num_missing += num_ranks - 1 - (first + local);
    }
  }
  // Side by side, lest two wait for each other.
  absl::Status accepted, connected;
  std::thread accepting([&] { accepted = Accept(listener, options, deadline, &all); });
  for (int mesh = 0; mesh < options.num_meshes && connected.ok(); ++mesh) {
    for (int from = first; from < first + num_local && connected.ok(); ++from) {
      for (int to = 0; to < from && connected.ok(); ++to) {
        const Hello hello = {Hello().magic, mesh, from, to, 0, options.session};
        auto socket = Connect(options.nodes[to / num_local], hello, deadline);
        connected = socket.status();
        std::lock_guard lock(all.mutex);
        if (socket.ok()) all.sockets[mesh][from - first][to] = *std::move(socket);
      }
    }
  }
  accepting.join();
  if (!connected.ok()) return connected;
  if (!accepted.ok()) return accepted;

  std::vector<std::vector<std::unique_ptr<Mesh>>> meshes(options.num_meshes);
  for (int mesh = 0; mesh < options.num_meshes; ++mesh) {
    for (int local = 0; local < num_local; ++local) {
      std::vector<Peer> peers(num_ranks);
      for (int r = 0; r < num_ranks; ++r) {
        peers[r].socket = std::move(all.sockets[mesh][local][r]);
        peers[r].name = absl::StrFormat("rank %d (%s)", r, options.nodes[r / num_local]);
      }
      meshes[mesh].push_back(std::make_unique<TcpMesh>(first + local, options, deadline, std::move(peers)));
    }
  }
  return meshes;
}

}  // namespace cachalot
