// A directory in /dev/shm.
#include <unistd.h>

#include <cstdio>
#include <filesystem>

#include "tests/fuzz/fuzz.h"

namespace cachalot {
namespace {

class Scratch {
 public:
  Scratch() : path_("/dev/shm/cachalot-fuzz-" + std::to_string(getpid())) { std::filesystem::create_directory(path_); }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

}  // namespace

const std::string& ScratchDirectory() {
  static const Scratch scratch;
  return scratch.path();
}

void WriteScratch(const std::string& name, std::string_view bytes) {
  std::FILE* file = std::fopen((ScratchDirectory() + "/" + name).c_str(), "wb");
  FUZZ_CHECK(file != nullptr);
  FUZZ_CHECK(std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size());
  std::fclose(file);
}

}  // namespace cachalot
