// A small cache of the tokens of words, of fixed size.
#ifndef CACHALOT_SERVER_TEXT_WORD_CACHE_H_
#define CACHALOT_SERVER_TEXT_WORD_CACHE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace cachalot {

// Direct-mapped: a word has one place, and the latest word there stays. Takes 1 MiB. For one thread at a
// time.
class WordCache {
 public:
  // Appends the tokens of `word` to `ids` and returns true, if they are here.
  bool Find(std::string_view word, std::vector<int32_t>* ids) const {
    if (word.size() > kMaxBytes) return false;
    const Entry& entry = entries_[Place(word)];
    if (entry.num_bytes != word.size() || std::memcmp(entry.bytes, word.data(), word.size()) != 0) {
      return false;
    }
    ids->insert(ids->end(), entry.ids, entry.ids + entry.num_ids);
    return true;
  }

  // Keeps the tokens of `word`, not empty, unless it or they are too long.
  void Insert(std::string_view word, std::span<const int32_t> ids) {
    if (word.size() > kMaxBytes || ids.size() > kMaxIds) return;
    Entry& entry = entries_[Place(word)];
    entry.num_bytes = static_cast<uint8_t>(word.size());
    entry.num_ids = static_cast<uint8_t>(ids.size());
    std::copy(word.begin(), word.end(), entry.bytes);
    std::copy(ids.begin(), ids.end(), entry.ids);
  }

 private:
  static constexpr size_t kMaxBytes = 30;
  static constexpr size_t kMaxIds = 8;
  static constexpr int kPlaceBits = 14;

  struct Entry {
    uint8_t num_bytes = 0;  // 0: empty
    uint8_t num_ids = 0;
    char bytes[kMaxBytes];
    int32_t ids[kMaxIds];
  };
  static_assert(sizeof(Entry) == 64, "an entry is a cache line");

  // A multiplicative hash: neighbours in a place cost a recomputation, no more.
  static size_t Place(std::string_view word) {
    constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
    uint64_t hash = word.size();
    for (; word.size() >= sizeof(uint64_t); word.remove_prefix(sizeof(uint64_t))) {
      uint64_t chunk;
      std::memcpy(&chunk, word.data(), sizeof(chunk));
      hash = (hash ^ chunk) * kMultiplier;
      hash ^= hash >> 32;
    }
    uint64_t chunk = 0;
    for (const char byte : word) chunk = chunk << 8 | static_cast<uint8_t>(byte);
    return (hash ^ chunk) * kMultiplier >> (64 - kPlaceBits);
  }

  std::vector<Entry> entries_ = std::vector<Entry>(size_t{1} << kPlaceBits);
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_WORD_CACHE_H_
