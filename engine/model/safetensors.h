// Checkpoint: the tensors of a model directory, memory-mapped, found by name.
#ifndef CACHALOT_ENGINE_MODEL_SAFETENSORS_H_
#define CACHALOT_ENGINE_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace cachalot {

struct CheckpointTensor {
  std::string dtype;  // as the file says: "F8_E4M3", "BF16", "F16", "F32", "F64", "I32", "I64", ...
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;  // in the mapping; no alignment promised
  uint64_t num_bytes = 0;
  int file_idx = 0;  // in Checkpoint::files()
};

// Immutable once open; any thread may read. The mappings live as long as it does.
// NOTE: a file that is cut short while it is mapped kills the process (SIGBUS) when the lost part is read: replace a
// checkpoint by a rename, never in place.
class Checkpoint {
 public:
  // Opens model.safetensors.index.json with its shards, else model.safetensors, else the directory's single
  // *.safetensors file; or the one file that `model_dir` is the path of. One line naming
  // file, tensor, found and expected for: a missing or truncated file, a header that is not what the format says,
  // offsets that overlap, leave gaps or leave the file, a byte count that contradicts dtype and shape, an unknown
  // dtype, an index that names absent tensors or files, a tensor that two files hold.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model_dir);
  // Tensors that are known by type and shape alone: their data is null.
  static std::unique_ptr<Checkpoint> WithoutData(absl::flat_hash_map<std::string, CheckpointTensor> tensors);
  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  const CheckpointTensor* Find(const std::string& name) const;  // null when absent
  const absl::flat_hash_map<std::string, CheckpointTensor>& tensors() const { return tensors_; }
  bool has_data() const { return has_data_; }
  const std::string& model_dir() const { return model_dir_; }
  const std::vector<std::string>& files() const { return files_; }  // paths, model_dir included
  uint64_t file_bytes(int file_idx) const { return mappings_[file_idx].bytes; }
  // Tensors in a shard that the index does not name: kept like the others, sorted by name.
  const std::vector<std::string>& unindexed() const { return unindexed_; }

 private:
  friend class CheckpointReader;
  struct Mapping {
    void* data;
    size_t bytes;
  };
  Checkpoint() = default;
  std::string model_dir_;
  std::vector<std::string> files_;
  std::vector<Mapping> mappings_;
  absl::flat_hash_map<std::string, CheckpointTensor> tensors_;
  std::vector<std::string> unindexed_;
  bool has_data_ = true;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_SAFETENSORS_H_
