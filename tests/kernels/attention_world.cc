// Sequences in a paged latent cache, and MlaAttention over them against double precision.
#include "tests/kernels/attention_world.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/cpu/quantize.h"

namespace cachalot::testing {
namespace {

constexpr float kScale = 0.1352337789f;

BackendOptions OptionsOf(const AttentionDims& dims, int64_t max_context, ActivationFormat format, int num_threads) {
  BackendOptions options = CpuOptions(num_threads);
  options.activation = format;
  if (!TestsOnGpu()) return options;
  // A GPU's kernels and workspace are made for the model's own dimensions.
  OpLimits& limits = options.limits;
  limits.num_heads = static_cast<int>(dims.heads);
  limits.qk_nope_head_dim = static_cast<int>(dims.nope);
  limits.qk_rope_head_dim = static_cast<int>(dims.rope);
  limits.v_head_dim = static_cast<int>(dims.value);
  limits.kv_lora_rank = static_cast<int>(dims.latent);
  limits.max_context = static_cast<int>(max_context);
  return options;
}

// A step's input for rows that are there already. NOTE: memory is the caller's.
struct InputMemory {
  Owned slot, start, query_start, params, tokens;
  StepInput input;

  InputMemory(const std::vector<Chunk>& chunks, int32_t long_chunk_rows) {
    std::vector<int32_t> slots, starts, begins = {0};
    LongChunkFinder long_chunks(long_chunk_rows);
    for (const Chunk& chunk : chunks) {
      long_chunks.Add(chunk.start, chunk.count);
      slots.push_back(chunk.slot);
      starts.push_back(chunk.is_decode ? -1 : chunk.start);
      begins.push_back(begins.back() + chunk.count);
    }
    const int64_t n = static_cast<int64_t>(chunks.size());
    slot = Owned(DType::kI32, {n}).Set(slots);
    start = Owned(DType::kI32, {n}).Set(starts);
    query_start = Owned(DType::kI32, {n + 1}).Set(begins);
    params = Owned(DType::kU8, {n, sizeof(SlotParams)});
    tokens = Owned(DType::kI32, {begins.back()});
    input = {slot, start, query_start, params, tokens, Tensor(), Tensor(), Tensor(), long_chunks.found()};
  }
};

}  // namespace

std::vector<int64_t> AllRows(int64_t n) {
  std::vector<int64_t> rows(n);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

AttentionWorld::AttentionWorld(const AttentionDims& dims, KvDType kv_dtype, DType weight_dtype, int64_t num_slots,
                               int64_t max_context, ActivationFormat format, int num_threads)
    : dims_(dims),
      random_(dims.heads * 1000 + dims.latent),
      kv_b_(weight_dtype, dims.heads * (dims.nope + dims.value), dims.latent, random_),
      pages_((max_context + kBlockTokens - 1) / kBlockTokens),
      blocks_(DType::kU8, {num_slots * pages_ + 1, kBlockTokens, KvTokenBytes(kv_dtype, dims.latent, dims.rope)}),
      table_(DType::kI32, {num_slots, pages_}),
      rope_(MakeRopeTable(max_context, dims.rope)),
      options_(OptionsOf(dims, max_context, format, num_threads)) {
  cache_ = {blocks_, kv_dtype};
  std::vector<int32_t> ids(num_slots * pages_);
  std::iota(ids.begin(), ids.end(), 1);
  for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[random_.Below(static_cast<int>(i))]);
  state_.block_table = table_.Set(ids);
  UseThreads(num_threads);
}

void AttentionWorld::UseThreads(int num_threads) {
  options_.num_threads = num_threads;
  Use(MakeTestBackend(options_));
}

void AttentionWorld::UseExact() {
  options_.is_exact = true;
  Use(MakeTestBackend(options_));
}

bool AttentionWorld::UseGpu(int ordinal) {
  BackendOptions options = options_;
  options.device = "cuda";
  options.ordinal = ordinal;
  if (const auto backend = MakeBackend(options); absl::IsNotFound(backend.status())) return false;
  options_.ordinal = ordinal;
  Use(MakeTestBackend(options_));
  return true;
}

void AttentionWorld::UseGpuOracle() {
  options_.device = "cpu";
  options_.value_dtype = DType::kBF16;
  Use(*MakeBackend(options_));
}

void AttentionWorld::Use(std::unique_ptr<Backend> backend) {
  kv_up_.reset();
  backend_ = std::move(backend);
  kv_up_ = backend_->ops().MakeKvUp(kv_b_.part(), static_cast<int>(dims_.heads), static_cast<int>(dims_.nope),
                                    static_cast<int>(dims_.value));
}

void AttentionWorld::Write(int32_t slot, int64_t count) {
  for (int64_t p = first_key_; p < count; ++p) {
    Owned values(DType::kF32, {1, dims_.latent + dims_.rope});
    values.FillNormal(random_, p % 7 == 0 ? 1.5 : 0.7);
    WriteEntry(Entry(slot, p), values.data<float>());
  }
}

void AttentionWorld::WriteLarge(int32_t slot, int64_t position, double scale) {
  Owned values(DType::kF32, {1, dims_.latent + dims_.rope});
  values.FillNormal(random_, 0.7 * scale);
  WriteEntry(Entry(slot, position), values.data<float>());
}

Owned AttentionWorld::Queries(const std::vector<Chunk>& chunks, DType dtype) const {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks) rows += chunk.count;
  const int64_t width = dims_.heads * (dims_.nope + dims_.rope);
  std::vector<double> values;
  for (const Chunk& chunk : chunks) {
    for (int32_t i = 0; i < chunk.count; ++i) {
      Random random(chunk.slot * 1000003 + chunk.start + i + 17);
      for (int64_t j = 0; j < width; ++j) values.push_back(0.8 * random.Normal());
    }
  }
  Owned q(dtype, {rows, width});
  q.Fill(values);
  return q;
}

