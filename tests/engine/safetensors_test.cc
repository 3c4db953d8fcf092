// The safetensors reader: what it returns, and one line for everything a file can get wrong.
#include "engine/model/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <random>

#include "tests/engine/checkpoint_writer.h"

namespace cachalot {
namespace {

constexpr const char* kIndexName = "model.safetensors.index.json";

std::string Text(const absl::Status& status) { return std::string(status.message()); }

TEST(SafetensorsTest, ReadsOneFile) {
  TempDir dir;
  const std::string header = R"({"b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [5, 17]},
      "__metadata__": {"format": "pt"}, "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [5, 5]},
      "a": {"dtype": "I8", "shape": [5], "data_offsets": [0, 5]},
      "scalar": {"dtype": "F64", "shape": [], "data_offsets": [17, 25]}}     )";
  WriteFile(dir / "weights.safetensors", SafetensorsBytes(header, "abcdeABCDEFGHIJKL01234567"));
  WriteFile(dir / "config.json", "{}");
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const Checkpoint& c = **checkpoint;
  EXPECT_EQ(c.tensors().size(), 4u);
  EXPECT_EQ(c.files(), std::vector<std::string>{dir / "weights.safetensors"});
  EXPECT_EQ(c.file_bytes(0), 8 + header.size() + 25);
  EXPECT_TRUE(c.unindexed().empty());
  EXPECT_EQ(c.Find("nothing"), nullptr);

  const CheckpointTensor* b = c.Find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->dtype, "BF16");
  EXPECT_EQ(b->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(b->num_bytes, 12u);
  EXPECT_EQ(std::memcmp(b->data, "ABCDEFGHIJKL", 12), 0);
  EXPECT_EQ(c.Find("empty")->num_bytes, 0u);
  EXPECT_TRUE(c.Find("scalar")->shape.empty());
  EXPECT_EQ(std::memcmp(c.Find("scalar")->data, "01234567", 8), 0);
}

TEST(SafetensorsTest, KnowsEveryDtype) {
  for (const auto& [dtype, bytes] : std::map<std::string, size_t>{{"F8_E4M3", 1},
                                                                  {"F8_E5M2", 1},
                                                                  {"F8_E8M0", 1},
                                                                  {"BF16", 2},
                                                                  {"F16", 2},
                                                                  {"F32", 4},
                                                                  {"F64", 8},
                                                                  {"I8", 1},
                                                                  {"U8", 1},
                                                                  {"I16", 2},
                                                                  {"U16", 2},
                                                                  {"I32", 4},
                                                                  {"U32", 4},
                                                                  {"I64", 8},
                                                                  {"U64", 8},
                                                                  {"BOOL", 1}}) {
    TempDir dir;
    WriteFile(dir / "model.safetensors", SafetensorsBytes({{"t", {dtype, {3}, std::string(3 * bytes, 'x')}}}));
    EXPECT_TRUE(Checkpoint::Open(dir.path()).ok()) << dtype;
  }
}

struct BadHeader {
  const char* header;
  const char* message;
};

