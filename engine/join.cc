// The join: the leader challenges, a node proves that it has the secret and says what it is, the leader answers.
//
// Messages are a length (uint32_t) and lines "name value". All but the challenge begin with an HMAC of both nonces and
// what follows.
#include "engine/join.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <spdlog/spdlog.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "kernels/check.h"

namespace cachalot {
namespace {

constexpr absl::string_view kGreeting = "cachalot-join-1";
constexpr size_t kMacBytes = 32, kNonceBytes = 32;
constexpr uint32_t kMaxMessage = 1 << 20;
constexpr absl::Duration kPatience = absl::Seconds(2);  // with one that is connected
constexpr absl::Duration kLook = absl::Milliseconds(200), kRetry = absl::Milliseconds(200);

using Facts = std::vector<std::pair<std::string, std::string>>;

std::string NewNonce() {
  std::string bytes(kNonceBytes, '\0');
  CHECK(getentropy(bytes.data(), bytes.size()) == 0);
  return absl::BytesToHexString(bytes);
}

std::string Mac(const std::string& secret, const std::string& text) {
  std::string mac(kMacBytes, '\0');
  unsigned size = 0;
  CHECK(HMAC(EVP_sha256(), secret.data(), static_cast<int>(secret.size()),
             reinterpret_cast<const unsigned char*>(text.data()), text.size(),
             reinterpret_cast<unsigned char*>(mac.data()), &size) != nullptr);
  CHECK(size == kMacBytes);
  return mac;
}

absl::Status SendMessage(const Socket& socket, const std::string& message) {
  const auto length = static_cast<uint32_t>(message.size());
  const std::string head(reinterpret_cast<const char*>(&length), sizeof(length));
  return socket.Send(head + message, absl::Now() + kPatience);
}

absl::StatusOr<std::string> ReceiveMessage(const Socket& socket, absl::Time deadline) {
  uint32_t length = 0;
  absl::Status status = socket.Receive(reinterpret_cast<char*>(&length), sizeof(length), deadline);
  if (status.ok() && length > kMaxMessage) status = absl::UnavailableError("what listens there is no Cachalot");
  if (!status.ok()) return status;
  std::string message(length, '\0');
  if (status = socket.Receive(message.data(), length, deadline); !status.ok()) return status;
  return message;
}

std::string Lines(const Facts& facts) {
  return absl::StrJoin(facts, "\n",
                       [](std::string* out, const auto& fact) { absl::StrAppend(out, fact.first, " ", fact.second); });
}

Facts ParseLines(const std::string& text) {
  Facts facts;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    facts.emplace_back(absl::StrSplit(line, absl::MaxSplits(' ', 1)));
  }
  return facts;
}

// Both nonces, and whose message it is: none can be given back to who made it, or told again.
struct Proof {
  std::string secret, leader_nonce, node_nonce;
  std::string Seal(absl::string_view from, const std::string& text) const {
    return Mac(secret, absl::StrCat(from, "\n", leader_nonce, "\n", node_nonce, "\n", text)) + text;
  }
  bool Holds(absl::string_view from, const std::string& message) const {
    if (message.size() < kMacBytes) return false;
    const std::string expected = Seal(from, message.substr(kMacBytes));
    return CRYPTO_memcmp(message.data(), expected.data(), kMacBytes) == 0;
  }
};

MeshSession SessionOf(const std::string& secret, const std::string& nonce) {
  MeshSession session;
  const std::string mac = Mac(secret, absl::StrCat("mesh\n", nonce));
  std::copy(mac.begin(), mac.end(), session.begin());
  return session;
}

class Leader {
 public:
  explicit Leader(const JoinOptions& options) : options_(options), joined_(options.num_nodes) {}
  absl::StatusOr<JoinedNodes> Lead();

 private:
  struct Node {
    Socket socket;
    Proof proof;
    std::string address;
  };
  void Greet(Socket socket);
  std::string WhyNot(const Facts& facts, int* node, int* port) const;
  void ForgetWhoLeft();
  std::vector<int> Missing() const;

