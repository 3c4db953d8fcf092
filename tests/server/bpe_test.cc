// Byte-pair encoding against its definition.
#include "server/text/bpe.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

namespace cachalot {
namespace {

// Tokens of `piece` by the definition: the best rule, applied until none is left.
std::vector<int32_t> NaiveBpe(const std::vector<BpeMerge>& merges, std::string_view piece) {
  std::vector<int32_t> ids;
  for (const char byte : piece) ids.push_back(static_cast<uint8_t>(byte));
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      if (ids[i] != merges[rank].left || ids[i + 1] != merges[rank].right) continue;
      ids[i] = merges[rank].result;
      ids.erase(ids.begin() + i + 1);
      rank = -1;  // a better rule may apply now
      break;
    }
  }
  return ids;
}

TEST(BpeTest, EqualsTheDefinitionAtEachLength) {
  std::mt19937 random(2);
  std::array<int32_t, 256> byte_ids;
  for (int byte = 0; byte < 256; ++byte) byte_ids[byte] = byte;
  Bpe::Scratch scratch;
  for (int round = 0; round < 20; ++round) {
    // Rules over few letters, so that they overlap.
    std::vector<BpeMerge> merges;
    std::set<std::pair<int32_t, int32_t>> pairs;
    for (int32_t id = 256; id < 290; ++id) {
      const auto pick = [&] {
        return random() % 3 == 0 && id > 256 ? 256 + random() % (id - 256) : 'a' + random() % 3;
      };
      const BpeMerge merge = {static_cast<int32_t>(pick()), static_cast<int32_t>(pick()), id};
      if (pairs.emplace(merge.left, merge.right).second) merges.push_back(merge);
    }
    const absl::StatusOr<Bpe> bpe = Bpe::Create(byte_ids, merges);
    ASSERT_TRUE(bpe.ok()) << bpe.status();
    for (size_t length = 0; length < 120; ++length) {
      std::string piece;
      for (size_t i = 0; i < length; ++i) piece.push_back(static_cast<char>('a' + random() % 3));
      std::vector<int32_t> ids = {-7};
      bpe->Encode(piece, &scratch, &ids);
      ids.erase(ids.begin());
      ASSERT_EQ(ids, NaiveBpe(merges, piece)) << piece;
    }
  }
}

}  // namespace
}  // namespace cachalot
