// A SAX handler that builds the value and stops at the limits; file reading for config and index.
#include "engine/model/json_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

using Json = nlohmann::json;

// Every method returns whether to go on. NOTE: the parser itself is iterative and so is the destruction of its value:
// the depth limit is for those who walk the value, the value limit for memory.
class Builder : public nlohmann::json_sax<Json> {
 public:
  explicit Builder(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return Put(nullptr) != nullptr; }
  bool boolean(bool value) override { return Put(value) != nullptr; }
  bool number_integer(int64_t value) override { return Put(value) != nullptr; }
  bool number_unsigned(uint64_t value) override { return Put(value) != nullptr; }
  bool number_float(double value, const std::string&) override { return Put(value) != nullptr; }
  bool string(std::string& value) override { return Put(std::move(value)) != nullptr; }
  bool binary(Json::binary_t&) override { return Fail("binary value"); }
  bool start_object(size_t) override { return Open(Json::object()); }
  bool start_array(size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(std::string& name) override {
    auto [slot, is_new] = open_.back()->get_ref<Json::object_t&>().try_emplace(std::move(name));
    if (!is_new) return Fail(absl::StrCat("found the key ", Printable(slot->first), " twice, expected it once"));
    slot_ = &slot->second;
    return true;
  }

  bool parse_error(size_t, const std::string&, const Json::exception& error) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    absl::string_view what = error.what();
    if (size_t end = what.find("] "); end != what.npos) what.remove_prefix(end + 2);
    return Fail(Printable(what));
  }

  const std::string& error() const { return error_; }
  Json TakeRoot() { return std::move(root_); }

 private:
  bool Fail(std::string error) {
    error_ = std::move(error);
    return false;
  }

  // Stores a value where the text has come to: the root, the key just read, or the end of the open array.
  Json* Put(Json value) {
    if (++num_values_ > limits_.max_values) {
      Fail(absl::StrCat("found more than ", limits_.max_values, " values, expected fewer"));
      return nullptr;
    }
    Json* slot = &root_;
    if (!open_.empty()) {
      slot = open_.back()->is_array() ? &open_.back()->get_ref<Json::array_t&>().emplace_back() : slot_;
    }
    *slot = std::move(value);
    return slot;
  }

  bool Open(Json container) {
    if (static_cast<int>(open_.size()) >= limits_.max_depth) {
      return Fail(absl::StrCat("found nesting deeper than ", limits_.max_depth, ", expected less"));
    }
    Json* slot = Put(std::move(container));
    if (slot == nullptr) return false;
    open_.push_back(slot);
    return true;
  }

  bool Close() {
    open_.pop_back();
    return true;
  }

  const JsonLimits limits_;
  Json root_;
  std::vector<Json*> open_;  // from the root to where we are; NOTE: a container does not move while it is open
  Json* slot_ = nullptr;     // value of the key read last
  int64_t num_values_ = 0;
  std::string error_;
};

}  // namespace

absl::StatusOr<Json> ParseJson(absl::string_view text, const std::string& file, const JsonLimits& limits) {
  Builder builder(limits);
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": ", builder.error()));
  }
  return builder.TakeRoot();
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t max_bytes) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not block us
  if (fd < 0) return absl::ErrnoToStatus(errno, path);
  absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat info;
  if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, ": expected a regular file"));
  if (info.st_size > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": found ", info.st_size, " bytes, expected at most ", max_bytes));
  }
  std::string text(info.st_size, '\0');
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t n = read(fd, text.data() + size, text.size() - size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return absl::ErrnoToStatus(errno, path);
    if (n == 0) break;  // the file shrank meanwhile
    size += n;
  }
  text.resize(size);
  return text;
}

std::string Printable(absl::string_view text) {
  constexpr size_t kMaxLength = 200;
  std::string line;
  for (const unsigned char c : text.substr(0, kMaxLength)) {
    if (c >= 0x20 && c < 0x7f) {
      line += static_cast<char>(c);
    } else {
      absl::StrAppend(&line, "\\x", absl::Hex(c, absl::kZeroPad2));
    }
  }
  if (text.size() > kMaxLength) line += "...";
  return line;
}

}  // namespace cachalot