OwnedActivation AttentionWorld::Attend(const std::vector<Chunk>& chunks, DType q_dtype) {
  const Owned q = Queries(chunks, q_dtype);
  std::vector<int32_t> slots, positions;
  for (const Chunk& chunk : chunks) {
    for (int32_t i = 0; i < chunk.count; ++i) {
      slots.push_back(chunk.slot);
      positions.push_back(chunk.slot < 0 ? 0 : chunk.start + i);
    }
  }
  const int64_t rows = static_cast<int64_t>(slots.size());
  Owned slot_rows(DType::kI32, {rows}), position_rows(DType::kI32, {rows});
  OwnedActivation out(options_.activation, rows, dims_.heads * dims_.value);
  const InputMemory memory(chunks, long_chunk_rows_);
  backend_->ops().MlaAttention(out.view(), q, *kv_up_, cache_, state_, memory.input,
                               StepRows{Tensor(), position_rows.Set(positions), slot_rows.Set(slots)}, RopeTable{rope_},
                               kScale, first_key_);
  return out;
}

// A head's query against cache entries: W_UK taken in, the last part rotated.
std::vector<double> AttentionWorld::Absorbed(int64_t head, const std::vector<double>& q, int32_t position) const {
  const auto [heads, nope, rope, value, latent] = dims_;
  const double* qh = q.data() + head * (nope + rope);
  const double* wh = KvB().data() + head * (nope + value) * latent;
  std::vector<double> query(latent + rope, 0.0);
  for (int64_t n = 0; n < nope; ++n) {
    for (int64_t c = 0; c < latent; ++c) query[c] += qh[n] * wh[n * latent + c];
  }
  for (int64_t i = 0; i < rope / 2; ++i) {
    const double cos = Element(rope_, position, i), sin = Element(rope_, position, rope / 2 + i);
    const double even = qh[nope + 2 * i], odd = qh[nope + 2 * i + 1];
    query[latent + 2 * i] = even * cos - odd * sin;
    query[latent + 2 * i + 1] = even * sin + odd * cos;
  }
  return query;
}

// NOTE: entries are read twice rather than kept: at the longest context they would take a gigabyte.
std::vector<double> AttentionWorld::Reference(int32_t slot, int32_t position, const std::vector<double>& q) const {
  const auto [heads, nope, rope, value, latent] = dims_;
  const int64_t width = latent + rope, num_keys = position + 1;
  std::vector<std::vector<double>> queries, scores(heads, std::vector<double>(num_keys, -INFINITY));
  for (int64_t h = 0; h < heads; ++h) queries.push_back(Absorbed(h, q, position));
  for (int64_t p = first_key_; p < num_keys; ++p) {
    const std::vector<double> entry = ReadEntry(Entry(slot, p));
    for (int64_t h = 0; h < heads; ++h) {
      double sum = 0;
      for (int64_t c = 0; c < width; ++c) sum += queries[h][c] * entry[c];
      scores[h][p] = sum * kScale;
    }
  }
  std::vector<double> sums(heads, 0.0), maxima;
  for (int64_t h = 0; h < heads; ++h) maxima.push_back(*std::max_element(scores[h].begin(), scores[h].end()));
  std::vector<std::vector<double>> means(heads, std::vector<double>(latent, 0.0));
  for (int64_t p = first_key_; p < num_keys; ++p) {
    const std::vector<double> entry = ReadEntry(Entry(slot, p));
    for (int64_t h = 0; h < heads; ++h) {
      const double e = std::exp(scores[h][p] - maxima[h]);
      sums[h] += e;
      for (int64_t c = 0; c < latent; ++c) means[h][c] += e * entry[c];
    }
  }
  std::vector<double> out(heads * value);
  for (int64_t h = 0; h < heads; ++h) {
    const double* wh = KvB().data() + h * (nope + value) * latent;
    for (int64_t v = 0; v < value; ++v) {
      for (int64_t c = 0; c < latent; ++c) out[h * value + v] += means[h][c] / sums[h] * wh[(nope + v) * latent + c];
    }
  }
  return out;
}

