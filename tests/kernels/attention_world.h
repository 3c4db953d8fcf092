// Sequences in a paged latent cache, and MlaAttention over them against double precision.
#ifndef CACHALOT_TESTS_KERNELS_ATTENTION_WORLD_H_
#define CACHALOT_TESTS_KERNELS_ATTENTION_WORLD_H_

#include <limits>
#include <memory>
#include <vector>

#include "tests/kernels/testing.h"

namespace cachalot::testing {

struct AttentionDims {
  int64_t heads, nope, rope, value, latent;
};

// Rows of one slot at consecutive positions.
struct Chunk {
  int32_t slot;
  int32_t start;
  int32_t count;
  bool is_decode = false;  // as StepInput tells them apart
};

std::vector<int64_t> AllRows(int64_t n);

// A cache with sequences in scattered pages, NaN wherever nothing was written, and queries that are a function of slot
// and position alone.
class AttentionWorld {
 public:
  AttentionWorld(const AttentionDims& dims, KvDType kv_dtype, DType weight_dtype, int64_t num_slots,
                 int64_t max_context, ActivationFormat format = ActivationFormat::kF32, int num_threads = 2);

  void UseThreads(int num_threads);
  void UseExact();           // BackendOptions
  bool UseGpu(int ordinal);  // whether there is one
  void UseGpuOracle();       // the CPU backend that rounds and sums as the GPU

  // Attention leaves keys at positions below it out; Write does too.
  void HideKeysBelow(int first_key) { first_key_ = first_key; }
  // Sequences of so many rows are told to the backend as long chunks from here on.
  void UseLongChunks(int32_t min_rows) { long_chunk_rows_ = min_rows; }

  // Writes random entries at positions [0, count) of a slot.
  void Write(int32_t slot, int64_t count);
  // Writes an entry with `scale` times larger values: one that a softmax over many keys hears.
  void WriteLarge(int32_t slot, int64_t position, double scale);

  Owned Queries(const std::vector<Chunk>& chunks, DType dtype = DType::kF32) const;
  OwnedActivation Attend(const std::vector<Chunk>& chunks, DType q_dtype = DType::kF32);

  // One row in double precision: softmax over all keys at once, keys and values expanded only as far as cheap.
  std::vector<double> Reference(int32_t slot, int32_t position, const std::vector<double>& q) const;

  // Rows of `chunks` that are worth a look against the reference; the others cost too much.
  void Check(const std::vector<Chunk>& chunks, const std::vector<int64_t>& rows, DType q_dtype = DType::kF32);

 private:
  void Use(std::unique_ptr<Backend> backend);
  uint8_t* Entry(int32_t slot, int64_t position) const;
  void WriteEntry(uint8_t* entry, const float* values) const;
  std::vector<double> ReadEntry(uint8_t* entry) const;
  const std::vector<double>& KvB() const;
  std::vector<double> Absorbed(int64_t head, const std::vector<double>& q, int32_t position) const;
  ::testing::AssertionResult IsClose(const std::vector<double>& got, const std::vector<double>& want) const;
  bool RoundsAsGpu() const { return TestsOnGpu() || options_.value_dtype == DType::kBF16; }

  AttentionDims dims_;
  Random random_;
  OwnedWeight kv_b_;
  int64_t pages_;
  int first_key_ = 0;
  Owned blocks_, table_, rope_;
  BackendOptions options_;
  int32_t long_chunk_rows_ = std::numeric_limits<int32_t>::max();
  KvCache cache_;
  SlotState state_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Weight> kv_up_;
  mutable std::vector<double> kv_b_values_;
};

}  // namespace cachalot::testing

#endif  // CACHALOT_TESTS_KERNELS_ATTENTION_WORLD_H_
