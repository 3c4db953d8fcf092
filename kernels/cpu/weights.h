// What the CPU backend makes of checkpoint tensors: views of the mapping, cut into blocks of rows with one scale row.
#ifndef CACHALOT_KERNELS_CPU_WEIGHTS_H_
#define CACHALOT_KERNELS_CPU_WEIGHTS_H_

#include <memory>
#include <utility>
#include <vector>

#include "kernels/ops_types.h"

namespace cachalot {

// Up to 128 consecutive rows of a weight that share a row of scales. Nothing is aligned: files are not.
struct RowBlock {
  const uint8_t* data = nullptr;    // first row
  const uint8_t* scales = nullptr;  // f32, one per 128 columns, for f8e4m3; else null
  int64_t row_bytes = 0;            // from row to row
  int64_t first_row = 0;            // in the stacked weight
  int32_t num_rows = 0;
  DType dtype = DType::kF32;

  RowBlock Rows(int64_t begin, int64_t count) const {
    RowBlock block = *this;
    block.data += begin * row_bytes;
    block.first_row += begin;
    block.num_rows = static_cast<int32_t>(count);
    return block;
  }
};

// The blocks of rows [row_begin, row_begin + num_rows) of a part, as rows first_row... of a stacked weight.
void AppendRowBlocks(const WeightPart& part, int64_t row_begin, int64_t num_rows, int64_t first_row,
                     std::vector<RowBlock>* blocks);

class CpuVector : public Weight {
 public:
  explicit CpuVector(const Tensor& source);
  const float* values() const { return values_.data(); }

 private:
  std::vector<float> values_;
};

class CpuLinear : public Weight {
 public:
  explicit CpuLinear(const std::vector<WeightPart>& row_stacked);
  const std::vector<RowBlock>& blocks() const { return blocks_; }
  const RowBlock& BlockOf(int64_t row) const;  // the block that holds it

 private:
  std::vector<RowBlock> blocks_;  // by first_row
};

class CpuExperts : public Weight {
 public:
  explicit CpuExperts(std::vector<std::unique_ptr<CpuLinear>> slots);
  int num_slots() const { return static_cast<int>(slots_.size()); }
  const CpuLinear& slot(int g) const { return *slots_[g]; }

 private:
  std::vector<std::unique_ptr<CpuLinear>> slots_;
};

// kv_b_proj by head: N rows of W_UK, then V rows of W_UV.
class CpuKvUp : public Weight {
 public:
  // `round_to_bf16` keeps a dequantised bf16 copy, as the GPU does: its oracle wants the same numbers. `transpose`
  // keeps W_UK's columns as rows too.
  CpuKvUp(const WeightPart& kv_b, int num_heads, int nope_dim, int v_dim, bool round_to_bf16, bool transpose);
  int num_heads() const { return num_heads_; }
  int nope_dim() const { return nope_dim_; }
  int v_dim() const { return v_dim_; }
  const std::vector<RowBlock>& w_uk(int head) const { return w_uk_[head]; }           // first_row: 0..N of the head
  const std::vector<RowBlock>& w_uv(int head) const { return w_uv_[head]; }           // first_row: 0..V of the head
  const RowBlock& w_uk_transposed(int head) const { return w_uk_transposed_[head]; }  // [C,N] bf16

 private:
  int num_heads_, nope_dim_, v_dim_;
  std::vector<uint16_t> bf16_, transposed_;
  std::vector<std::vector<RowBlock>> w_uk_, w_uv_;
  std::vector<RowBlock> w_uk_transposed_;
};

// One element of a stored weight, dequantised. Slow: for vectors and copies made at start.
float StoredValue(const WeightPart& part, int64_t row, int64_t col);

}  // namespace cachalot

#endif  // CACHALOT_KERNELS_CPU_WEIGHTS_H_
