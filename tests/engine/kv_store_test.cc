// KvStore: what a block is made of, with and without an MTP layer.
#include "engine/model/kv_store.h"

#include <gtest/gtest.h>

#include <set>

#include "kernels/backend.h"
#include "tests/engine/checkpoint_writer.h"

namespace cachalot {
namespace {

class KvStoreTest : public testing::TestWithParam<bool> {
 protected:
  KvStoreTest() : config_(ParseConfig(TinyConfig())) {
    BackendOptions options;
    options.device = "cpu";
    options.limits = config_.op_limits();
    backend_ = *MakeBackend(options);
  }
  const ModelConfig config_;
  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(WithMtpOrNot, KvStoreTest, testing::Bool());

TEST_P(KvStoreTest, ABlockIsAllThatItsTokensLeaveBehind) {
  for (KvDType dtype : {KvDType::kF32, KvDType::kBF16, KvDType::kFP8}) {
    const KvOptions options = {dtype, GetParam(), DType::kBF16};
    const auto made = KvStore::Create(config_, options, 5, backend_->device());
    ASSERT_TRUE(made.ok()) << made.status();
    const KvStore& store = **made;
    EXPECT_EQ(store.num_blocks(), 5);
    EXPECT_EQ(store.borders().empty(), !GetParam());
    EXPECT_EQ(store.mtp().blocks.empty(), !GetParam());

    std::set<const void*> places;
    for (int32_t block = 0; block < 5; ++block) {
      const std::vector<Tensor> parts = store.Block(block);
      ASSERT_EQ(parts.size(), config_.num_hidden_layers + (GetParam() ? 2u : 0u));
      int64_t bytes = 0;
      for (const Tensor& part : parts) {
        EXPECT_TRUE(part.is_contiguous());
        bytes += part.num_bytes();
        EXPECT_TRUE(places.insert(part.data).second);
      }
      EXPECT_EQ(bytes, KvStore::BlockBytes(config_, options));
      for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
        EXPECT_EQ(parts[layer].data, store.layer(layer).blocks.row<uint8_t>(block));
      }
      if (!GetParam()) continue;
      EXPECT_EQ(parts[parts.size() - 2].data, store.mtp().blocks.row<uint8_t>(block));
      EXPECT_EQ(parts.back().data, store.borders().row<uint16_t>(block));
    }
  }
}

}  // namespace
}  // namespace cachalot
