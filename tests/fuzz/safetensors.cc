// Safetensors headers: a checkpoint that is safe to read from end to end, or an error.
#include "engine/model/safetensors.h"

#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  cachalot::WriteScratch("model.safetensors", {reinterpret_cast<const char*>(data), size});
  const auto checkpoint = cachalot::Checkpoint::Open(cachalot::ScratchDirectory());
  if (!checkpoint.ok()) {
    FUZZ_CHECK(!checkpoint.status().message().empty());
    return 0;
  }
  uint64_t sum = 0, num_bytes = 0;
  for (const auto& [name, tensor] : (*checkpoint)->tensors()) {
    num_bytes += tensor.num_bytes;
    for (uint64_t i = 0; i < tensor.num_bytes; ++i) sum += tensor.data[i];
  }
  FUZZ_CHECK(num_bytes <= size && sum <= num_bytes * 255);
  return 0;
}
