// One allocation a layer, and one for the border hiddens.
#include "engine/model/kv_store.h"

namespace cachalot {
namespace {

int64_t TokenBytes(const ModelConfig& config, const KvOptions& options) {
  return KvTokenBytes(options.dtype, config.kv_lora_rank, config.qk_rope_head_dim);
}

}  // namespace

int64_t KvStore::BlockBytes(const ModelConfig& config, const KvOptions& options) {
  const int64_t layer_bytes = TokenBytes(config, options) * kBlockTokens;
  const int64_t mtp_bytes = layer_bytes + config.hidden_size * DTypeBytes(options.value_dtype);
  return config.num_hidden_layers * layer_bytes + (options.has_mtp ? mtp_bytes : 0);
}

absl::StatusOr<std::unique_ptr<KvStore>> KvStore::Create(const ModelConfig& config, const KvOptions& options,
                                                         int num_blocks, Device& device) {
  std::unique_ptr<KvStore> store(new KvStore(num_blocks));
  absl::Status status;
  const auto make = [&](DType dtype, std::initializer_list<int64_t> dims) {
    Tensor tensor(nullptr, dtype, dims);
    auto buffer = device.Allocate(tensor.num_bytes(), Device::Memory::kDevice);
    status.Update(buffer.status());
    if (!buffer.ok()) return tensor;
    tensor.data = buffer->data();
    store->buffers_.push_back(*std::move(buffer));
    return tensor;
  };
  const auto make_layer = [&] {
    return KvCache{make(DType::kU8, {num_blocks, kBlockTokens, TokenBytes(config, options)}), options.dtype};
  };
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) store->layers_.push_back(make_layer());
  if (options.has_mtp) {
    store->mtp_ = make_layer();
    store->borders_ = make(options.value_dtype, {num_blocks, config.hidden_size});
  }
  if (!status.ok()) return status;
  return store;
}

std::vector<Tensor> KvStore::Block(int32_t block) const {
  std::vector<Tensor> parts;
  for (const KvCache& layer : layers_) parts.push_back(layer.blocks.Rows(block, 1));
  if (borders_.empty()) return parts;
  parts.push_back(mtp_.blocks.Rows(block, 1));
  parts.push_back(borders_.Rows(block, 1));
  return parts;
}

}  // namespace cachalot