// Every header stands before 8 bytes of data.
constexpr BadHeader kBadHeaders[] = {
    {R"([])", "found a header that is no JSON object"},
    {R"( {})", "found a header that is no JSON object"},
    {R"({"a": )", "parse error"},
    {R"({} {})", "parse error"},
    {R"({})", "the header: found 8 bytes after the last tensor, expected none"},
    {R"({"a": 1})", "a: found 1, expected an object"},
    {R"({"a": {"shape": [8], "data_offsets": [0, 8]}})", "expected dtype to be a string"},
    {R"({"a": {"dtype": 8, "shape": [8], "data_offsets": [0, 8]}})", "expected dtype to be a string"},
    {R"({"a": {"dtype": "F7", "shape": [8], "data_offsets": [0, 8]}})", "a: found dtype F7, expected one the format"},
    {R"({"a": {"dtype": "U8", "data_offsets": [0, 8]}})", "expected shape to be an array of sizes"},
    {R"({"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}})", "expected shape to be an array of sizes"},
    {R"({"a": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}})", "expected shape to be an array of sizes"},
    {R"({"a": {"dtype": "U8", "shape": [18446744073709551615], "data_offsets": [0, 8]}})", "expected shape to be"},
    {R"({"a": {"dtype": "U8", "shape": [[8]], "data_offsets": [0, 8]}})", "nesting deeper than 3"},
    {R"({"a": {"dtype": "U8", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}})",
     "a: found U8[4294967296, 4294967296], expected a size that 64 bits hold"},
    {R"({"a": {"dtype": "F64", "shape": [2305843009213693953], "data_offsets": [0, 8]}})", "that 64 bits hold"},
    {R"({"a": {"dtype": "U8", "shape": [8]}})", "expected data_offsets to be [begin, end]"},
    {R"({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8, 9]}})", "expected data_offsets to be [begin, end]"},
    {R"({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}})",
     "a: found data_offsets [8, 0], expected 8 bytes for U8[8]"},
    {R"({"a": {"dtype": "F64", "shape": [2305843009213693951], "data_offsets": [8, 0]}})",
     "a: found data_offsets [8, 0], expected 18446744073709551608 bytes"},
    {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}})",
     "a: found data_offsets [0, 8], expected 12 bytes for F32[3]"},
    {R"({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}})",
     "a: found data_offsets [0, 9], expected an end within the file's 8 bytes of data"},
    {R"({"a": {"dtype": "U8", "shape": [8], "data_offsets": [9223372036854775799, 9223372036854775807]}})",
     "expected an end within the file's 8 bytes"},
    {R"({"a": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
          "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
     "b: found data_offsets [4, 8] that overlap a, expected the tensor to begin at 5"},
    {R"({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
          "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
     "b: found data_offsets [4, 8] that leave a gap after a, expected the tensor to begin at 3"},
    {R"({"a": {"dtype": "U8", "shape": [7], "data_offsets": [1, 8]}})", "leave a gap after the header"},
    {R"({"a": {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]}})",
     "a: found 1 bytes after the last tensor, expected none"},
    {R"({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
          "a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}})",
     "found the key a twice"},
    {R"({"__metadata__": {"format": 1}, "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}})",
     "__metadata__: found {\"format\":1}, expected an object of strings"},
    {R"({"__metadata__": [], "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}})", "__metadata__: found []"},
    {"{\"a\\n\\u0001\": {\"dtype\": \"U9\", \"shape\": [8], \"data_offsets\": [0, 8]}}", "a\\x0a\\x01: found dtype U9"},
};

TEST(SafetensorsTest, BadHeaders) {
  for (const BadHeader& bad : kBadHeaders) {
    TempDir dir;
    WriteFile(dir / "model.safetensors", SafetensorsBytes(bad.header, "01234567"));
    const auto checkpoint = Checkpoint::Open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << bad.header;
    const std::string message = Text(checkpoint.status());
    EXPECT_NE(message.find(bad.message), message.npos) << bad.header << "\n" << message;
    EXPECT_EQ(message.rfind(dir / "model.safetensors", 0), 0u) << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
  }
}

