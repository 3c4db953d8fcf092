// WeightLoader: threads that each fill pinned chunks from the mapping and copy them on streams of their own.
#include "kernels/cuda/weight_loader.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // NOTE: Linux 5.14; older ones refuse it, and pages come one fault at a time
#endif

namespace cachalot {
namespace {

constexpr int64_t kChunkBytes = int64_t{8} << 20;
constexpr int kMaxThreads = 16, kChunksPerThread = 2;  // 256 MiB of pinned memory
constexpr uintptr_t kPageBytes = 4096;

// Reads what the range is mapped from, in one call.
void Populate(const uint8_t* data, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPageBytes * kPageBytes;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_READ);
}

int64_t Bytes(const WeightCopy& copy) { return copy.rows * copy.row_bytes; }

// Takes up to `room` bytes off the front of `copy`: whole rows, or a part of the one row that there is.
WeightCopy TakeFront(WeightCopy* copy, int64_t room) {
  WeightCopy front = *copy;
  auto* dst = static_cast<uint8_t*>(copy->dst);
  auto* src = static_cast<const uint8_t*>(copy->src);
  if (copy->rows == 1) {
    front.row_bytes = std::min(copy->row_bytes, room);
    copy->row_bytes -= front.row_bytes;
    copy->dst = dst + front.row_bytes;
    if (copy->row_bytes == 0) copy->rows = 0;
  } else {
    front.rows = std::min(copy->rows, room / copy->row_bytes);
    copy->rows -= front.rows;
    copy->dst = dst + front.rows * copy->dst_stride;
  }
  copy->src = src + Bytes(front);
  return front;
}

// Two-dimensional only where it must be: a row longer than a chunk is copied alone.
void Split(WeightCopy copy, std::deque<WeightCopy>* pieces) {
  if (copy.dst_stride == copy.row_bytes) copy = {copy.dst, copy.src, 1, Bytes(copy), Bytes(copy)};
  while (copy.rows > 1 && copy.row_bytes > kChunkBytes) {
    WeightCopy row = copy;
    row.rows = 1;
    Split(row, pieces);
    copy.dst = static_cast<uint8_t*>(copy.dst) + copy.dst_stride;
    copy.src = static_cast<const uint8_t*>(copy.src) + copy.row_bytes;
    --copy.rows;
  }
  while (copy.rows > 0 && Bytes(copy) > 0) pieces->push_back(TakeFront(&copy, kChunkBytes));
}

}  // namespace

class WeightLoader::Impl {
 public:
  explicit Impl(CudaStream* stream) : stream_(*stream) {}
  ~Impl() {
    Discard();
    if (!threads_.empty()) Finish().IgnoreError();
  }

  int64_t bytes_copied() const { return copied_; }

  void Discard() {
    std::lock_guard lock(mutex_);
    queue_.clear();
  }

  void Copy(const WeightCopy& copy) {
    {
      std::lock_guard lock(mutex_);
      Split(copy, &queue_);
      bytes_ += Bytes(copy);
    }
    queue_filled_.notify_one();
    // A thread for every two chunks' worth: pinning memory takes its time, and small models need little.
    const int most = std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
    while (static_cast<int>(threads_.size()) < most &&
           bytes_ > 2 * kChunkBytes * static_cast<int64_t>(threads_.size())) {
      if (!StartThread()) return;
    }
  }

  absl::Status Finish() {
    {
      std::lock_guard lock(mutex_);
      is_finishing_ = true;
    }
    queue_filled_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    queue_.clear();
    bytes_ = 0;
    is_finishing_ = false;
    const std::string fault = stream_.fault();
    return fault.empty() ? absl::OkStatus() : absl::InternalError("the GPU failed: " + fault);
  }

 private:
  // Pinned memory, and the copies that were queued from it last.
  struct Chunk {
    uint8_t* data = nullptr;
    cudaEvent_t copied = nullptr;
  };

  bool StartThread() {
    int ordinal = 0;
    if (!stream_.Check(cudaGetDevice(&ordinal), "cudaGetDevice")) return false;
    threads_.emplace_back([this, ordinal] { Run(ordinal); });
    return true;
  }

