// KvStore: a rank's cache, block by block: every layer's latents, the MTP layer's, and what drafting goes on from.
#ifndef CACHALOT_ENGINE_MODEL_KV_STORE_H_
#define CACHALOT_ENGINE_MODEL_KV_STORE_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "kernels/device.h"
#include "kernels/ops_types.h"

namespace cachalot {

struct KvOptions {
  KvDType dtype = KvDType::kF32;
  bool has_mtp = false;
  DType value_dtype = DType::kF32;  // of border hiddens: the backend's
};

// A block is kBlockTokens consecutive tokens of a sequence, in all layers. What it holds depends on its own and earlier
// tokens only, so it may be shared, moved away and brought back as a whole.
class KvStore {
 public:
  // ResourceExhausted when it does not fit. `device` must outlive it.
  static absl::StatusOr<std::unique_ptr<KvStore>> Create(const ModelConfig& config, const KvOptions& options,
                                                         int num_blocks, Device& device);
  static int64_t BlockBytes(const ModelConfig& config, const KvOptions& options);

  int num_blocks() const { return num_blocks_; }
  // One of the main layers.
  const KvCache& layer(int layer) const { return layers_.at(layer); }
  // The MTP layer's. Its entry at position j is made of the model's output at j - 1 and token j: position 0 has none.
  const KvCache& mtp() const { return mtp_; }
  // [B,D] the model's output (after the final norm) at the last position of each block that has been computed: what the
  // MTP layer's next entry is made of. Empty without an MTP layer.
  const Tensor& borders() const { return borders_; }

  // All that a block holds, in a fixed order: BlockBytes in all.
  std::vector<Tensor> Block(int32_t block) const;

 private:
  explicit KvStore(int num_blocks) : num_blocks_(num_blocks) {}

  const int num_blocks_;
  std::vector<KvCache> layers_;
  KvCache mtp_;
  Tensor borders_;
  std::vector<Buffer> buffers_;
};

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_MODEL_KV_STORE_H_
