// The safetensors format: 8 bytes of header length, a JSON header, then the tensors without gap or overlap.
#include "engine/model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>
#include <system_error>
#include <tuple>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/container/btree_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "engine/model/json_file.h"

namespace cachalot {

static_assert(std::endian::native == std::endian::little, "the format is little-endian, and read in place");

namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxIndexBytes = 256 << 20;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr JsonLimits kHeaderLimits = {.max_depth = 3};
constexpr const char* kIndexName = "model.safetensors.index.json";

template <typename... Args>
absl::Status Invalid(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

// Bytes of one element; nothing when the format does not know the dtype.
std::optional<uint64_t> ElementBytes(absl::string_view dtype) {
  for (const char* name : {"F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"}) {
    if (dtype == name) return 1;
  }
  for (const char* name : {"BF16", "F16", "I16", "U16"}) {
    if (dtype == name) return 2;
  }
  for (const char* name : {"F32", "I32", "U32"}) {
    if (dtype == name) return 4;
  }
  for (const char* name : {"F64", "I64", "U64"}) {
    if (dtype == name) return 8;
  }
  return std::nullopt;
}

// One tensor of a header, its place relative to the end of the header.
struct Entry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;
};

// A non-negative integer that int64_t holds.
std::optional<int64_t> Size(const Json& value) {
  const uint64_t* size = value.get_ptr<const uint64_t*>();  // NOTE: the parser makes every integer >= 0 unsigned
  if (size == nullptr || *size > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
  return static_cast<int64_t>(*size);
}

// The array of sizes in `info[key]`; `count` < 0 takes any number of them.
std::optional<std::vector<int64_t>> Sizes(const Json& info, const char* key, int count) {
  auto it = info.find(key);
  if (it == info.end() || !it->is_array()) return std::nullopt;
  if (count >= 0 && static_cast<int>(it->size()) != count) return std::nullopt;
  std::vector<int64_t> sizes;
  for (const Json& element : *it) {
    const std::optional<int64_t> size = Size(element);
    if (!size) return std::nullopt;
    sizes.push_back(*size);
  }
  return sizes;
}

std::string Dump(const Json& value) { return value.dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 200); }

// One {"dtype", "shape", "data_offsets"} of a header, consistent in itself.
absl::StatusOr<Entry> ParseEntry(const std::string& file, const std::string& name, const Json& info) {
  const std::string where = absl::StrCat(file, ": ", Printable(name), ": found ");
  if (!info.is_object()) return Invalid(where, Dump(info), ", expected an object with dtype, shape and data_offsets");
  auto dtype = info.find("dtype");
  if (dtype == info.end() || !dtype->is_string()) return Invalid(where, Dump(info), ", expected dtype to be a string");
  Entry entry;
  entry.name = name;
  entry.dtype = *dtype->get_ptr<const std::string*>();
  std::optional<std::vector<int64_t>> shape = Sizes(info, "shape", -1), offsets = Sizes(info, "data_offsets", 2);
  if (!shape) return Invalid(where, Dump(info), ", expected shape to be an array of sizes");
  if (!offsets) return Invalid(where, Dump(info), ", expected data_offsets to be [begin, end]");
  const std::optional<uint64_t> element_bytes = ElementBytes(entry.dtype);
  if (!element_bytes) return Invalid(where, "dtype ", Printable(entry.dtype), ", expected one the format knows");

  entry.shape = *std::move(shape);
  entry.begin = (*offsets)[0];
  entry.end = (*offsets)[1];
  const std::string dims = absl::StrCat(entry.dtype, "[", absl::StrJoin(entry.shape, ", "), "]");
  uint64_t bytes = *element_bytes;
  for (int64_t dim : entry.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(dim), &bytes)) {
      return Invalid(where, dims, ", expected a size that 64 bits hold");
    }
  }
  if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
    return Invalid(where, "data_offsets [", entry.begin, ", ", entry.end, "], expected ", bytes, " bytes for ", dims);
  }
  return entry;
}

