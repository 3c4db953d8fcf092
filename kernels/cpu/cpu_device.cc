// CpuDevice: the queue, and memory.
#include "kernels/cpu/cpu_device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/cpu/available_memory.h"

namespace cachalot {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kPageBytes = 4096;

// Copies between a row-strided tensor and packed host memory.
void CopyRows(char* dst, size_t dst_stride, const char* src, size_t src_stride, size_t row_bytes, int64_t rows) {
  if (rows == 0 || row_bytes == 0) return;
  if (dst_stride == row_bytes && src_stride == row_bytes) {
    std::memcpy(dst, src, row_bytes * rows);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, row_bytes);
}

}  // namespace

CpuDevice::CpuDevice() : available_at_start_(AvailableMemory()), thread_([this] { Loop(); }) {}

CpuDevice::~CpuDevice() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  queue_filled_.notify_one();
  thread_.join();
}

absl::StatusOr<Buffer> CpuDevice::Allocate(size_t bytes, Memory) {
  // Whole pages, so that neighbours share none; large ones start at a huge page.
  const size_t size = (std::max<size_t>(bytes, 1) + kPageBytes - 1) / kPageBytes * kPageBytes;
  if (size > FreeMemory()) {
    return absl::ResourceExhaustedError(absl::StrFormat("%d MiB wanted, %d MiB free", size >> 20, FreeMemory() >> 20));
  }
  const bool huge = size >= 2 * kHugePageBytes;
  const size_t mapped = huge ? size + kHugePageBytes : size;
  void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return absl::ResourceExhaustedError(absl::StrFormat("mmap of %d bytes failed", mapped));
  void* data = base;
  if (huge) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(base);
    data = reinterpret_cast<void*>((address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes);
    madvise(data, size, MADV_HUGEPAGE);
  }
  allocated_ += size;
  return Buffer(data, bytes, [this, base, mapped, size](void*) {
    munmap(base, mapped);
    allocated_ -= size;
  });
}

// NOTE: memory that was allocated and not touched yet is still "available" to the kernel, so ours is counted too.
size_t CpuDevice::FreeMemory() const {
  return std::min(AvailableMemory(), available_at_start_ - std::min(allocated_.load(), available_at_start_));
}

void CpuDevice::Upload(const Tensor& dst, const void* src) {
  Enqueue([dst, src] {
    const size_t element = DTypeBytes(dst.dtype), row = dst.row_elements() * element;
    CopyRows(static_cast<char*>(dst.data), dst.row_stride * element, static_cast<const char*>(src), row, row,
             dst.dim(0));
  });
}

void CpuDevice::Download(void* dst, const Tensor& src) {
  Enqueue([dst, src] {
    const size_t element = DTypeBytes(src.dtype), row = src.row_elements() * element;
    CopyRows(static_cast<char*>(dst), row, static_cast<const char*>(src.data), src.row_stride * element, row,
             src.dim(0));
  });
}

void CpuDevice::Submit(const StepKey&, std::function<void()> body) { Enqueue(std::move(body)); }

Device::Event CpuDevice::Record() {
  const Event event = ++recorded_;
  Enqueue([this, event] {
    {
      std::lock_guard lock(mutex_);
      completed_ = event;
    }
    event_completed_.notify_all();
  });
  return event;
}

bool CpuDevice::IsComplete(Event event) {
  std::lock_guard lock(mutex_);
  return completed_ >= event;
}

absl::Status CpuDevice::Wait(Event event, absl::Duration timeout) {
  std::unique_lock lock(mutex_);
  const auto is_complete = [this, event] { return fault_.ok() ? completed_ >= event : !is_running_; };
  const auto limit = absl::ToChronoNanoseconds(std::min(timeout, absl::Hours(24)));
  if (event_completed_.wait_for(lock, limit, is_complete)) return fault_;
  return absl::DeadlineExceededError(absl::StrFormat("event %d is not complete, %d is", event, completed_));
}

void CpuDevice::Fail(const absl::Status& fault) {
  CHECK(!fault.ok());
  {
    std::lock_guard lock(mutex_);
    if (fault_.ok()) fault_ = absl::InternalError(fault.message());
  }
  event_completed_.notify_all();
}

void CpuDevice::Enqueue(std::function<void()> work) {
  if (std::this_thread::get_id() == thread_.get_id()) return work();  // a body's upload or download
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
  }
  queue_filled_.notify_one();
}

void CpuDevice::Loop() {
  while (true) {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      queue_filled_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
      if (!fault_.ok()) continue;
      is_running_ = true;
    }
    work();
    std::lock_guard lock(mutex_);
    is_running_ = false;
    if (!fault_.ok()) event_completed_.notify_all();
  }
}

}  // namespace cachalot
