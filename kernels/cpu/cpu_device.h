// CpuDevice: one thread that executes what is queued, in order; memory that is touched when it is used.
#ifndef CACHALOT_KERNELS_CPU_CPU_DEVICE_H_
#define CACHALOT_KERNELS_CPU_CPU_DEVICE_H_

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "kernels/device.h"

namespace cachalot {

// The host plans step n+1 while the device thread runs step n, as with a GPU. Bodies run each time they are submitted:
// there is nothing to replay. Destruction runs what is still queued; buffers must not outlive the device.
class CpuDevice : public Device {
 public:
  CpuDevice();
  ~CpuDevice() override;

  absl::StatusOr<Buffer> Allocate(size_t bytes, Memory memory) override;
  void Upload(const Tensor& dst, const void* src) override;
  void Download(void* dst, const Tensor& src) override;
  void Submit(const StepKey& key, std::function<void()> body) override;
  Event Record() override;
  bool IsComplete(Event event) override;
  absl::Status Wait(Event event, absl::Duration timeout) override;
  // A fault: what is queued is dropped, and every Wait says so, once what runs has ended: then nothing uses what was
  // named to the device. The first stays. Any thread.
  void Fail(const absl::Status& fault);
  int Bucket(int n) const override { return n; }
  size_t FreeMemory() const override;

 private:
  void Enqueue(std::function<void()> work);
  void Loop();

  const size_t available_at_start_;
  std::atomic<size_t> allocated_{0};
  Event recorded_ = 0;
  // NOTE: the standard library's, which the thread sanitizer sees through, not Abseil's, which it does not.
  std::mutex mutex_;  // guards all below but the thread
  std::condition_variable queue_filled_, event_completed_;
  std::deque<std::function<void()>> queue_;
  Event completed_ = 0;
  absl::Status fault_;
  bool is_running_ = false;  // something that was queued
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_CPU_DEVICE_H_
