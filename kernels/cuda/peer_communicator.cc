// CudaPeerCommunicator: inboxes that all ranks know of, and launches.
#include "kernels/cuda/peer_communicator.h"

#include <unistd.h>

#include <array>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/local_communicator.h"

namespace cachalot {
namespace {

// What ranks tell each other at start.
struct Introduction {
  int64_t process;
  int32_t ordinal;
  PeerInbox inbox;
};

constexpr int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Of the members of a PeerInbox, in their order.
std::array<int64_t, 6> InboxBytes(const OpLimits& limits) {
  const int64_t rows = int64_t{limits.max_tokens} * limits.num_ranks, choices = rows * limits.num_experts_per_tok;
  const int64_t D = limits.hidden_size;
  return {rows * D * 2,  // NOTE: of bf16, which is more than fp8 takes
          rows * ((D + kQuantGroup - 1) / kQuantGroup) * 4,
          choices * 4,
          choices * 4,
          rows * D * 2,
          int64_t{2} * limits.num_ranks * 8};
}

int64_t Total(const std::array<int64_t, 6>& bytes) {
  int64_t total = 0;
  for (int64_t part : bytes) total += Aligned(part);
  return total;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaPeerCommunicator>> CudaPeerCommunicator::Make(const BackendOptions& options,
                                                                                 CudaDevice* device) {
  CHECK(options.mesh->num_ranks() <= kMaxPeers, "{} ranks", options.mesh->num_ranks());
  std::unique_ptr<CudaPeerCommunicator> made(new CudaPeerCommunicator(options.mesh, device));
  absl::Status status = made->Start(options.limits);
  if (status.ok()) status = made->Meet();
  if (!status.ok()) return status;
  return made;
}

int64_t CudaPeerCommunicator::DeviceBytes(const OpLimits& limits) {
  if (limits.num_ranks == 1) return 0;
  return Total(InboxBytes(limits)) + int64_t{limits.max_tokens} * limits.num_ranks * limits.num_experts_per_tok * 4;
}

CudaPeerCommunicator::~CudaPeerCommunicator() {
  mesh_.OnAwaited(nullptr);
  stream_.WatchPeers(nullptr);
}

absl::Status CudaPeerCommunicator::Start(const OpLimits& limits) {
  if (limits.hidden_size % 16 != 0) {
    return absl::UnimplementedError(
        absl::StrFormat("ranks on GPUs: found a hidden size of %d, expected a multiple of 16", limits.hidden_size));
  }
  max_tokens_ = limits.max_tokens;
  const int64_t choices = max_tokens_ * num_ranks() * limits.num_experts_per_tok;
  const auto parts_bytes = InboxBytes(limits);
  absl::Status status;
  const auto allocate = [&](Buffer* buffer, int64_t size, Device::Memory memory) {
    auto made = device_.Allocate(size, memory);
    status.Update(made.status());
    if (made.ok()) *buffer = *std::move(made);
  };
  allocate(&inbox_memory_, Total(parts_bytes), Device::Memory::kDevice);
  allocate(&inboxes_, num_ranks() * sizeof(PeerInbox), Device::Memory::kDevice);
  allocate(&row_of_, choices * 4, Device::Memory::kDevice);
  allocate(&counters_, 16, Device::Memory::kDevice);
  allocate(&abort_, 4, Device::Memory::kPinnedHost);
  allocate(&fault_, 4, Device::Memory::kPinnedHost);
  if (!status.ok()) return status;
  char* next = static_cast<char*>(inbox_memory_.data());
  std::array<char*, 6> parts;
  for (size_t i = 0; i < parts.size(); ++i) {
    parts[i] = next;
    next += Aligned(parts_bytes[i]);
  }
  inbox_ = {parts[0],
            parts[1],
            reinterpret_cast<int32_t*>(parts[2]),
            reinterpret_cast<float*>(parts[3]),
            parts[4],
            reinterpret_cast<uint64_t*>(parts[5])};
  auto* abort = static_cast<volatile int32_t*>(abort_.data());
  auto* fault = static_cast<volatile int32_t*>(fault_.data());
  *abort = 0;
  *fault = 0;
  peers_ = {static_cast<const PeerInbox*>(inboxes_.data()),
            rank(),
            num_ranks(),
            static_cast<uint32_t*>(counters_.data()),
            reinterpret_cast<uint64_t*>(static_cast<char*>(counters_.data()) + 8),
            abort,
            fault};
  stream_.WatchPeers(fault);
  mesh_.OnAwaited([abort](uint64_t num_begun) {
    if (num_begun == 0) *abort = 1;
  });
  return absl::OkStatus();
}

absl::Status CudaPeerCommunicator::Meet() {
  const Introduction mine = {getpid(), device_.ordinal(), inbox_};
  const auto all = ExchangeAll(mesh_, mine, "introduces itself");
  if (!all.ok()) return all.status();
  auto staging = device_.Allocate(num_ranks() * sizeof(PeerInbox), Device::Memory::kPinnedHost);
  if (!staging.ok()) return staging.status();
  for (int r = 0; r < num_ranks(); ++r) {
    const Introduction& other = (*all)[r];
    if (other.process != mine.process) {
      return absl::UnimplementedError(absl::StrFormat("rank %d is in another process: GPUs of one process only", r));
    }
    static_cast<PeerInbox*>(staging->data())[r] = other.inbox;
    if (other.ordinal == mine.ordinal) continue;
    int can_reach = 0;
    cudaError_t error = cudaDeviceCanAccessPeer(&can_reach, mine.ordinal, other.ordinal);
    if (error == cudaSuccess && can_reach != 0) error = cudaDeviceEnablePeerAccess(other.ordinal, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess;
    cudaGetLastError();
    if (error != cudaSuccess || can_reach == 0) {
      return absl::UnimplementedError(absl::StrFormat("GPU %d does not reach the memory of GPU %d%s%s", mine.ordinal,
                                                      other.ordinal, error != cudaSuccess ? ": " : "",
                                                      error != cudaSuccess ? cudaGetErrorString(error) : ""));
    }
  }
  const Tensor inboxes(inboxes_.data(), DType::kU8, {static_cast<int64_t>(num_ranks() * sizeof(PeerInbox))});
  device_.Upload(inboxes, staging->data());
  return device_.Wait(device_.Record(), absl::Minutes(1));
}

void CudaPeerCommunicator::Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                                    const Tensor& topk_weights) {
  CheckDispatch(rows, x, topk_slots, topk_weights);
  num_tokens_ = x.rows();
  topk_slots_ = topk_slots;
  const int64_t num_choices = topk_slots.dim(1), cols = x.cols(), num_slots = rows.offsets.dim(0) - 1;
  slots_per_rank_ = static_cast<int32_t>(num_slots);
  CHECK(num_tokens_ > 0 && num_tokens_ <= max_tokens_, "{} tokens", num_tokens_);
  const int64_t element = DTypeBytes(x.values.dtype);
  const Tensor values(inbox_.values, x.values.dtype, {num_rows(), cols});
  const Tensor scales(inbox_.scales, DType::kF32, {num_rows(), x.scales.empty() ? 1 : x.scales.dim(1)});
  const bool has_scales = !x.scales.empty();
  CHECK(cols * element % 16 == 0 && x.values.row_stride * element % 16 == 0, "rows of {} bytes", cols * element);
  LaunchSendRows(stream_.get(),
                 {.peers = peers_,
                  .values = static_cast<const char*>(x.values.data),
                  .scales = has_scales ? static_cast<const char*>(x.scales.data) : nullptr,
                  .values_stride = x.values.row_stride * element,
                  .scales_stride = has_scales ? x.scales.row_stride * 4 : 0,
                  .value_bytes = static_cast<int32_t>(cols * element),
                  .scale_bytes = has_scales ? static_cast<int32_t>(x.scales.dim(1) * 4) : 0,
                  .topk_slots = topk_slots.as<int32_t>(),
                  .topk_slots_stride = topk_slots.row_stride,
                  .topk_weights = topk_weights.as<float>(),
                  .topk_weights_stride = topk_weights.row_stride,
                  .num_choices = static_cast<int32_t>(num_choices),
                  .slots_per_rank = slots_per_rank_},
                 num_tokens_);
  if (!stream_.Launched("Dispatch, to other ranks")) return;
  GroupAndScatter(&stream_, rows, {values, has_scales ? scales : Tensor()},
                  Tensor(inbox_.slots, DType::kI32, {num_rows(), num_choices}), rank() * slots_per_rank_,
                  static_cast<int32_t*>(row_of_.data()));
}

void CudaPeerCommunicator::Combine(const Tensor& out, const Tensor& y, const Tensor& shared) {
  CheckCombine(out, y, shared, num_tokens_);
  const int64_t cols = out.dim(1);
  const MatrixRef sums = RefOf(out), results = RefOf(y), plus = RefOf(shared);
  CHECK(y.dtype == DType::kBF16 && (shared.empty() || shared.dtype == DType::kBF16) && cols % 8 == 0 &&
            y.row_stride % 8 == 0 && out.row_stride % 8 == 0 && (shared.empty() || shared.row_stride % 8 == 0),
        "{} columns of {}", cols, DTypeName(y.dtype));
  const auto num_choices = static_cast<int32_t>(topk_slots_.dim(1));
  LaunchSendSums(stream_.get(),
                 {.peers = peers_,
                  .y = results,
                  .row_of = static_cast<const int32_t*>(row_of_.data()),
                  .num_choices = num_choices,
                  .cols = static_cast<int32_t>(cols)},
                 num_tokens_);
  if (!stream_.Launched("Combine, to other ranks")) return;
  LaunchAddSums(stream_.get(),
                {.peers = peers_,
                 .out = sums,
                 .shared = plus,
                 .topk_slots = topk_slots_.as<int32_t>(),
                 .topk_slots_stride = topk_slots_.row_stride,
                 .num_choices = num_choices,
                 .slots_per_rank = slots_per_rank_,
                 .cols = static_cast<int32_t>(cols)},
                num_tokens_);
  stream_.Launched("Combine");
}

}  // namespace cachalot
