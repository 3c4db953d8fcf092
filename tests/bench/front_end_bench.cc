// The front end alone: an engine that answers at once, one token a stream a step, and clients that frame and count
// every event. Prints streamed tokens per second over HTTP and over gRPC, and beside them what bare sockets do.
//
//   build/release/tests/bench/front_end_bench [--connections 256] [--tokens 2000] [--steps-ahead 16] [--model DIR with
//   a tokenizer]
//
// Last, one stream by itself and then beside 2,000 others: half of them silent, half of them given a token a second and
// read by nobody.
//
// The engine never runs more than --steps-ahead steps ahead of the clients, so that no answer is sent in fewer events
// than tokens; a run in which the clients have counted anything but one event a token fails.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "cachalot/v1/cachalot.pb.h"
#include "server/grpc/grpc_server.h"
#include "server/http/http_server.h"
#include "server/http/openai.h"
#include "server/http/openai_error.h"
#include "server/text/generator.h"
#include "server/text/tokenizer.h"
#include "tests/bench/grpc_counter.h"
#include "tests/bench/instant_engines.h"

namespace cachalot {
namespace {

// Clients look at their sockets at most so often: as with a network card that moderates its interrupts, what comes
// close together is read together.
constexpr std::chrono::microseconds kReadPeriod{200};
constexpr size_t kMessageBytes = 300;  // of the bare sockets: about what an event of a chat has

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "front_end_bench: %s\n", what.c_str());
  std::exit(1);
}

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double CpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) Die("cannot connect");
  return fd;
}

