// Byte-pair encoding: a scan for short pieces, a linked list and a heap for long ones.
#include "server/text/bpe.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();

// Up to here the quadratic scan is faster than the heap, and it needs no scratch.
constexpr size_t kMaxShortPiece = 24;

uint64_t PairKey(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

absl::StatusOr<Bpe> Bpe::Create(const std::array<int32_t, 256>& byte_ids, std::vector<BpeMerge> merges) {
  Bpe bpe;
  bpe.byte_ids_ = byte_ids;
  bpe.merges_ = std::move(merges);
  bpe.ranks_.reserve(bpe.merges_.size());
  for (size_t rank = 0; rank < bpe.merges_.size(); ++rank) {
    const BpeMerge& merge = bpe.merges_[rank];
    const auto [existing, is_new] =
        bpe.ranks_.try_emplace(PairKey(merge.left, merge.right), static_cast<int32_t>(rank));
    if (!is_new) {
      return absl::InvalidArgumentError(
          absl::StrCat("merges ", existing->second, " and ", rank, " join the same pair"));
    }
  }
  bpe.byte_pair_ranks_.resize(256 * 256);
  for (int pair = 0; pair < 256 * 256; ++pair) {
    bpe.byte_pair_ranks_[pair] = bpe.RankOf(byte_ids[pair >> 8], byte_ids[pair & 0xFF]);
  }
  return bpe;
}

void Bpe::Encode(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const {
  if (piece.size() <= kMaxShortPiece) {
    EncodeShort(piece, ids);
  } else {
    EncodeLong(piece, scratch, ids);
  }
}

int32_t Bpe::RankOfBytes(std::string_view piece, size_t at) const {
  return byte_pair_ranks_[static_cast<uint8_t>(piece[at]) << 8 | static_cast<uint8_t>(piece[at + 1])];
}

int32_t Bpe::RankOf(int32_t left, int32_t right) const {
  const auto found = ranks_.find(PairKey(left, right));
  return found == ranks_.end() ? kNoRank : found->second;
}

void Bpe::EncodeShort(std::string_view piece, std::vector<int32_t>* ids) const {
  int32_t tokens[kMaxShortPiece];
  int32_t ranks[kMaxShortPiece];  // of the pair (i, i + 1); kNoRank for the last token
  size_t num_tokens = piece.size();
  if (num_tokens == 0) return;
  for (size_t i = 0; i < num_tokens; ++i) tokens[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i + 1 < num_tokens; ++i) ranks[i] = RankOfBytes(piece, i);
  ranks[num_tokens - 1] = kNoRank;
  while (true) {
    const size_t at = std::min_element(ranks, ranks + num_tokens) - ranks;
    if (ranks[at] == kNoRank) break;
    tokens[at] = merges_[ranks[at]].result;
    std::copy(tokens + at + 2, tokens + num_tokens, tokens + at + 1);
    std::copy(ranks + at + 1, ranks + num_tokens, ranks + at);
    --num_tokens;
    if (at > 0) ranks[at - 1] = RankOf(tokens[at - 1], tokens[at]);
    if (at + 1 < num_tokens) ranks[at] = RankOf(tokens[at], tokens[at + 1]);
  }
  ids->insert(ids->end(), tokens, tokens + num_tokens);
}

void Bpe::EncodeLong(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const {
  std::vector<Scratch::Symbol>& symbols = scratch->symbols;
  std::vector<uint64_t>& heap = scratch->heap;
  const int32_t num_bytes = static_cast<int32_t>(piece.size());
  symbols.clear();
  heap.clear();
  const auto push = [&](int32_t at) {
    const int32_t next = symbols[at].next;
    if (next == num_bytes) return;
    const int32_t rank = RankOf(symbols[at].id, symbols[next].id);
    if (rank == kNoRank) return;
    heap.push_back(PairKey(rank, at));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };

  for (int32_t i = 0; i < num_bytes; ++i) {
    symbols.push_back({byte_ids_[static_cast<uint8_t>(piece[i])], i - 1, i + 1});
  }
  for (int32_t i = 0; i + 1 < num_bytes; ++i) {
    if (const int32_t rank = RankOfBytes(piece, i); rank != kNoRank) heap.push_back(PairKey(rank, i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const BpeMerge& merge = merges_[heap.back() >> 32];
    const int32_t at = static_cast<int32_t>(heap.back() & 0xFFFFFFFFu);
    heap.pop_back();
    // An entry is stale once either of its tokens has changed.
    const int32_t next = symbols[at].next;
    if (symbols[at].id != merge.left || next == num_bytes || symbols[next].id != merge.right) continue;
    symbols[at] = {merge.result, symbols[at].previous, symbols[next].next};
    symbols[next].id = -1;
    if (symbols[at].next != num_bytes) symbols[symbols[at].next].previous = at;
    push(at);
    if (at > 0) push(symbols[at].previous);
  }
  for (int32_t i = 0; i < num_bytes; i = symbols[i].next) ids->push_back(symbols[i].id);
}

}  // namespace cachalot