// Orders the entries by their place and checks that they fill `data_bytes` exactly.
absl::Status CheckLayout(const std::string& file, uint64_t data_bytes, std::vector<Entry>* entries) {
  std::sort(entries->begin(), entries->end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t end = 0;
  absl::string_view previous = "the header";
  for (const Entry& entry : *entries) {
    const std::string where =
        absl::StrCat(file, ": ", Printable(entry.name), ": found data_offsets [", entry.begin, ", ", entry.end, "]");
    if (entry.end > data_bytes) {
      return Invalid(where, ", expected an end within the file's ", data_bytes, " bytes of data");
    }
    if (entry.begin != end) {
      return Invalid(where, entry.begin < end ? " that overlap " : " that leave a gap after ", Printable(previous),
                     ", expected the tensor to begin at ", end);
    }
    end = entry.end;
    previous = entry.name;
  }
  if (end != data_bytes) {
    return Invalid(file, ": ", Printable(previous), ": found ", data_bytes - end,
                   " bytes after the last tensor, expected none");
  }
  return absl::OkStatus();
}

absl::Status CheckMetadata(const std::string& file, const Json& metadata) {
  const bool is_valid = metadata.is_object() && std::all_of(metadata.begin(), metadata.end(),
                                                            [](const Json& value) { return value.is_string(); });
  if (is_valid) return absl::OkStatus();
  return Invalid(file, ": __metadata__: found ", Dump(metadata), ", expected an object of strings");
}

// The entries of one file, every byte of which is at `bytes`.
absl::StatusOr<std::vector<Entry>> ParseHeader(const std::string& file, absl::string_view bytes, size_t* data_begin) {
  uint64_t header_bytes = 0;
  if (bytes.size() < sizeof header_bytes) {
    return Invalid(file, ": found ", bytes.size(), " bytes, expected a safetensors file of at least 8");
  }
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  const uint64_t largest = std::min<uint64_t>(kMaxHeaderBytes, bytes.size() - sizeof header_bytes);
  if (header_bytes > largest) {
    return Invalid(file, ": found a header of ", header_bytes, " bytes, expected at most ", largest);
  }
  *data_begin = sizeof header_bytes + header_bytes;
  const absl::string_view header = bytes.substr(sizeof header_bytes, header_bytes);
  if (!absl::StartsWith(header, "{")) return Invalid(file, ": found a header that is no JSON object, expected one");

  absl::StatusOr<Json> root = ParseJson(header, file, kHeaderLimits);
  if (!root.ok()) return root.status();
  std::vector<Entry> entries;
  entries.reserve(root->size());
  for (const auto& [name, info] : root->items()) {
    if (name == "__metadata__") {
      if (absl::Status status = CheckMetadata(file, info); !status.ok()) return status;
      continue;
    }
    absl::StatusOr<Entry> entry = ParseEntry(file, name, info);
    if (!entry.ok()) return entry.status();
    entries.push_back(*std::move(entry));
  }
  if (absl::Status status = CheckLayout(file, bytes.size() - *data_begin, &entries); !status.ok()) return status;
  return entries;
}

// Which file holds which tensor.
using Index = absl::flat_hash_map<std::string, std::string>;

absl::StatusOr<Index> ReadIndex(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path, kMaxIndexBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<Json> root = ParseJson(*text, path, JsonLimits());
  if (!root.ok()) return root.status();
  auto map = root->is_object() ? root->find("weight_map") : root->end();
  if (map == root->end() || !map->is_object() || map->empty()) {
    return Invalid(path, ": weight_map: found no object with tensors, expected one");
  }
  Index index;
  index.reserve(map->size());
  for (const auto& [name, value] : map->items()) {
    const std::string* file = value.get_ptr<const std::string*>();
    const bool is_plain_name =
        file != nullptr && absl::EndsWith(*file, ".safetensors") && file->find_first_of("/\\\0", 0, 3) == file->npos;
    if (!is_plain_name) {
      return Invalid(path, ": ", Printable(name), ": found ", Dump(value),
                     ", expected the name of a .safetensors file beside the index");
    }
    index.emplace(name, *file);
  }
  return index;
}

// The file of a directory without an index: model.safetensors, the name that writers use, or the only one there.
absl::StatusOr<std::string> FindSingleFile(const std::string& model_dir) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator it(model_dir, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name == "model.safetensors") return name;
    if (absl::EndsWith(name, ".safetensors")) names.push_back(name);
  }
  if (error) return absl::NotFoundError(absl::StrCat(model_dir, ": ", error.message()));
  if (names.size() == 1) return names[0];
  if (names.empty()) {
    return absl::NotFoundError(
        absl::StrCat(model_dir, ": found no *.safetensors file, expected ", kIndexName, " or one such file"));
  }
  std::sort(names.begin(), names.end());
  const size_t num_files = names.size();
  if (num_files > 8) names.resize(8);
  return Invalid(model_dir, ": found ", num_files, " *.safetensors files without ", kIndexName, " (",
                 Printable(absl::StrJoin(names, ", ")), num_files > 8 ? ", ..." : "",
                 "), expected the index or one file");
}

}  // namespace

class CheckpointReader {
 public:
  explicit CheckpointReader(const std::string& model_dir) : checkpoint_(new Checkpoint) {
    checkpoint_->model_dir_ = model_dir;
  }

  absl::StatusOr<std::unique_ptr<Checkpoint>> Read() {
    const std::string index_path = Path(kIndexName);
    std::error_code error;
    if (absl::Status status = std::filesystem::exists(index_path, error) ? ReadShards(index_path) : ReadSingle();
        !status.ok()) {
      return status;
    }
    std::sort(checkpoint_->unindexed_.begin(), checkpoint_->unindexed_.end());
    return std::move(checkpoint_);
  }

