// CudaDevice: memory, copies, graphs, and waiting for events without blocking in the driver.
#include "kernels/cuda/cuda_device.h"

#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/cuda/copy_kernels.h"

namespace cachalot {
namespace {

using Clock = std::chrono::steady_clock;

// A step's end is noticed at once when it is near, and costs no core when it is not.
constexpr auto kSpin = std::chrono::microseconds(50), kSleep = std::chrono::microseconds(20);

int64_t RowBytes(const Tensor& tensor) { return tensor.row_elements() * DTypeBytes(tensor.dtype); }
int64_t StrideBytes(const Tensor& tensor) { return tensor.row_stride * DTypeBytes(tensor.dtype); }

// By default a sleep takes 50 us longer than it should.
void SleepPrecisely() {
  thread_local const bool is_precise = prctl(PR_SET_TIMERSLACK, 1000) == 0;  // ns
  (void)is_precise;
  std::this_thread::sleep_for(kSleep);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaDevice>> CudaDevice::Make(int ordinal) {
  std::unique_ptr<CudaDevice> device(new CudaDevice(ordinal));
  if (absl::Status status = device->Start(); !status.ok()) return status;
  return device;
}

absl::Status CudaDevice::Start() {
  if (!Use()) return Fault();
  cudaStream_t stream = nullptr;
  if (!stream_.Check(cudaGetDeviceProperties(&properties_, ordinal_), "cudaGetDeviceProperties") ||
      !stream_.Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate") ||
      !stream_.Check(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "cudaStreamCreate") ||
      !stream_.Check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "cudaEventCreate") ||
      !stream_.Check(cudaEventCreateWithFlags(&ended_, cudaEventDisableTiming), "cudaEventCreate")) {
    return Fault();
  }
  stream_.set(stream, side_, forked_, ended_);
  for (cudaEvent_t& event : events_) {
    if (!stream_.Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate")) return Fault();
  }
  return absl::OkStatus();
}

CudaDevice::~CudaDevice() {
  Use();
  if (stream_.get() != nullptr) cudaStreamSynchronize(stream_.get());
  for (auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph.exec);
  for (cudaEvent_t event : events_) {
    if (event != nullptr) cudaEventDestroy(event);
  }
  if (forked_ != nullptr) cudaEventDestroy(forked_);
  if (ended_ != nullptr) cudaEventDestroy(ended_);
  if (side_ != nullptr) cudaStreamDestroy(side_);
  if (stream_.get() != nullptr) cudaStreamDestroy(stream_.get());
}

bool CudaDevice::Use() const {
  thread_local int current = -1;
  if (current == ordinal_) [[likely]]
    return true;
  if (!stream_.Check(cudaSetDevice(ordinal_), "cudaSetDevice")) return false;
  current = ordinal_;
  return true;
}

absl::Status CudaDevice::Fault() const {
  const std::string fault = stream_.fault();
  return fault.empty() ? absl::OkStatus() : absl::InternalError("the GPU failed: " + fault);
}

absl::StatusOr<Buffer> CudaDevice::Allocate(size_t bytes, Memory memory) {
  if (!Use()) return Fault();
  const size_t size = std::max<size_t>(bytes, 1);
  void* data = nullptr;
  const bool is_pinned = memory == Memory::kPinnedHost;
  const cudaError_t error = is_pinned ? cudaHostAlloc(&data, size, cudaHostAllocDefault) : cudaMalloc(&data, size);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // this one is not final
    if (is_pinned) return absl::ResourceExhaustedError(absl::StrFormat("%d MiB of pinned memory wanted", size >> 20));
    return absl::ResourceExhaustedError(
        absl::StrFormat("GPU memory: %d MiB wanted, %d MiB free", size >> 20, FreeMemory() >> 20));
  }
  if (!stream_.Check(error, is_pinned ? "cudaHostAlloc" : "cudaMalloc")) return Fault();
  if (is_pinned) return Buffer(data, bytes, [](void* p) { cudaFreeHost(p); });
  Buffer buffer(data, bytes, [](void* p) { cudaFree(p); });
  // NOTE: waited for, as other streams (WeightLoader's) may write to it next.
  if (!stream_.Check(cudaMemsetAsync(data, 0, size, stream_.get()), "cudaMemsetAsync") ||
      !stream_.Check(cudaStreamSynchronize(stream_.get()), "cudaMemsetAsync")) {
    return Fault();
  }
  return buffer;
}

size_t CudaDevice::FreeMemory() const {
  size_t free = 0, total = 0;
  if (!Use() || !stream_.Check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo")) return 0;
  return free;
}

void CudaDevice::Copy(void* dst, int64_t dst_row, const void* src, int64_t src_row, const Tensor& shape,
                      cudaMemcpyKind kind) {
  if (shape.num_bytes() == 0 || !Use()) return;
  const cudaStream_t stream = stream_.get();
  const int64_t row = RowBytes(shape);
  const bool is_run = shape.is_contiguous() || shape.dim(0) == 1;
  if (is_run && shape.num_bytes() <= kMaxKernelCopy) {
    LaunchCopy(stream, dst, src, shape.num_bytes());
    stream_.Launched("a copy");
  } else if (is_run) {
    stream_.Check(cudaMemcpyAsync(dst, src, shape.num_bytes(), kind, stream), "a copy");
  } else {
    stream_.Check(cudaMemcpy2DAsync(dst, dst_row, src, src_row, row, shape.dim(0), kind, stream), "a copy");
  }
}

void CudaDevice::Upload(const Tensor& dst, const void* src) {
  Copy(dst.data, StrideBytes(dst), src, RowBytes(dst), dst, cudaMemcpyHostToDevice);
}

void CudaDevice::Download(void* dst, const Tensor& src) {
  Copy(dst, RowBytes(src), src.data, StrideBytes(src), src, cudaMemcpyDeviceToHost);
}

void CudaDevice::Submit(const StepKey& key, std::function<void()> body) {
  if (!Use()) return;
  if (const auto it = graphs_.find(key); it != graphs_.end()) {
    stream_.Check(cudaGraphLaunch(it->second.exec, stream_.get()), "cudaGraphLaunch");
    return;
  }
  body();
}

// NOTE: eagerly first: kernels are loaded at their first launch, which a capture is no place for.
absl::Status CudaDevice::Prepare(const StepKey& key, std::function<void()> body) {
  if (graphs_.contains(key)) return absl::OkStatus();
  if (!Use()) return Fault();
  body();
  if (!stream_.Check(cudaStreamSynchronize(stream_.get()), "a step to be captured")) return Fault();
  if (absl::Status status = Fault(); !status.ok()) return status;
  absl::StatusOr<Graph> graph = Capture(body);
  if (!graph.ok()) return graph.status();
  graphs_[key] = *graph;
  return absl::OkStatus();
}

absl::StatusOr<CudaDevice::Graph> CudaDevice::Capture(const std::function<void()>& body) {
  if (!stream_.Check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal),
                     "cudaStreamBeginCapture")) {
    return Fault();
  }
  body();
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_.get(), &captured);
  if (absl::Status status = Fault(); !status.ok()) return status;  // of the body: tells more than that of the end
  if (!stream_.Check(ended, "cudaStreamEndCapture")) return Fault();

