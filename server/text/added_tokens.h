// Finds added tokens (such as "<｜User｜>") in text.
#ifndef CACHALOT_SERVER_TEXT_ADDED_TOKENS_H_
#define CACHALOT_SERVER_TEXT_ADDED_TOKENS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace cachalot {

// A set of strings, searched leftmost first and longest at equal start. Const methods may be called from
// any thread.
class AddedTokenMatcher {
 public:
  struct Match {
    size_t begin, end;
    int32_t id;
  };

  // Adds `content` (not empty), to be reported as `id` (not negative).
  void Add(std::string_view content, int32_t id);

  // The first match in `text` that starts at `from` or later.
  std::optional<Match> Find(std::string_view text, size_t from) const;

 private:
  // A trie of bytes; node 0 is the root.
  static uint64_t Edge(int32_t node, char byte) {
    return uint64_t{static_cast<uint32_t>(node)} << 8 | static_cast<uint8_t>(byte);
  }
  size_t FindStart(std::string_view text, size_t from) const;

  absl::flat_hash_map<uint64_t, int32_t> children_;
  std::vector<int32_t> ids_ = {-1};  // [node], -1 where no token ends
  std::string first_bytes_;          // the distinct ones
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_ADDED_TOKENS_H_