 private:
  std::string Path(const std::string& name) const {
    const std::string& dir = checkpoint_->model_dir_;
    return absl::StrCat(dir, absl::EndsWith(dir, "/") ? "" : "/", name);
  }

  absl::Status ReadSingle() {
    std::error_code error;
    if (std::filesystem::is_regular_file(checkpoint_->model_dir_, error)) return ReadShard(checkpoint_->model_dir_);
    absl::StatusOr<std::string> name = FindSingleFile(checkpoint_->model_dir_);
    return name.ok() ? ReadShard(Path(*name)) : name.status();
  }

  absl::Status ReadShards(const std::string& index_path) {
    absl::StatusOr<Index> index = ReadIndex(index_path);
    if (!index.ok()) return index.status();
    absl::btree_map<std::string, int> file_idx;  // in the order of their names
    for (const auto& [tensor, file] : *index) file_idx[file] = 0;
    int num_files = 0;
    for (auto& [file, idx] : file_idx) {
      idx = num_files++;
      if (absl::Status status = ReadShard(Path(file)); !status.ok()) return status;
    }

    // Both ways: what the index names is there, what is there and not named is noted.
    for (const auto& [name, file] : *index) {
      const CheckpointTensor* tensor = checkpoint_->Find(name);
      if (tensor != nullptr && tensor->file_idx == file_idx[file]) continue;
      return Invalid(index_path, ": ", Printable(name), ": found ",
                     tensor == nullptr ? "in no file" : "in " + checkpoint_->files_[tensor->file_idx], ", expected in ",
                     file);
    }
    for (const auto& [name, tensor] : checkpoint_->tensors_) {
      if (!index->contains(name)) checkpoint_->unindexed_.push_back(name);
    }
    return absl::OkStatus();
  }

  absl::Status ReadShard(const std::string& path) {
    absl::StatusOr<Checkpoint::Mapping> mapping = Map(path);
    if (!mapping.ok()) return mapping.status();
    const int file_idx = static_cast<int>(checkpoint_->files_.size());
    checkpoint_->files_.push_back(path);
    checkpoint_->mappings_.push_back(*mapping);

    const absl::string_view bytes(static_cast<const char*>(mapping->data), mapping->bytes);
    size_t data_begin = 0;
    absl::StatusOr<std::vector<Entry>> entries = ParseHeader(path, bytes, &data_begin);
    if (!entries.ok()) return entries.status();
    for (Entry& entry : *entries) {
      CheckpointTensor tensor;
      tensor.dtype = std::move(entry.dtype);
      tensor.shape = std::move(entry.shape);
      tensor.data = reinterpret_cast<const uint8_t*>(bytes.data()) + data_begin + entry.begin;
      tensor.num_bytes = entry.end - entry.begin;
      tensor.file_idx = file_idx;
      const auto [it, is_new] = checkpoint_->tensors_.try_emplace(std::move(entry.name), std::move(tensor));
      if (!is_new) {
        return Invalid(path, ": ", Printable(it->first), ": found in ", checkpoint_->files_[it->second.file_idx],
                       " too, expected in one file");
      }
    }
    return absl::OkStatus();
  }

  // NOTE: no madvise. Writers put the F32 tensors, our scales, first in a file, then come large weights: the kernel's
  // own read-ahead suits both the check of the scales and the load.
  static absl::StatusOr<Checkpoint::Mapping> Map(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not block us
    if (fd < 0) return absl::ErrnoToStatus(errno, path);
    absl::Cleanup close_fd = [fd] { close(fd); };
    struct stat info;
    if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, path);
    if (!S_ISREG(info.st_mode)) return Invalid(path, ": expected a regular file");
    if (info.st_size == 0) return Invalid(path, ": found 0 bytes, expected a safetensors file");
    void* data = mmap(nullptr, info.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) return absl::ErrnoToStatus(errno, path);
    return Checkpoint::Mapping{data, static_cast<size_t>(info.st_size)};
  }

  std::unique_ptr<Checkpoint> checkpoint_;
};

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model_dir) {
  return CheckpointReader(model_dir).Read();
}

std::unique_ptr<Checkpoint> Checkpoint::WithoutData(absl::flat_hash_map<std::string, CheckpointTensor> tensors) {
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint());
  checkpoint->tensors_ = std::move(tensors);
  checkpoint->has_data_ = false;
  return checkpoint;
}

Checkpoint::~Checkpoint() {
  for (const Mapping& mapping : mappings_) munmap(mapping.data, mapping.bytes);
}

const CheckpointTensor* Checkpoint::Find(const std::string& name) const {
  auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace cachalot