TEST(SafetensorsTest, BadFiles) {
  const std::string good = SafetensorsBytes({{"a", {"U8", {64}, std::string(64, 'x')}}});
  uint64_t longer = good.size(), enormous = 1ull << 62;
  const std::map<std::string, std::string> cases = {
      {"", "expected a safetensors file"},
      {good.substr(0, 7), "found 7 bytes, expected a safetensors file of at least 8"},
      {good.substr(0, 8), "found a header of"},
      {good.substr(0, 40), "found a header of"},
      {good.substr(0, good.size() - 1), "expected an end within the file's 63 bytes of data"},
      {good + "x", "found 1 bytes after the last tensor"},
      {std::string(reinterpret_cast<char*>(&longer), 8) + good.substr(8), "found a header of"},
      {std::string(reinterpret_cast<char*>(&enormous), 8) + good.substr(8), "found a header of 4611686018427387904"},
      {SafetensorsBytes("{\"a\":" + std::string(5'000'000, '['), ""), "nesting deeper than 3"},
      {SafetensorsBytes("{\"a\":[" + std::string(9'000'000, '0'), ""), "parse error"},
      {SafetensorsBytes(
           "{\"a\":[0" +
               [] {
                 std::string zeros;
                 for (int i = 0; i < 4'000'000; ++i) zeros += ",0";
                 return zeros;
               }(),
           ""),
       "found more than 4000000 values"},
  };
  for (const auto& [bytes, expected] : cases) {
    TempDir dir;
    WriteFile(dir / "model.safetensors", bytes);
    const auto checkpoint = Checkpoint::Open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << expected;
    EXPECT_NE(Text(checkpoint.status()).find(expected), std::string::npos) << checkpoint.status();
  }
}

TEST(SafetensorsTest, FindsTheFile) {
  TempDir dir;
  EXPECT_EQ(Checkpoint::Open(dir / "absent").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Checkpoint::Open(dir.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Text(Checkpoint::Open(dir.path()).status()),
            dir.path() + ": found no *.safetensors file, expected model.safetensors.index.json or one such file");
  const std::string file = SafetensorsBytes({{"a", {"U8", {1}, "x"}}});
  WriteFile(dir / "one.safetensors", file);
  EXPECT_TRUE(Checkpoint::Open(dir.path()).ok());
  WriteFile(dir / "two.safetensors", file);
  EXPECT_EQ(Text(Checkpoint::Open(dir.path()).status()),
            dir.path() +
                ": found 2 *.safetensors files without model.safetensors.index.json (one.safetensors, "
                "two.safetensors), expected the index or one file");

  TempDir odd;
  ASSERT_EQ(mkdir((odd / "model.safetensors").c_str(), 0700), 0);
  EXPECT_EQ(Text(Checkpoint::Open(odd.path()).status()), odd / "model.safetensors" + ": expected a regular file");
  std::filesystem::remove(odd / "model.safetensors");
  ASSERT_EQ(mkfifo((odd / "model.safetensors").c_str(), 0600), 0);
  EXPECT_EQ(Text(Checkpoint::Open(odd.path()).status()), odd / "model.safetensors" + ": expected a regular file");
}

class ShardsTest : public testing::Test {
 protected:
  ShardsTest() {
    WriteFile(dir_ / "model-1.safetensors", SafetensorsBytes({{"a", {"U8", {2}, "aa"}}, {"extra", {"U8", {1}, "e"}}}));
    WriteFile(dir_ / "model-2.safetensors", SafetensorsBytes({{"b", {"U8", {2}, "bb"}}}));
  }
  std::string OpenError(const std::string& index) {
    WriteFile(dir_ / kIndexName, index);
    const auto checkpoint = Checkpoint::Open(dir_.path());
    return checkpoint.ok() ? "" : Text(checkpoint.status());
  }
  const TempDir dir_;
};

TEST_F(ShardsTest, ReadsThemAll) {
  WriteFile(dir_ / kIndexName, R"({"metadata": {"total_size": 4},
      "weight_map": {"b": "model-2.safetensors", "a": "model-1.safetensors"}})");
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const Checkpoint& c = **checkpoint;
  EXPECT_EQ(c.files(), (std::vector<std::string>{dir_ / "model-1.safetensors", dir_ / "model-2.safetensors"}));
  EXPECT_EQ(c.Find("a")->file_idx, 0);
  EXPECT_EQ(c.Find("b")->file_idx, 1);
  EXPECT_EQ(std::memcmp(c.Find("b")->data, "bb", 2), 0);
  EXPECT_EQ(c.unindexed(), std::vector<std::string>{"extra"});
  EXPECT_NE(c.Find("extra"), nullptr);
}

