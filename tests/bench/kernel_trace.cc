// CUPTI's records, gathered and summed.
#include "tests/bench/kernel_trace.h"

#include <cupti.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace cachalot::bench {
namespace {

// NOTE: some thousand steps of the demo. CUPTI takes another buffer in the thread that launches, which stalls it.
constexpr size_t kBufferBytes = size_t{192} << 20;
constexpr size_t kDeviceBufferBytes = size_t{32} << 20;  // of CUPTI's own, for a million kernels

// NOTE: names are CUPTI's own and stay; they are made readable when nothing is measured any more.
struct RawSpan {
  const char* name;
  uint64_t start_ns, end_ns;
};
struct Recorder {
  std::mutex mutex;
  std::vector<RawSpan> spans;
};

// NOTE: CUPTI's callbacks take no context.
Recorder& TheRecorder() {
  static auto* recorder = new Recorder;
  return *recorder;
}

std::string ShortName(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> demangled(abi::__cxa_demangle(mangled, nullptr, nullptr, &status),
                                                         std::free);
  std::string name = status == 0 ? demangled.get() : mangled;
  for (const char* prefix : {"void ", "cachalot::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(prefix)) != std::string::npos;) name.erase(at, std::string(prefix).size());
  }
  return name.substr(0, name.find('('));
}

void Add(const CUpti_Activity* record, std::vector<RawSpan>* spans) {
  if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
    spans->push_back({kernel->name, kernel->start, kernel->end});
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
    const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy5*>(record);
    spans->push_back({"memcpy", copy->start, copy->end});
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
    const auto* set = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
    spans->push_back({"memset", set->start, set->end});
  }
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  std::memset(*buffer, 0, kBufferBytes);  // its pages are there before they are needed
  *size = kBufferBytes;
  *max_records = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  Recorder& recorder = TheRecorder();
  const std::lock_guard lock(recorder.mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) Add(record, &recorder.spans);
  std::free(buffer);
}

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                                         CUPTI_ACTIVITY_KIND_MEMSET};

}  // namespace

bool StartTrace() {
  size_t bytes = kDeviceBufferBytes, size = sizeof(bytes);
  (void)cuptiActivitySetAttribute(CUPTI_ACTIVITY_ATTR_DEVICE_BUFFER_SIZE, &size, &bytes);  // else it has its usual ones
  if (cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer) != CUPTI_SUCCESS) return false;
  for (CUpti_ActivityKind kind : kKinds) {
    if (cuptiActivityEnable(kind) != CUPTI_SUCCESS) return false;
  }
  return true;
}

std::vector<KernelSpan> StopTrace() {
  cuptiActivityFlushAll(1);
  for (CUpti_ActivityKind kind : kKinds) cuptiActivityDisable(kind);
  Recorder& recorder = TheRecorder();
  const std::lock_guard lock(recorder.mutex);
  std::map<const char*, std::string> names;
  std::vector<KernelSpan> spans;
  for (const RawSpan& span : recorder.spans) {
    std::string& name = names[span.name];
    if (name.empty()) name = ShortName(span.name);
    spans.push_back({name, span.start_ns, span.end_ns});
  }
  recorder.spans.clear();
  std::sort(spans.begin(), spans.end(), [](const auto& a, const auto& b) { return a.start_ns < b.start_ns; });
  return spans;
}

std::string Summary(const std::vector<KernelSpan>& spans, int num_steps) {
  if (spans.empty()) return "nothing was recorded\n";
  struct Total {
    int64_t count = 0;
    uint64_t ns = 0;
  };
  std::map<std::string, Total> totals;
  uint64_t end = spans[0].start_ns, idle = 0, last = 0;
  for (const KernelSpan& span : spans) {
    Total& total = totals[span.name];
    ++total.count;
    total.ns += span.end_ns - span.start_ns;
    if (span.start_ns > end) idle += span.start_ns - end;
    end = std::max(end, span.end_ns);
    last = end;
  }
  const double whole = static_cast<double>(last - spans[0].start_ns);
  std::vector<std::pair<std::string, Total>> sorted(totals.begin(), totals.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second.ns > b.second.ns; });
  std::string text = "| kernel | launches a step | us each | us a step | share |\n|---|---|---|---|---|\n";
  char line[256];
  for (const auto& [name, total] : sorted) {
    std::snprintf(line, sizeof(line), "| %s | %.1f | %.2f | %.1f | %.1f %% |\n", name.c_str(),
                  static_cast<double>(total.count) / num_steps,
                  static_cast<double>(total.ns) / static_cast<double>(total.count) / 1e3,
                  static_cast<double>(total.ns) / num_steps / 1e3, 100 * static_cast<double>(total.ns) / whole);
    text += line;
  }
  std::snprintf(line, sizeof(line), "| nothing | | | %.1f | %.1f %% |\n", static_cast<double>(idle) / num_steps / 1e3,
                100 * static_cast<double>(idle) / whole);
  return text + line;
}

}  // namespace cachalot::bench

// What the driver calls when the program that CUDA_INJECTION64_PATH was set for makes its context.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  if (!cachalot::bench::StartTrace()) return 0;
  std::atexit([] {
    const auto spans = cachalot::bench::StopTrace();
    const char* path = std::getenv("CACHALOT_TRACE");
    std::FILE* file = path != nullptr ? std::fopen(path, "w") : nullptr;
    if (file == nullptr) {
      std::fprintf(stderr, "%s", cachalot::bench::Summary(spans, 1).c_str());
      return;
    }
    for (const auto& span : spans) {
      std::fprintf(file, "%llu %llu %s\n", static_cast<unsigned long long>(span.start_ns),
                   static_cast<unsigned long long>(span.end_ns), span.name.c_str());
    }
    std::fclose(file);
  });
  return 1;
}
