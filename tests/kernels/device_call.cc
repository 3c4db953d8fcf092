// Moving a verb's tensors to a device and back.
#include "tests/kernels/device_call.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace cachalot::testing {
namespace {

constexpr size_t kAlignment = 256;
constexpr uint8_t kGap = 0xa5;  // between regions, where nobody may write
constexpr absl::Duration kTimeout = absl::Seconds(120);

// From the first to the last element, with what lies between rows.
size_t SpanBytes(const Tensor& tensor) {
  if (tensor.num_elements() == 0) return 0;
  const int64_t elements = (tensor.dim(0) - 1) * tensor.row_stride + tensor.row_elements();
  return static_cast<size_t>(elements * DTypeBytes(tensor.dtype));
}

}  // namespace

DeviceCall& DeviceCall::Add(const Tensor& tensor, bool is_out) {
  if (tensor.empty()) return *this;
  uint8_t* begin = static_cast<uint8_t*>(tensor.data);
  // NOTE: a tensor without elements has an address too.
  regions_.push_back({begin, begin + std::max<size_t>(SpanBytes(tensor), 1), is_out && SpanBytes(tensor) > 0, 0});
  return *this;
}

DeviceCall& DeviceCall::Add(const StepInput& input, bool is_out) {
  Add(input.seq_slot, is_out).Add(input.seq_start, is_out).Add(input.query_start, is_out);
  Add(input.seq_params, is_out).Add(input.tokens, is_out);
  return Add(input.row_token, is_out).Add(input.row_seq, is_out).Add(input.row_target, is_out);
}

DeviceCall& DeviceCall::Add(const SlotState& state, bool is_out) {
  Add(state.block_table, is_out).Add(state.length, is_out).Add(state.last_token, is_out).Add(state.drafts, is_out);
  return Add(state.params, is_out).Add(state.counts, is_out).Add(state.token_biases, is_out);
}

DeviceCall& DeviceCall::Out(const SampleOutput& out) {
  return Out(out.tokens).Out(out.logprobs).Out(out.top_tokens).Out(out.top_logprobs).Out(out.num_accepted);
}

size_t DeviceCall::Layout() {
  std::sort(regions_.begin(), regions_.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  std::vector<Region> merged;
  for (const Region& region : regions_) {
    if (merged.empty() || region.begin >= merged.back().end) {
      merged.push_back(region);
    } else {
      merged.back().end = std::max(merged.back().end, region.end);
      merged.back().is_out |= region.is_out;
    }
  }
  size_t end = kAlignment;
  for (Region& region : merged) {
    region.offset = end + reinterpret_cast<uintptr_t>(region.begin) % kAlignment;
    end = region.offset + static_cast<size_t>(region.end - region.begin);
    end = (end + 2 * kAlignment - 1) / kAlignment * kAlignment;  // a gap of its own after each
  }
  regions_ = std::move(merged);
  return end;
}

Tensor DeviceCall::operator()(const Tensor& host) const {
  Tensor tensor = host;
  if (host.empty()) return tensor;
  const uint8_t* data = static_cast<const uint8_t*>(host.data);
  for (const Region& region : regions_) {
    if (data < region.begin || data >= region.end) continue;
    tensor.data = device_base_ + region.offset + (data - region.begin);
    return tensor;
  }
  ADD_FAILURE() << "a tensor that the call does not have: " << host.ToString();
  return tensor;
}

StepRows DeviceCall::operator()(const StepRows& rows) const {
  return {(*this)(rows.tokens), (*this)(rows.positions), (*this)(rows.slots)};
}

StepInput DeviceCall::operator()(const StepInput& input) const {
  return {(*this)(input.seq_slot),   (*this)(input.seq_start),  (*this)(input.query_start),
          (*this)(input.seq_params), (*this)(input.tokens),     (*this)(input.row_token),
          (*this)(input.row_seq),    (*this)(input.row_target), input.long_chunks};
}

SlotState DeviceCall::operator()(const SlotState& state) const {
  return {(*this)(state.block_table), (*this)(state.length), (*this)(state.last_token),  (*this)(state.drafts),
          (*this)(state.params),      (*this)(state.counts), (*this)(state.token_biases)};
}

SampleOutput DeviceCall::operator()(const SampleOutput& out) const {
  return {(*this)(out.tokens), (*this)(out.logprobs), (*this)(out.top_tokens), (*this)(out.top_logprobs),
          (*this)(out.num_accepted)};
}

void DeviceMemory::Reserve(size_t bytes) {
  if (bytes <= staging_.bytes()) return;
  const size_t size = bytes + bytes / 2;
  for (auto [buffer, kind] :
       {std::pair{&device_memory_, Device::Memory::kDevice}, std::pair{&staging_, Device::Memory::kPinnedHost}}) {
    { const Buffer old = std::move(*buffer); }  // NOTE: nothing is queued between calls
    absl::StatusOr<Buffer> made = device_.Allocate(size, kind);
    ASSERT_TRUE(made.ok()) << made.status();
    *buffer = *std::move(made);
  }
}

void DeviceMemory::Load(const DeviceCall& call, size_t bytes) {
  uint8_t* staging = static_cast<uint8_t*>(staging_.data());
  size_t end = 0;
  for (const DeviceCall::Region& region : call.regions_) {
    std::memset(staging + end, kGap, region.offset - end);
    std::memcpy(staging + region.offset, region.begin, region.end - region.begin);
    end = region.offset + static_cast<size_t>(region.end - region.begin);
  }
  std::memset(staging + end, kGap, bytes - end);
}

void DeviceMemory::Store(const DeviceCall& call, size_t bytes) const {
  const uint8_t* staging = static_cast<const uint8_t*>(staging_.data());
  const auto expect_gap = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      if (staging[i] == kGap) continue;
      ADD_FAILURE() << "written " << i - begin << " bytes past a tensor's end";
      return;
    }
  };
  size_t end = 0;
  for (const DeviceCall::Region& region : call.regions_) {
    const size_t size = static_cast<size_t>(region.end - region.begin);
    expect_gap(end, region.offset);
    end = region.offset + size;
    if (region.is_out) {
      std::memcpy(region.begin, staging + region.offset, size);
    } else {
      EXPECT_EQ(std::memcmp(region.begin, staging + region.offset, size), 0) << "an input was written";
    }
  }
  expect_gap(end, bytes);
}

void DeviceMemory::Run(DeviceCall* call, const std::function<void()>& body) {
  // Every call is a shape of its own: none may be replayed for another.
  static std::atomic<int32_t> next_kind = 1000;
  if (::testing::Test::HasFatalFailure()) return;  // a device that faulted stays so
  const size_t bytes = call->Layout();
  Reserve(bytes);
  if (::testing::Test::HasFatalFailure()) return;
  Load(*call, bytes);
  call->device_base_ = static_cast<uint8_t*>(device_memory_.data());
  const Tensor all(device_memory_.data(), DType::kU8, {1, static_cast<int64_t>(bytes)});
  device_.Upload(all, staging_.data());
  device_.Submit(StepKey{0, 0, 0, next_kind++}, body);
  device_.Download(staging_.data(), all);
  const absl::Status status = device_.Wait(device_.Record(), kTimeout);
  ASSERT_TRUE(status.ok()) << status;
  Store(*call, bytes);
}

}  // namespace cachalot::testing
