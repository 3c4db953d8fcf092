// What the tests of the tokenizer share: the small tokenizer of our own, and copies of it to spoil.
#ifndef CACHALOT_TESTS_SERVER_TOKENIZER_TESTING_H_
#define CACHALOT_TESTS_SERVER_TOKENIZER_TESTING_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "server/text/tokenizer.h"

namespace cachalot {

inline const std::string kDataDir = std::string(CACHALOT_TEST_DATA_DIR) + "/server/data";
// What published files make of texts and conversations; of DeepSeek-V3's tokenizer, what these texts need.
inline const std::string kPublishedDir = kDataDir + "/published";
inline const std::string kSmallModel = kDataDir + "/tokenizer";
inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << path;
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

inline std::unique_ptr<Tokenizer> LoadOrDie(const std::string& model_dir) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(model_dir);
  if (!tokenizer.ok()) {
    ADD_FAILURE() << tokenizer.status();
    std::abort();
  }
  return *std::move(tokenizer);
}

// A model directory of its own, with the small tokenizer's files until they are replaced.
class ModelDir {
 public:
  ModelDir() {
    static int num_dirs = 0;
    path_ = testing::TempDir() + "cachalot_tokenizer_" + std::to_string(getpid()) + "_" + std::to_string(num_dirs++);
    std::filesystem::create_directories(path_);
    for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
      Write(name, ReadText(kSmallModel + "/" + name));
    }
  }
  ~ModelDir() { std::filesystem::remove_all(path_); }

  void Write(const std::string& name, const std::string& text) { std::ofstream(path_ + "/" + name) << text; }
  void Remove(const std::string& name) { std::filesystem::remove(path_ + "/" + name); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace cachalot

#endif  // CACHALOT_TESTS_SERVER_TOKENIZER_TESTING_H_
