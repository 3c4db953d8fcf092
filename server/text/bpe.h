// Byte-pair encoding of one piece of text.
#ifndef CACHALOT_SERVER_TEXT_BPE_H_
#define CACHALOT_SERVER_TEXT_BPE_H_

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace cachalot {

// One rule: two neighbours become one token.
struct BpeMerge {
  int32_t left, right, result;
};

// Starts from one token a byte and applies, while any applies, the earliest rule in the list at its
// leftmost place. Immutable; const methods may be called from any thread.
class Bpe {
 public:
  // Working memory. One call of Encode at a time may use it.
  class Scratch {
   public:
    // Gives back what a long piece needed.
    void Trim() {
      if (symbols.capacity() > kKeptSymbols) *this = Scratch();
    }

   private:
    friend class Bpe;
    static constexpr size_t kKeptSymbols = size_t{1} << 16;
    struct Symbol {
      int32_t id;  // -1 once merged into the symbol before it
      int32_t previous, next;
    };
    std::vector<Symbol> symbols;
    std::vector<uint64_t> heap;  // rank << 32 | position, smallest on top
  };

  // Longest piece that Encode may be given.
  static constexpr size_t kMaxPieceBytes = size_t{1} << 30;

  // `byte_ids` is the token of each single byte; `merges` are in order of rank. InvalidArgumentError if
  // a pair has two rules.
  static absl::StatusOr<Bpe> Create(const std::array<int32_t, 256>& byte_ids, std::vector<BpeMerge> merges);

  // Appends the tokens of `piece` to `ids`, in O(n log n) for n bytes, n <= kMaxPieceBytes.
  void Encode(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const;

 private:
  Bpe() = default;
  int32_t RankOf(int32_t left, int32_t right) const;             // kNoRank when there is no rule
  int32_t RankOfBytes(std::string_view piece, size_t at) const;  // of the bytes at and at + 1
  void EncodeShort(std::string_view piece, std::vector<int32_t>* ids) const;
  void EncodeLong(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<int32_t> byte_pair_ranks_;  // [256,256] by bytes, for the start
  std::vector<BpeMerge> merges_;
  absl::flat_hash_map<uint64_t, int32_t> ranks_;  // left << 32 | right
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_TEXT_BPE_H_