  const JoinOptions& options_;
  std::vector<Node> joined_;
};

absl::StatusOr<JoinedNodes> Leader::Lead() {
  auto listener = Socket::Listen(options_.leader);
  if (!listener.ok()) return listener.status();
  const absl::Time deadline = absl::Now() + options_.timeout;
  spdlog::info("waiting for {} nodes to join at {}", options_.num_nodes - 1, options_.leader);
  while (!Missing().empty()) {
    auto socket = listener->Accept(std::min(deadline, absl::Now() + kLook));
    if (socket.ok()) {
      Greet(*std::move(socket));
    } else if (!absl::IsDeadlineExceeded(socket.status())) {
      return socket.status();
    }
    ForgetWhoLeft();
    if (absl::Now() < deadline || Missing().empty()) continue;
    return absl::DeadlineExceededError(absl::StrFormat("%d of %d nodes have not joined within %s: %s", Missing().size(),
                                                       options_.num_nodes, absl::FormatDuration(options_.timeout),
                                                       absl::StrJoin(Missing(), ", ")));
  }
  JoinedNodes all;
  all.listener = *std::move(listener);
  const std::string nonce = NewNonce();
  Facts answer = {{"session", nonce}};
  all.session = SessionOf(options_.secret, nonce);
  all.nodes.push_back(options_.leader);
  for (int node = 1; node < options_.num_nodes; ++node) {
    all.nodes.push_back(joined_[node].address);
    answer.emplace_back("node", joined_[node].address);
  }
  for (int node = 1; node < options_.num_nodes; ++node) {
    // NOTE: one that is gone by now is missed by all in what comes next.
    SendMessage(joined_[node].socket, joined_[node].proof.Seal("leader", Lines(answer))).IgnoreError();
  }
  return all;
}

std::vector<int> Leader::Missing() const {
  std::vector<int> missing;
  for (int node = 1; node < options_.num_nodes; ++node) {
    if (joined_[node].socket.fd() < 0) missing.push_back(node);
  }
  return missing;
}

void Leader::ForgetWhoLeft() {
  for (Node& node : joined_) {
    char byte;
    if (node.socket.fd() < 0) continue;
    const ssize_t got = recv(node.socket.fd(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) node = Node();
  }
}

// Of one who has connected: a node that has joined then, or nobody.
void Leader::Greet(Socket socket) {
  Proof proof = {options_.secret, NewNonce(), ""};
  const std::string from = socket.peer_address();
  if (!SendMessage(socket, Lines({{std::string(kGreeting), proof.leader_nonce}})).ok()) return;
  const auto message = ReceiveMessage(socket, absl::Now() + kPatience);
  if (!message.ok() || message->size() < kMacBytes) return;
  const Facts facts = ParseLines(message->substr(kMacBytes));
  proof.node_nonce = facts[0].second;
  int node = 0, port = 0;
  ForgetWhoLeft();  // it may be one that was started again
  std::string why_not = "the cluster secret is not the leader's";
  if (proof.Holds("node", *message)) why_not = WhyNot(facts, &node, &port);
  if (!why_not.empty()) {
    spdlog::warn("{} was refused: {}", from, why_not);
    SendMessage(socket, proof.Seal("leader", Lines({{"refused", why_not}}))).IgnoreError();
    return;
  }
  const auto address = SplitAddress(from);
  if (!address.ok()) return;
  joined_[node] = {std::move(socket), std::move(proof), JoinAddress(address->first, absl::StrCat(port))};
  spdlog::info("node {} has joined from {}", node, from);
}

std::string Leader::WhyNot(const Facts& facts, int* node, int* port) const {
  // The nonce, the node, its port, then what must be as the leader's.
  if (facts.size() < 3 || !absl::SimpleAtoi(facts[1].second, node) || !absl::SimpleAtoi(facts[2].second, port)) {
    return "the node speaks another language: it is of another build";
  }
  if (*port < 1 || *port > 65535 || *node < 1 || *node >= options_.num_nodes) {
    return absl::StrFormat("node %d: node-rank is not one of 1 to %d", *node, options_.num_nodes - 1);
  }
  const std::string name = absl::StrCat("node ", *node, ": ");
  const Facts theirs(facts.begin() + 3, facts.end());
  for (size_t i = 0; i < options_.facts.size(); ++i) {
    const auto& [fact, value] = options_.facts[i];
    if (i >= theirs.size() || theirs[i].first != fact) return name + "it is of another build";
    if (theirs[i].second != value) {
      return absl::StrCat(name, fact, " is ", theirs[i].second, ", the leader's is ", value);
    }
  }
  if (joined_[*node].socket.fd() >= 0) {
    return absl::StrCat(name, "one at ", joined_[*node].address, " has joined already");
  }
  return "";
}

// Unavailable and DeadlineExceeded: may be tried again.
absl::StatusOr<JoinedNodes> TryJoin(const JoinOptions& options, absl::Time deadline) {
  auto socket = Socket::Connect(options.leader, std::min(deadline, absl::Now() + absl::Seconds(5)));
  if (!socket.ok()) return socket.status();
  const auto here = SplitAddress(socket->local_address());
  if (!here.ok()) return here.status();
  auto listener = Socket::Listen(JoinAddress(here->first, "0"));
  if (!listener.ok()) return listener.status();
  const auto port = SplitAddress(listener->local_address());
  if (!port.ok()) return port.status();

  const auto challenge = ReceiveMessage(*socket, deadline);
  if (!challenge.ok()) return challenge.status();
  const Facts greeting = ParseLines(*challenge);
  if (greeting[0].first != kGreeting) {
    return absl::UnavailableError(absl::StrCat("what listens at ", options.leader, " is no leader"));
  }
  const Proof proof = {options.secret, greeting[0].second, NewNonce()};
  Facts mine = {{"nonce", proof.node_nonce}, {"node", absl::StrCat(options.node)}, {"port", port->second}};
  mine.insert(mine.end(), options.facts.begin(), options.facts.end());
  if (absl::Status status = SendMessage(*socket, proof.Seal("node", Lines(mine))); !status.ok()) return status;

  const auto answer = ReceiveMessage(*socket, deadline);
  if (!answer.ok()) return answer.status();
  if (!proof.Holds("leader", *answer)) {
    return absl::PermissionDeniedError(
        absl::StrFormat("node %d: the cluster secret is not the leader's (%s)", options.node, options.leader));
  }
  const Facts said = ParseLines(answer->substr(kMacBytes));
  if (said[0].first == "refused") return absl::InvalidArgumentError(said[0].second);
  if (said.size() != static_cast<size_t>(options.num_nodes)) return absl::InternalError("the leader counts otherwise");
  JoinedNodes all;
  all.listener = *std::move(listener);
  all.session = SessionOf(options.secret, said[0].second);
  all.nodes.push_back(options.leader);
  for (size_t i = 1; i < said.size(); ++i) all.nodes.push_back(said[i].second);
  return all;
}

}  // namespace

absl::StatusOr<JoinedNodes> JoinNodes(const JoinOptions& options) {
  if (options.node == 0) return Leader(options).Lead();
  const absl::Time deadline = absl::Now() + options.timeout;
  spdlog::info("joining as node {} of {} at {}", options.node, options.num_nodes, options.leader);
  while (true) {
    auto joined = TryJoin(options, deadline);
    if (joined.ok() || !(absl::IsUnavailable(joined.status()) || absl::IsDeadlineExceeded(joined.status()))) {
      return joined;
    }
    if (absl::Now() + kRetry >= deadline) {
      return absl::DeadlineExceededError(absl::StrFormat("node %d has not joined at %s within %s: %s", options.node,
                                                         options.leader, absl::FormatDuration(options.timeout),
                                                         joined.status().message()));
    }
    absl::SleepFor(kRetry);
  }
}

}  // namespace cachalot
