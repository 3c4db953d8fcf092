// One verb's tensors, moved from the host to a device and back.
#ifndef CACHALOT_TESTS_KERNELS_DEVICE_CALL_H_
#define CACHALOT_TESTS_KERNELS_DEVICE_CALL_H_

#include <functional>
#include <vector>

#include "kernels/backend.h"

namespace cachalot::testing {

// The host tensors of one call. What overlaps on the host overlaps on the device in the same way, and addresses keep
// their remainder by 256.
class DeviceCall {
 public:
  DeviceCall& In(const Tensor& tensor) { return Add(tensor, false); }
  DeviceCall& Out(const Tensor& tensor) { return Add(tensor, true); }  // or in and out
  DeviceCall& In(const Activation& x) { return In(x.values).In(x.scales); }
  DeviceCall& Out(const Activation& x) { return Out(x.values).Out(x.scales); }
  DeviceCall& In(const StepRows& rows) { return In(rows.tokens).In(rows.positions).In(rows.slots); }
  DeviceCall& Out(const StepRows& rows) { return Out(rows.tokens).Out(rows.positions).Out(rows.slots); }
  DeviceCall& In(const StepInput& input) { return Add(input, false); }
  DeviceCall& Out(const StepInput& input) { return Add(input, true); }
  DeviceCall& In(const SlotState& state) { return Add(state, false); }
  DeviceCall& Out(const SlotState& state) { return Add(state, true); }
  DeviceCall& Out(const SampleOutput& out);

  // The same on the device, between Memory::Load and Memory::Store.
  Tensor operator()(const Tensor& host) const;
  Activation operator()(const Activation& x) const { return {(*this)(x.values), (*this)(x.scales)}; }
  KvCache operator()(const KvCache& cache) const { return {(*this)(cache.blocks), cache.dtype}; }
  RopeTable operator()(const RopeTable& rope) const { return {(*this)(rope.cos_sin)}; }
  StepRows operator()(const StepRows& rows) const;
  StepInput operator()(const StepInput& input) const;
  SlotState operator()(const SlotState& state) const;
  SampleOutput operator()(const SampleOutput& out) const;

 private:
  friend class DeviceMemory;
  // Host memory that one or more tensors span, and where it lies in the device's.
  struct Region {
    uint8_t* begin = nullptr;
    uint8_t* end = nullptr;
    bool is_out = false;
    size_t offset = 0;
  };
  DeviceCall& Add(const Tensor& tensor, bool is_out);
  DeviceCall& Add(const StepInput& input, bool is_out);
  DeviceCall& Add(const SlotState& state, bool is_out);
  size_t Layout();  // merges regions that meet, and gives each a place; the bytes of all

  std::vector<Region> regions_;
  uint8_t* device_base_ = nullptr;
};

// Memory of a device that calls use one after the other, grown as they need it.
class DeviceMemory {
 public:
  explicit DeviceMemory(Device* device) : device_(*device) {}
  // Moves the call's tensors to the device, runs `body` there and moves them back; waits for the end of it.
  void Run(DeviceCall* call, const std::function<void()>& body);

 private:
  void Reserve(size_t bytes);
  void Load(const DeviceCall& call, size_t bytes);
  void Store(const DeviceCall& call, size_t bytes) const;

  Device& device_;
  Buffer device_memory_, staging_;
};

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_DEVICE_CALL_H_
