// Added-token search: candidates by first byte, then a walk down a trie.
#include "server/text/added_tokens.h"

namespace cachalot {

void AddedTokenMatcher::Add(std::string_view content, int32_t id) {
  if (first_bytes_.find(content[0]) == std::string::npos) first_bytes_.push_back(content[0]);
  int32_t node = 0;
  for (const char byte : content) {
    const auto [edge, is_new] = children_.try_emplace(Edge(node, byte), static_cast<int32_t>(ids_.size()));
    if (is_new) ids_.push_back(-1);
    node = edge->second;
  }
  ids_[node] = id;
}

std::optional<AddedTokenMatcher::Match> AddedTokenMatcher::Find(std::string_view text, size_t from) const {
  for (size_t begin = FindStart(text, from); begin < text.size(); begin = FindStart(text, begin + 1)) {
    std::optional<Match> longest;
    int32_t node = 0;
    for (size_t end = begin; end < text.size();) {
      const auto edge = children_.find(Edge(node, text[end++]));
      if (edge == children_.end()) break;
      node = edge->second;
      if (ids_[node] >= 0) longest = Match{begin, end, ids_[node]};
    }
    if (longest.has_value()) return longest;
  }
  return std::nullopt;
}

// The first place at `from` or later with a token's first byte, or text.size() when there is none.
size_t AddedTokenMatcher::FindStart(std::string_view text, size_t from) const {
  // NOTE: all of a model's added tokens start with '<', as a rule, and one byte is found by memchr.
  const size_t at =
      first_bytes_.size() == 1 ? text.find(first_bytes_[0], from) : text.find_first_of(first_bytes_, from);
  return at == std::string_view::npos ? text.size() : at;
}

}  // namespace cachalot
