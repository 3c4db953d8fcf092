// What the fuzz targets share. A target is one function over bytes: libFuzzer calls it, or replay.cc with saved inputs.
#ifndef CACHALOT_TESTS_FUZZ_FUZZ_H_
#define CACHALOT_TESTS_FUZZ_FUZZ_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace cachalot {

// Ends the process where the fuzzer sees it.
#define FUZZ_CHECK(condition) \
  if (!(condition)) __builtin_trap()

// A directory of this process in memory, removed at its end.
const std::string& ScratchDirectory();

// Writes `bytes` to ScratchDirectory()/name.
void WriteScratch(const std::string& name, std::string_view bytes);

}  // namespace cachalot

#endif  // CACHALOT_TESTS_FUZZ_FUZZ_H_