TEST_F(ShardsTest, BadIndexes) {
  const std::string index = dir_ / kIndexName;
  EXPECT_NE(OpenError("{").find("parse error"), std::string::npos);
  const std::string no_map = index + ": weight_map: found no object with tensors, expected one";
  for (const char* text : {"[]", "{}", R"({"weight_map": []})", R"({"weight_map": {}})"}) {
    EXPECT_EQ(OpenError(text), no_map) << text;
  }
  for (const char* file :
       {"1", "null", R"("")", R"("model-1.bin")", R"("../model-1.safetensors")", R"("/etc/model-1.safetensors")",
        R"("sub/model-1.safetensors")", R"("model-1.safetensors\u0000.safetensors")"}) {
    const std::string error = OpenError(std::string(R"({"weight_map": {"a": )") + file + "}}");
    EXPECT_EQ(error.rfind(index + ": a: found ", 0), 0u) << error;
    EXPECT_NE(error.find("expected the name of a .safetensors file beside the index"), error.npos) << error;
  }
  EXPECT_EQ(OpenError(R"({"weight_map": {"a": "model-3.safetensors"}})"),
            dir_ / "model-3.safetensors" + ": No such file or directory");
  EXPECT_EQ(OpenError(R"({"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}})"),
            index + ": c: found in no file, expected in model-2.safetensors");
  EXPECT_EQ(OpenError(R"({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}})").rfind(index, 0),
            0u);
  EXPECT_NE(
      OpenError(R"({"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}})").find("key a twice"),
      std::string::npos);
}

TEST_F(ShardsTest, ATensorInTwoFiles) {
  WriteFile(dir_ / "model-2.safetensors", SafetensorsBytes({{"a", {"U8", {2}, "bb"}}, {"b", {"U8", {1}, "b"}}}));
  EXPECT_EQ(
      OpenError(R"({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})"),
      dir_ / "model-2.safetensors" + ": a: found in " + (dir_ / "model-1.safetensors") + " too, expected in one file");
}

TEST_F(ShardsTest, ATruncatedShard) {
  const std::string file = SafetensorsBytes({{"b", {"U8", {2}, "bb"}}});
  WriteFile(dir_ / "model-2.safetensors", file.substr(0, file.size() - 1));
  EXPECT_EQ(OpenError(R"({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})"),
            dir_ / "model-2.safetensors" +
                ": b: found data_offsets [0, 2], expected an end within the file's 1 bytes of data");
}

// Bytes of a header changed at random: any answer but a crash, and what is accepted stays within the file.
TEST(SafetensorsTest, SurvivesDamage) {
  const std::string good =
      SafetensorsBytes({{"a.weight", {"F8_E4M3", {4, 3}, std::string(12, 'x')}}, {"b", {"BF16", {5}, "0123456789"}}});
  const size_t header_end = good.size() - 22;
  TempDir dir;
  std::mt19937 random(1);
  int num_accepted = 0, num_refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = good;
    for (int changes = 1 + static_cast<int>(random() % 3); changes > 0; --changes) {
      const size_t place = random() % header_end;
      bytes[place] = random() % 2 == 0 ? static_cast<char>(random()) : "0123456789[]{},:\""[random() % 17];
    }
    WriteFile(dir / "model.safetensors", bytes);
    const auto checkpoint = Checkpoint::Open(dir.path());
    ++(checkpoint.ok() ? num_accepted : num_refused);
    if (!checkpoint.ok()) continue;
    unsigned sum = 0;
    for (const auto& [name, tensor] : (*checkpoint)->tensors()) {
      for (uint64_t i = 0; i < tensor.num_bytes; ++i) sum += tensor.data[i];
    }
    EXPECT_GT(sum, 0u);
  }
  EXPECT_GT(num_accepted, 0);
  EXPECT_GT(num_refused, 0);
}

}  // namespace
}  // namespace cachalot