  Graph graph;
  size_t num_nodes = 0;
  bool is_ok = stream_.Check(cudaGraphGetNodes(captured, nullptr, &num_nodes), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(num_nodes);
  is_ok = is_ok && stream_.Check(cudaGraphGetNodes(captured, nodes.data(), &num_nodes), "cudaGraphGetNodes");
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    if (cudaGraphNodeGetType(node, &type) == cudaSuccess && type == cudaGraphNodeTypeKernel) ++graph.num_kernels;
  }
  const cudaError_t instantiated = is_ok ? cudaGraphInstantiate(&graph.exec, captured, 0) : cudaSuccess;
  cudaGraphDestroy(captured);
  if (instantiated == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError("GPU memory: no room for a graph: lower --max-sequences or --kv-cache-memory");
  }
  if (!is_ok || !stream_.Check(instantiated, "cudaGraphInstantiate")) return Fault();
  if (!stream_.Check(cudaGraphUpload(graph.exec, stream_.get()), "cudaGraphUpload")) {
    cudaGraphExecDestroy(graph.exec);
    return Fault();
  }
  return graph;
}

int CudaDevice::NumKernels(const StepKey& key) const {
  const auto it = graphs_.find(key);
  return it == graphs_.end() ? 0 : it->second.num_kernels;
}

Device::Event CudaDevice::Record() {
  Use();
  const Event event = ++recorded_;
  stream_.Check(cudaEventRecord(events_[event % kNumEvents], stream_.get()), "cudaEventRecord");
  return event;
}

// Whether the event is done, or never will be: then there is a fault.
bool CudaDevice::Poll(Event event) {
  if (event <= completed_) return true;
  const cudaError_t state = cudaEventQuery(events_[event % kNumEvents]);
  if (state == cudaErrorNotReady) {
    cudaGetLastError();  // NOTE: it is kept like an error, and the next launch would be blamed for it
    return false;
  }
  if (stream_.Check(state, "a step")) completed_ = event;
  return true;
}

bool CudaDevice::IsComplete(Event event) {
  Use();
  return Poll(event);
}

absl::Status CudaDevice::Wait(Event event, absl::Duration timeout) {
  if (!Use()) return Fault();
  const Clock::time_point begin = Clock::now();
  const auto limit = absl::ToChronoNanoseconds(std::min(timeout, absl::Hours(24)));
  while (!Poll(event)) {
    const auto waited = Clock::now() - begin;
    if (waited >= limit) {
      return absl::DeadlineExceededError(absl::StrFormat("event %d is not complete, %d is", event, completed_));
    }
    if (waited > kSpin) SleepPrecisely();
  }
  return Fault();
}

int CudaDevice::BucketOf(int n) {
  if (n <= 2) return n;
  if (n <= 4) return 4;
  const int step = n <= 256 ? 8 : 64;
  return (n + step - 1) / step * step;
}

}  // namespace cachalot
