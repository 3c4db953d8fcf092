// Serving until a signal, then the drain.
#include "server/cli/serve.h"

#include <signal.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "server/cli/serving.h"
#include "server/heap_trimmer.h"

namespace cachalot {
namespace {

constexpr absl::Duration kHealthPeriod = absl::Milliseconds(100);
constexpr int kHealthsATrim = 10;  // memory is looked at once a second
// What is in flight when the engine fails has this long to hear of it.
constexpr absl::Duration kLastWords = absl::Milliseconds(600);

// SIGTERM and SIGINT as something to wait for.
class StopSignals {
 public:
  StopSignals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    signal(SIGPIPE, SIG_IGN);
  }
  // True if one came within `timeout`.
  bool Wait(absl::Duration timeout) const {
    const timespec time = absl::ToTimespec(timeout);
    return sigtimedwait(&set_, nullptr, &time) > 0;
  }
  // The next one ends the process, as it would have without us.
  void Unblock() const { pthread_sigmask(SIG_UNBLOCK, &set_, nullptr); }

 private:
  sigset_t set_;
};

// A load cannot be interrupted from within: as long as this lives, a signal ends the process.
class ExitOnSignal {
 public:
  explicit ExitOnSignal(const StopSignals& signals)
      : thread_([this, &signals] {
          while (!is_done_) {
            if (signals.Wait(absl::Milliseconds(50))) std::_Exit(0);
          }
        }) {}
  ~ExitOnSignal() {
    is_done_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> is_done_ = false;
  std::thread thread_;
};

int Fail(const absl::Status& status) {
  const std::string line = absl::StrReplaceAll(status.message(), {{"\n", " "}});
  spdlog::default_logger_raw()->flush();
  std::fprintf(stderr, "cachalot: %s\n", line.c_str());
  return 1;
}

// Waits for what is in flight, but not longer than `timeout`.
void Drain(const Serving& serving, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (serving.num_running() > 0 && serving.health().ok() && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(20));
  }
}

// NOTE: a device that failed may hang whoever touches it, destructors and exit handlers included, and a client may
// never take what it is sent: the process ends here, whatever is left.
[[noreturn]] void ExitAfterFailure(Serving* serving) {
  std::thread([] {
    absl::SleepFor(kLastWords + absl::Milliseconds(200));
    std::_Exit(1);
  }).detach();
  serving->Abandon(kLastWords);
  std::_Exit(1);
}

}  // namespace

int Serve(const ServeOptions& options) {
  SetUpLogging(options.log_format, options.log_level);
  const StopSignals signals;
  Serving serving(options);
  if (absl::Status status = serving.Bind(); !status.ok()) return Fail(status);
  {
    const ExitOnSignal exit_on_signal(signals);
    if (absl::Status status = serving.Load(); !status.ok()) return Fail(status);
  }
  if (absl::Status status = serving.Start(); !status.ok()) return Fail(status);
  spdlog::info("{}", serving.ReadyLine());
  absl::Status health;
  HeapTrimmer heap;
  for (int i = 0; health.ok() && !signals.Wait(kHealthPeriod); i = (i + 1) % kHealthsATrim) {
    if (i == 0) heap.Look();
    health = serving.health();
  }

  // Stop: a second signal ends the process at once.
  signals.Unblock();
  if (health.ok()) {
    serving.BeginDrain();
    spdlog::info("stopping: {} generations have {} to end\trunning={}", serving.num_running(),
                 absl::FormatDuration(options.drain_timeout), serving.num_running());
    Drain(serving, options.drain_timeout);
    health = serving.health();
  }
  if (!health.ok()) ExitAfterFailure(&serving);
  spdlog::info("stopped\taborted={}", serving.num_running());
  serving.Stop();
  return 0;
}

}  // namespace cachalot