// NOTE: a GPU keeps absorbed queries, keys of the fp8 cache, probabilities and latent means in bf16: each rounds by up
// to 2^-9, a few planted large keys make much of it, and a few fp8 values fall to a neighbour.
::testing::AssertionResult AttentionWorld::IsClose(const std::vector<double>& got,
                                                   const std::vector<double>& want) const {
  if (options_.activation == ActivationFormat::kFP8) {
    return Close(got, ThroughFp8(want, ScaleRule::kFP32), RoundsAsGpu() ? 1.5e-3 : 1e-4, 0.13);
  }
  if (RoundsAsGpu()) return Close(got, want, 7e-5, 0.1);
  return options_.activation == ActivationFormat::kBF16 ? CloseBf16(got, want) : CloseF32(got, want);
}

void AttentionWorld::Check(const std::vector<Chunk>& chunks, const std::vector<int64_t>& rows, DType q_dtype) {
  const OwnedActivation out = Attend(chunks, q_dtype);
  const std::vector<double> got = Values(out.view()), q = Values(Queries(chunks, q_dtype));
  const int64_t out_width = dims_.heads * dims_.value, q_width = dims_.heads * (dims_.nope + dims_.rope);
  for (int64_t row : rows) {
    int64_t first = 0;
    size_t i = 0;
    while (row >= first + chunks[i].count) first += chunks[i++].count;
    const int32_t position = chunks[i].start + static_cast<int32_t>(row - first);
    const std::vector<double> want =
        Reference(chunks[i].slot, position, {q.begin() + row * q_width, q.begin() + (row + 1) * q_width});
    const std::vector<double> found(got.begin() + row * out_width, got.begin() + (row + 1) * out_width);
    EXPECT_TRUE(IsClose(found, want)) << "row " << row << " at position " << position;
  }
}

uint8_t* AttentionWorld::Entry(int32_t slot, int64_t position) const {
  const int64_t block = table_->row<int32_t>(slot)[position / kBlockTokens];
  return blocks_->row<uint8_t>(block) + position % kBlockTokens * blocks_->dim(2);
}

// Scalar and by the layout's definition (ops_types.h): the verb that writes entries has tests of its own.
void AttentionWorld::WriteEntry(uint8_t* entry, const float* values) const {
  const int64_t latent = dims_.latent, groups = (latent + kQuantGroup - 1) / kQuantGroup;
  for (int64_t i = 0; i < latent + dims_.rope; ++i) {
    const uint16_t bits = FloatToBf16(values[i]);
    if (cache_.dtype == KvDType::kF32) std::memcpy(entry + 4 * i, values + i, 4);
    if (cache_.dtype == KvDType::kBF16) std::memcpy(entry + 2 * i, &bits, 2);
    if (cache_.dtype != KvDType::kFP8) continue;
    const float scale = 0.01f * static_cast<float>(1 + i / kQuantGroup);
    if (i < latent) {
      entry[i] = FloatToE4m3(values[i] / scale);
      std::memcpy(entry + latent + i / kQuantGroup * 4, &scale, 4);
    } else {
      std::memcpy(entry + latent + groups * 4 + (i - latent) * 2, &bits, 2);
    }
  }
}

std::vector<double> AttentionWorld::ReadEntry(uint8_t* entry) const {
  const int64_t latent = dims_.latent, width = latent + dims_.rope, groups = (latent + kQuantGroup - 1) / kQuantGroup;
  if (cache_.dtype == KvDType::kF32) return Values(Tensor(entry, DType::kF32, {1, width}));
  if (cache_.dtype == KvDType::kBF16) return Values(Tensor(entry, DType::kBF16, {1, width}));
  std::vector<double> values =
      Values(Activation{Tensor(entry, DType::kF8E4M3, {1, latent}), Tensor(entry + latent, DType::kF32, {1, groups})});
  const auto k_pe = Values(Tensor(entry + latent + 4 * groups, DType::kBF16, {1, dims_.rope}));
  values.insert(values.end(), k_pe.begin(), k_pe.end());
  return values;
}

const std::vector<double>& AttentionWorld::KvB() const {
  if (kv_b_values_.empty()) {
    kv_b_values_ = Values(kv_b_.part());
    // A GPU, and the CPU's mode that mirrors it, keep kv_b in bf16.
    if (TestsOnGpu() || options_.activation == ActivationFormat::kFP8) {
      for (double& value : kv_b_values_) value = Rounded(value, DType::kBF16);
    }
  }
  return kv_b_values_;
}

}  // namespace cachalot::testing
