// LongChunks: which of a step's prefill chunks are so long that a backend may attend to them in a form of its own.
#ifndef CACHALOT_KERNELS_LONG_CHUNKS_H_
#define CACHALOT_KERNELS_LONG_CHUNKS_H_

#include <cstdint>
#include <utility>

namespace cachalot {

inline constexpr int kLongChunkKeys = 128;  // a chunk's keys are counted in tiles of so many

// Known to the host before the step, and part of its shape: what is launched may depend on it.
struct LongChunks {
  int32_t min_rows = 0;    // a sequence of a step with so many rows or more is one; 0: there is none
  int32_t first_row = 0;   // of the first of them
  int32_t other_rows = 0;  // that all other sequences' rows are among: [0, other_rows)
  int64_t num_keys = 0;    // that they see together, in whole tiles

  friend bool operator==(const LongChunks&, const LongChunks&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const LongChunks& c) {
    return H::combine(std::move(h), c.min_rows, c.first_row, c.other_rows, c.num_keys);
  }
};

// Finds them among sequences that are added in the step's order.
class LongChunkFinder {
 public:
  // min_rows: more than a decode sequence has.
  explicit LongChunkFinder(int32_t min_rows) : min_rows_(min_rows) {}

  void Add(int32_t start, int32_t num_rows) {  // start: position of the first row; not asked for where it is no chunk
    if (num_rows >= min_rows_) {
      if (found_.min_rows == 0) found_.first_row = next_row_;
      found_.min_rows = min_rows_;
      found_.num_keys +=
          (static_cast<int64_t>(start) + num_rows + kLongChunkKeys - 1) / kLongChunkKeys * kLongChunkKeys;
    }
    next_row_ += num_rows;
    if (num_rows < min_rows_) other_rows_ = next_row_;
  }

  LongChunks found() const {
    LongChunks found = found_;
    if (found.min_rows > 0) found.other_rows = other_rows_;
    return found;
  }

 private:
  const int32_t min_rows_;
  int32_t next_row_ = 0, other_rows_ = 0;
  LongChunks found_;
};

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_LONG_CHUNKS_H_