void Send(int fd, const std::string& bytes) {
  if (write(fd, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) Die("cannot send");
}

void Ask(int fd, int prompt, int num_tokens) {
  const std::string body =
      absl::StrCat("{\"model\":\"model\",\"prompt\":[", prompt, "],\"stream\":true,\"max_tokens\":", num_tokens, "}");
  const std::string request =
      absl::StrCat("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: ", body.size(), "\r\n\r\n", body);
  Send(fd, request);
}

// Frames one response: the head, then chunks (RFC 9112, 7.1), and in them events that end with an empty line.
class EventCounter {
 public:
  // False when the response has ended. Nothing is to be replied.
  bool Feed(const char* data, size_t size, std::string*) {
    in_.append(data, size);
    size_t at = 0;
    while (true) {
      if (!in_body_) {
        const size_t end = in_.find("\r\n\r\n", at);
        if (end == std::string::npos) break;
        if (in_.compare(at, 12, "HTTP/1.1 200") != 0) Die(absl::StrCat("a request failed: ", in_));
        at = end + 4;
        in_body_ = true;
        continue;
      }
      const size_t line = in_.find("\r\n", at);
      if (line == std::string::npos) break;
      const size_t chunk = std::strtoul(in_.c_str() + at, nullptr, 16);
      if (in_.size() < line + 2 + chunk + 2) break;
      if (chunk == 0) return false;
      Count(in_.data() + line + 2, chunk);
      at = line + 2 + chunk + 2;
    }
    in_.erase(0, at);
    return true;
  }
  int64_t num_events() const { return num_events_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  void Count(const char* data, size_t size) {
    num_bytes_ += static_cast<int64_t>(size);
    event_.append(data, size);
    size_t at = 0, end;
    while ((end = event_.find("\n\n", at)) != std::string::npos) {
      if (event_.compare(at, 6, "data: ") != 0) Die("an event without data");
      if (event_.compare(at, end - at, "data: [DONE]") != 0) ++num_events_;
      at = end + 2;
    }
    event_.erase(0, at);
  }

  std::string in_, event_;
  bool in_body_ = false;
  int64_t num_events_ = 0, num_bytes_ = 0;
};

struct Counts {
  int64_t events = 0, bytes = 0, reads = 0;
};

// Reads all connections, each with its counter, until every response has ended; `seen` is told of every event.
template <typename Counter, typename Seen>
Counts CountEvents(const std::vector<int>& fds, std::vector<Counter> counters, Seen seen) {
  const int epoll = epoll_create1(0);
  std::string reply;
  for (size_t i = 0; i < fds.size(); ++i) {
    epoll_event event = {.events = EPOLLIN, .data = {.u64 = i}};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event);
  }
  Counts counts;
  std::vector<epoll_event> ready(fds.size());
  std::vector<char> buffer(64 << 10);
  for (size_t num_open = fds.size(); num_open > 0;) {
    const int n = epoll_wait(epoll, ready.data(), static_cast<int>(ready.size()), -1);
    for (int i = 0; i < n; ++i) {
      const size_t index = ready[i].data.u64;
      const ssize_t bytes = read(fds[index], buffer.data(), buffer.size());
      if (bytes <= 0) Die("a connection was closed");
      ++counts.reads;
      const int64_t before = counters[index].num_events();
      reply.clear();
      const bool goes_on = counters[index].Feed(buffer.data(), static_cast<size_t>(bytes), &reply);
      if (!reply.empty()) Send(fds[index], reply);
      if (!goes_on) {
        epoll_ctl(epoll, EPOLL_CTL_DEL, fds[index], nullptr);
        --num_open;
      }
      counts.events += counters[index].num_events() - before;
    }
    seen(counts.events);
    std::this_thread::sleep_for(kReadPeriod);
  }
  for (const Counter& counter : counters) counts.bytes += counter.num_bytes();
  close(epoll);
  return counts;
}

struct Setup {
  int num_connections = 256, num_tokens = 2000, steps_ahead = 16;
  const Tokenizer* tokenizer = nullptr;
  std::vector<int32_t> vocabulary;
  int64_t num_events() const { return int64_t{num_connections} * num_tokens; }
};

void Report(const char* name, const Setup& setup, double seconds, double cpu_seconds, const std::string& more) {
  std::printf("%-28s %9.0f /s   %d streams, %.2f s, %.2f us of CPU each%s\n", name,
              static_cast<double>(setup.num_events()) / seconds, setup.num_connections, seconds,
              cpu_seconds * 1e6 / static_cast<double>(setup.num_events()), more.c_str());
  std::fflush(stdout);
}

// All of HTTP between an engine and the clients, on a free port.
class HttpFrontEnd {
 public:
  HttpFrontEnd(Engine* engine, const Tokenizer* tokenizer)
      : generator_(engine, tokenizer, {.metrics = &metrics_}),
        api_(&generator_, &metrics_, "model", "model", "0"),
        server_({.port = 0}, HttpErrorResponse) {
    api_.Register(&server_);
    if (!server_.Bind().ok() || !server_.Start(100'000).ok()) Die("cannot listen");
  }
  ~HttpFrontEnd() {
    generator_.Stop();
    server_.Stop(absl::Seconds(1));
  }
  int port() const { return server_.port(); }

 private:
  Metrics metrics_;
  Generator generator_;
  OpenAiApi api_;
  HttpServer server_;
};

void BenchHttp(const Setup& setup) {
  InstantEngine engine(setup.num_connections, setup.num_tokens, setup.steps_ahead, setup.vocabulary);
  HttpFrontEnd front_end(&engine, setup.tokenizer);
  std::vector<int> fds(setup.num_connections);
  for (int& fd : fds) fd = Connect(front_end.port());
  const double cpu = CpuSeconds();
  for (int fd : fds) Ask(fd, 1, setup.num_tokens);
  const Counts counts =
      CountEvents(fds, std::vector<EventCounter>(fds.size()), [&](int64_t events) { engine.Seen(events); });
  const double seconds = SecondsSince(engine.begin());
  if (counts.events != setup.num_events()) Die(absl::StrCat("counted ", counts.events, " events"));
  Report("HTTP, server-sent events", setup, seconds, CpuSeconds() - cpu,
         absl::StrCat(", ", counts.bytes / counts.events, " bytes an event, ",
                      static_cast<double>(counts.events) / static_cast<double>(counts.reads), " events a read"));
  for (int fd : fds) close(fd);
}

void BenchSlowClients(const Setup& setup) {
  constexpr int kNumOthers = 2000;
  const int num_tokens = setup.num_tokens * 20;
  MixedEngine engine(num_tokens, setup.steps_ahead, setup.vocabulary);
  HttpFrontEnd front_end(&engine, setup.tokenizer);
  const auto fast_rate = [&] {
    const int fd = Connect(front_end.port());
    Ask(fd, 1, num_tokens);
    const auto begin = Clock::now();
    const Counts counts = CountEvents({fd}, std::vector<EventCounter>(1), [&](int64_t events) { engine.Seen(events); });
    if (counts.events != num_tokens) Die(absl::StrCat("counted ", counts.events, " events"));
    close(fd);
    return num_tokens / SecondsSince(begin);
  };
  const auto median = [&fast_rate] {
    std::vector<double> rates = {fast_rate(), fast_rate(), fast_rate(), fast_rate(), fast_rate()};
    std::sort(rates.begin(), rates.end());
    return rates[2];
  };
  const double alone = median();
  std::vector<int> fds;
  for (int i = 0; i < kNumOthers; ++i) {
    fds.push_back(Connect(front_end.port()));
    Ask(fds.back(), i % 2 == 0 ? 2 : 3, 1 << 19);
  }
  while (engine.num_arrived() < kNumOthers) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  std::this_thread::sleep_for(std::chrono::seconds(2));  // what they were given at once has been sent
  const double beside = median();
  std::printf("%-28s %9.0f /s alone, %.0f /s beside %d idle and slow streams: %.1f %%\n", "one fast stream", alone,
              beside, kNumOthers, 100 * beside / alone);
  engine.Stop();
  for (int fd : fds) close(fd);
}

// One thread sends kMessageBytes to each connection in turn, another reads and counts.
void BenchSockets(const Setup& setup) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(listener, 1024) != 0) Die("listen");
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length);
  std::vector<int> clients, servers;
  for (int i = 0; i < setup.num_connections; ++i) {
    clients.push_back(Connect(ntohs(address.sin_port)));
    servers.push_back(accept(listener, nullptr, nullptr));
    const int on = 1;
    setsockopt(servers.back(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }
  std::atomic<int64_t> num_seen = 0;
  const double cpu = CpuSeconds();
  const auto begin = Clock::now();
  std::thread sender([&] {
    const std::string message(kMessageBytes, 'x');
    for (int t = 0; t < setup.num_tokens; ++t) {
      while (num_seen.load() < int64_t{t - setup.steps_ahead} * setup.num_connections) std::this_thread::yield();
      for (int fd : servers) {
        if (send(fd, message.data(), message.size(), 0) != static_cast<ssize_t>(message.size())) Die("cannot send");
      }
    }
  });
  const int epoll = epoll_create1(0);
  for (int fd : clients) {
    epoll_event event = {.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
  }
  std::vector<epoll_event> ready(clients.size());
  std::vector<char> buffer(64 << 10);
  int64_t num_bytes = 0, num_reads = 0;
  const int64_t all = setup.num_events() * static_cast<int64_t>(kMessageBytes);
  while (num_bytes < all) {
    const int n = epoll_wait(epoll, ready.data(), static_cast<int>(ready.size()), -1);
    for (int i = 0; i < n; ++i, ++num_reads) num_bytes += read(ready[i].data.fd, buffer.data(), buffer.size());
    num_seen = num_bytes / static_cast<int64_t>(kMessageBytes);
    std::this_thread::sleep_for(kReadPeriod);
  }
  const double seconds = SecondsSince(begin);
  sender.join();
  Report(
      "bare sockets, 300 bytes", setup, seconds, CpuSeconds() - cpu,
      absl::StrCat(", ", static_cast<double>(setup.num_events()) / static_cast<double>(num_reads), " messages a read"));
  for (int fd : clients) close(fd);
  for (int fd : servers) close(fd);
  close(listener);
  close(epoll);
}

void BenchGrpc(const Setup& setup, int num_connections) {
  InstantEngine engine(setup.num_connections, setup.num_tokens, setup.steps_ahead, setup.vocabulary);
  Metrics metrics;
  Generator generator(&engine, setup.tokenizer, {.metrics = &metrics});
  GrpcServer server({});
  absl::Status started = server.Bind();
  if (started.ok()) started = server.Start(setup.num_connections, &generator, "model");
  if (!started.ok()) Die(started.ToString());
  v1::CompleteRequest request;
  request.mutable_token_ids()->add_ids(1);
  request.mutable_sampling()->set_max_tokens(setup.num_tokens);
  std::vector<int> fds;
  std::vector<std::string> calls(num_connections, GrpcCounter::Preface());
  std::vector<GrpcCounter> counters(num_connections);
  for (int i = 0; i < setup.num_connections; ++i) {
    const int c = i % num_connections;
    calls[c] +=
        counters[c].Call(1 + 2 * (i / num_connections), "/cachalot.v1.Cachalot/Complete", request.SerializeAsString());
  }
  const double cpu = CpuSeconds();
  for (const std::string& call : calls) {
    fds.push_back(Connect(server.port()));
    Send(fds.back(), call);
  }
  const Counts counts = CountEvents(fds, std::move(counters), [&](int64_t events) { engine.Seen(events); });
  const double seconds = SecondsSince(engine.begin());
  if (counts.events != setup.num_events()) Die(absl::StrCat("counted ", counts.events, " responses"));
  Report(absl::StrCat("gRPC over ", num_connections, " connections").c_str(), setup, seconds, CpuSeconds() - cpu,
         absl::StrCat(", ", counts.bytes / counts.events, " bytes a message, ",
                      static_cast<double>(counts.events) / static_cast<double>(counts.reads), " messages a read"));
  for (int fd : fds) close(fd);
  generator.Stop();
  server.Stop(absl::Seconds(1));
}

int Main(int argc, char** argv) {
  rlimit files = {};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  Setup setup;
  std::string model = CACHALOT_TEST_DATA_DIR "/golden/data/v3_like", only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--model") {
      model = argv[i + 1];
    } else if (name == "--only") {
      only = argv[i + 1];
    } else if (!(name == "--connections" && absl::SimpleAtoi(argv[i + 1], &setup.num_connections)) &&
               !(name == "--steps-ahead" && absl::SimpleAtoi(argv[i + 1], &setup.steps_ahead)) &&
               !(name == "--tokens" && absl::SimpleAtoi(argv[i + 1], &setup.num_tokens))) {
      Die(absl::StrCat("what is ", name, "?"));
    }
  }
  auto tokenizer = Tokenizer::Load(model);
  if (!tokenizer.ok()) Die(tokenizer.status().ToString());
  setup.tokenizer = tokenizer->get();
  for (int32_t id = 0; id < (*tokenizer)->vocab_size(); ++id) {
    const std::string bytes = (*tokenizer)->TokenBytes(id);
    const bool is_text = std::all_of(bytes.begin(), bytes.end(), [](char byte) { return byte >= ' ' && byte <= '~'; });
    if (is_text && !bytes.empty() && !(*tokenizer)->is_special(id)) setup.vocabulary.push_back(id);
  }
  if (setup.vocabulary.empty()) Die("the tokenizer has no ordinary tokens");
  const auto wanted = [&only](const char* name) { return only.empty() || only == name; };
  if (wanted("sockets")) BenchSockets(setup);
  if (wanted("http")) BenchHttp(setup);
  if (wanted("grpc")) {
    for (int num_channels : {1, 16, 256}) BenchGrpc(setup, std::min(num_channels, setup.num_connections));
  }
  if (wanted("slow")) BenchSlowClients(setup);
  return 0;
}

}  // namespace
}  // namespace cachalot

int main(int argc, char** argv) { return cachalot::Main(argc, argv); }