  // A thread's life. After an error it takes what is queued all the same, and copies nothing.
  void Run(int ordinal) {
    cudaStream_t stream = nullptr;
    std::array<Chunk, kChunksPerThread> chunks;
    bool is_ok = Ok(cudaSetDevice(ordinal)) && Ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    std::vector<WeightCopy> pieces;
    for (int next = 0; Take(&pieces); next = (next + 1) % kChunksPerThread) {
      is_ok = is_ok && Prepare(&chunks[next]) && CopyPieces(pieces, chunks[next], stream);
    }
    if (stream != nullptr) Ok(cudaStreamSynchronize(stream));
    for (Chunk& chunk : chunks) {
      if (chunk.copied != nullptr) cudaEventDestroy(chunk.copied);
      if (chunk.data != nullptr) cudaFreeHost(chunk.data);
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
  }

  // Pins the chunk's memory where it is used for the first time.
  bool Prepare(Chunk* chunk) {
    if (chunk->data != nullptr) return true;
    void* data = nullptr;
    if (!Ok(cudaHostAlloc(&data, kChunkBytes, cudaHostAllocDefault))) return false;
    chunk->data = static_cast<uint8_t*>(data);
    return Ok(cudaEventCreateWithFlags(&chunk->copied, cudaEventDisableTiming | cudaEventBlockingSync));
  }

  // Waits for pieces that fill a chunk, or nearly; false when there are no more to come.
  bool Take(std::vector<WeightCopy>* pieces) {
    pieces->clear();
    std::unique_lock lock(mutex_);
    queue_filled_.wait(lock, [this] { return is_finishing_ || !queue_.empty(); });
    for (int64_t bytes = 0; !queue_.empty() && bytes + Bytes(queue_.front()) <= kChunkBytes;) {
      bytes += Bytes(queue_.front());
      pieces->push_back(queue_.front());
      queue_.pop_front();
    }
    return !pieces->empty();
  }

  bool CopyPieces(const std::vector<WeightCopy>& pieces, const Chunk& chunk, cudaStream_t stream) {
    if (!Ok(cudaEventSynchronize(chunk.copied))) return false;
    uint8_t* staged = chunk.data;
    for (const WeightCopy& piece : pieces) {
      const int64_t bytes = Bytes(piece);
      Populate(static_cast<const uint8_t*>(piece.src), bytes);
      std::memcpy(staged, piece.src, bytes);
      const cudaError_t error = piece.rows == 1
                                    ? cudaMemcpyAsync(piece.dst, staged, bytes, cudaMemcpyHostToDevice, stream)
                                    : cudaMemcpy2DAsync(piece.dst, piece.dst_stride, staged, piece.row_bytes,
                                                        piece.row_bytes, piece.rows, cudaMemcpyHostToDevice, stream);
      if (!Ok(error)) return false;
      staged += bytes;
      copied_ += bytes;
    }
    return Ok(cudaEventRecord(chunk.copied, stream));
  }

  bool Ok(cudaError_t error) { return stream_.Check(error, "copying weights to the GPU"); }

  CudaStream& stream_;
  std::atomic<int64_t> copied_{0};
  std::vector<std::thread> threads_;
  int64_t bytes_ = 0;  // queued since the start
  std::mutex mutex_;   // guards what follows
  std::condition_variable queue_filled_;
  std::deque<WeightCopy> queue_;
  bool is_finishing_ = false;
};

WeightLoader::WeightLoader(CudaStream* stream) : impl_(std::make_unique<Impl>(stream)) {}
WeightLoader::~WeightLoader() = default;
void WeightLoader::Copy(const WeightCopy& copy) { impl_->Copy(copy); }
void WeightLoader::Discard() { impl_->Discard(); }
int64_t WeightLoader::bytes_copied() const { return impl_->bytes_copied(); }
absl::Status WeightLoader::Finish() { return impl_->Finish(); }

}  // namespace cachalot
