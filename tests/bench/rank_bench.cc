// rank_bench: one decode step of one rank of an expert-parallel DeepSeek-V3, on one GPU: all layers, its share of the
// routed experts, head and sampling, drafts verified and proposed, less the network. See --help.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <sstream>

#include "engine/expert_placement.h"
#include "engine/model/deepseek.h"
#include "engine/model/random_checkpoint.h"
#include "tests/bench/cuda_ceilings.h"
#include "tests/bench/device_arrays.h"
#include "tests/bench/kernel_trace.h"

namespace cachalot::bench {
namespace {

struct Options {
  std::string config = "tests/bench/deepseek_v3.json", kv_dtype = "bf16", cells;
  int layers = 61, local_experts = 8, replays = 20, max_batch = 256;
  std::vector<int> drafts = {0};  // each in turn
  double acceptance = 0.85;
  int max_drafts() const { return *std::max_element(drafts.begin(), drafts.end()); }
  bool has_trace = false;
};

struct Cell {
  int batch = 0, context = 0, drafts = 0;
  int num_rows() const { return batch * (1 + drafts); }
};

// Dispatches rows as a balanced router would: every resident expert gets the same number. The router's own choice, made
// among all experts, is not used; its weights are.
class BalancedCommunicator : public Communicator {
 public:
  BalancedCommunicator(Communicator& inner, const Tensor& slots) : inner_(inner), slots_(slots) {}
  int rank() const override { return inner_.rank(); }
  int num_ranks() const override { return inner_.num_ranks(); }
  void Dispatch(const ExpertRows& rows, const Activation& x, const Tensor& topk_slots,
                const Tensor& topk_weights) override {
    inner_.Dispatch(rows, x, slots_.Rows(0, topk_slots.dim(0)), topk_weights);
  }
  void Combine(const Tensor& out, const Tensor& y, const Tensor& shared) override { inner_.Combine(out, y, shared); }

 private:
  Communicator& inner_;
  const Tensor slots_;
};

class BalancedBackend : public Backend {
 public:
  BalancedBackend(Backend& inner, const Tensor& slots) : inner_(inner), communicator_(inner.communicator(), slots) {}
  std::string name() const override { return inner_.name(); }
  DType value_dtype() const override { return inner_.value_dtype(); }
  bool is_gpu() const override { return inner_.is_gpu(); }
  Device& device() override { return inner_.device(); }
  Ops& ops() override { return inner_.ops(); }
  Communicator& communicator() override { return communicator_; }

 private:
  Backend& inner_;
  BalancedCommunicator communicator_;
};

OpLimits MakeLimits(const ModelConfig& config, const Options& options) {
  OpLimits limits = config.op_limits();
  limits.max_sequences = options.max_batch;
  limits.max_tokens = limits.max_rows = options.max_batch * (1 + options.max_drafts());
  limits.max_drafts = options.max_drafts();
  limits.max_context = config.max_position_embeddings;
  limits.num_local_experts = options.local_experts;
  return limits;
}

class RankBench : DeviceArrays {
 public:
  RankBench(const ModelConfig& config, const Options& options, Backend& backend)
      : DeviceArrays(backend.device()),
        config_(config),
        options_(options),
        limits_(MakeLimits(config, options)),
        inner_(backend),
        device_(backend.device()) {}

  void Load() {
    checkpoint_ = MakeRandomCheckpoint(config_);
    // The first of all; the router's choice is not used (BalancedCommunicator).
    RankExperts experts = DefaultExperts(config_, {.num_experts = config_.n_routed_experts}, 0);
    for (ExpertList& held : experts.held) held.resize(options_.local_experts);
    auto weights = Must(ModelWeights::Load(config_, *checkpoint_, experts, has_mtp(), inner_.ops()));
    MakeState();
    backend_ = std::make_unique<BalancedBackend>(inner_, balanced_);
    const RopeTable rope{MakeRope()};
    MakeCache();
    model_ = Must(DeepSeek::Create(config_, std::move(weights), *store_, rope, *backend_, limits_,
                                   ActivationFormat::kFP8, experts));
  }

  bool has_mtp() const { return limits_.max_drafts > 0; }
  int64_t cache_tokens() const { return num_blocks_ * kBlockTokens; }

  // Microseconds of a step; prints what it found.
  void Run(const Cell& cell, const Ceilings& ceilings);

 private:
  void MakeState();
  Tensor MakeRope();
  void MakeCache();
  // Positions that the steps of a cell may write beyond where they begin.
  int Room(const Cell& cell) const { return std::max(128, (options_.replays + 8) * (1 + cell.drafts)); }
  void Fill(const Cell& cell);
  void Reset(const Cell& cell);
  StepArrays Arrays(const Cell& cell) const;
  StepArrays DraftArrays(const Cell& cell) const;
  SampleOutput Output(const Cell& cell) const;
  SlotState State(const Cell& cell) const;
  Tensor Proposed(const Cell& cell) const { return Tensor(proposed_.data, DType::kI32, {cell.batch, cell.drafts}); }
  void Body(const Cell& cell);
  double Roofline(const Cell& cell, const Ceilings& ceilings) const;

  const ModelConfig& config_;
  const Options& options_;
  const OpLimits limits_;
  Backend& inner_;
  Device& device_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<BalancedBackend> backend_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<DeepSeek> model_;
  int64_t num_blocks_ = 0;
  Tensor balanced_;
  StepInput input_;
  StepRows rows_;
  SlotState state_;
  StepArrays drafts_;
  Tensor proposed_;  // [B,X]
  SampleOutput output_;
  std::vector<int32_t> lengths_;
};

void RankBench::MakeState() {
  const int64_t B = limits_.max_sequences, T = limits_.max_tokens, K = limits_.num_experts_per_tok;
  const int64_t params_bytes = sizeof(SlotParams);
  balanced_ = New(DType::kI32, {T, K});
  std::vector<int32_t> slots(T * K);
  for (int64_t i = 0; i < T * K; ++i) slots[i] = static_cast<int32_t>((i / K + i % K) % options_.local_experts);
  Put(balanced_, slots.data());
  input_ = {New(DType::kI32, {B}), New(DType::kI32, {B}), New(DType::kI32, {B + 1}), New(DType::kU8, {B, params_bytes}),
            New(DType::kI32, {T}), New(DType::kI32, {T}), New(DType::kI32, {T}),     New(DType::kI32, {T})};
  rows_ = {New(DType::kI32, {T}), New(DType::kI32, {T}), New(DType::kI32, {T})};
  state_.block_table = New(DType::kI32, {B, (limits_.max_context + kBlockTokens - 1) / kBlockTokens});
  state_.length = New(DType::kI32, {B});
  state_.last_token = New(DType::kI32, {B});
  state_.params = New(DType::kU8, {B, params_bytes});
  state_.counts = New(DType::kU16, {B, limits_.vocab_size});
  output_ = {New(DType::kI32, {T}), New(DType::kF32, {T}), New(DType::kI32, {T, kMaxTopLogprobs}),
             New(DType::kF32, {T, kMaxTopLogprobs}), New(DType::kI32, {B})};
  if (!has_mtp()) return;
  state_.drafts = New(DType::kI32, {B, limits_.max_drafts});
  proposed_ = New(DType::kI32, {B, limits_.max_drafts});
  drafts_.rows = {New(DType::kI32, {B}), New(DType::kI32, {B}), New(DType::kI32, {B})};
  drafts_.input = {New(DType::kI32, {B}), New(DType::kI32, {B}), New(DType::kI32, {B + 1}), Tensor(), Tensor(),
                   New(DType::kI32, {B}), New(DType::kI32, {B}), New(DType::kI32, {B})};
}

Tensor RankBench::MakeRope() {
  const std::vector<float> angles = MakeRopeTable(config_, limits_.max_context);
  const Tensor table = New(DType::kF32, {limits_.max_context + 1, config_.qk_rope_head_dim});
  Put(table.Rows(1, limits_.max_context), angles.data());
  return table;
}

// All memory that is left but 6 GB, for activations.
void RankBench::MakeCache() {
  const KvOptions kv = {options_.kv_dtype == "fp8" ? KvDType::kFP8 : KvDType::kBF16, has_mtp(), inner_.value_dtype()};
  num_blocks_ = (static_cast<int64_t>(device_.FreeMemory()) - (int64_t{6} << 30)) / KvStore::BlockBytes(config_, kv);
  if (num_blocks_ < 1) Die("no room for a cache");
  store_ = Must(KvStore::Create(config_, kv, static_cast<int>(num_blocks_), device_));
  for (int layer = 0; layer < config_.num_hidden_layers + (has_mtp() ? 1 : 0); ++layer) {
    const Tensor& blocks = (layer < config_.num_hidden_layers ? store_->layer(layer) : store_->mtp()).blocks;
    if (kv.dtype == KvDType::kFP8) {
      FillFp8Entries(blocks.data, num_blocks_ * kBlockTokens, layer);
    } else {
      FillNormalBf16(blocks.data, blocks.num_bytes() / 2, layer, 1.0f);
    }
  }
}

// Lengths even over [context / 2, 3 context / 2], pages in random order, the parameters of ordinary sampling.
void RankBench::Fill(const Cell& cell) {
  std::mt19937 random(7);
  lengths_.assign(cell.batch, cell.context);
  for (int i = 0; i < cell.batch && cell.batch > 1; ++i) {
    lengths_[i] = std::min(limits_.max_context - Room(cell), cell.context / 2 + cell.context * i / (cell.batch - 1));
  }
  std::shuffle(lengths_.begin(), lengths_.end(), random);
  std::vector<int32_t> pages(num_blocks_);
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), random);
  const int64_t width = state_.block_table.dim(1);
  std::vector<int32_t> table(state_.block_table.num_elements(), 0);
  size_t next = 0;
  for (int i = 0; i < cell.batch; ++i) {
    for (int64_t page = 0; page * kBlockTokens < lengths_[i] + Room(cell); ++page) {
      table[i * width + page] = pages[next++ % pages.size()];
    }
  }
  Put(state_.block_table, table.data());

  const int rows_per_sequence = 1 + cell.drafts;
  std::vector<int32_t> sequence(limits_.max_tokens), decode(limits_.max_tokens, -1), row_seq(limits_.max_tokens);
  std::iota(sequence.begin(), sequence.end(), 0);
  for (int i = 0; i < limits_.max_tokens; ++i) row_seq[i] = i / rows_per_sequence;
  std::vector<int32_t> starts(limits_.max_sequences + 1);
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = static_cast<int32_t>(i) * rows_per_sequence;
  Put(input_.seq_slot, sequence.data());
  Put(input_.seq_start, decode.data());
  Put(input_.query_start, starts.data());
  Put(input_.row_token, sequence.data());
  Put(input_.row_seq, row_seq.data());
  Put(input_.row_target, decode.data());
  std::vector<SlotParams> params(limits_.max_sequences);
  for (size_t i = 0; i < params.size(); ++i) {
    params[i].temperature = 0.7f;
    params[i].top_p = 0.95f;
    params[i].seed = i;
  }
  Put(state_.params, params.data());
  Put(input_.seq_params, params.data());
}

// The slots as they were before the first step.
void RankBench::Reset(const Cell& cell) {
  std::vector<int32_t> lengths(limits_.max_sequences, 1), tokens(limits_.max_sequences);
  std::copy(lengths_.begin(), lengths_.begin() + cell.batch, lengths.begin());
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(1000 + 97 * i);
  Put(state_.length, lengths.data());
  Put(state_.last_token, tokens.data());
  if (!has_mtp()) return;
  std::vector<int32_t> drafts(state_.drafts.num_elements());
  for (size_t i = 0; i < drafts.size(); ++i) drafts[i] = static_cast<int32_t>(2000 + 89 * i);
  Put(state_.drafts, drafts.data());
  FillNormalBf16(store_->borders().data, store_->borders().num_elements(), 99, 1.0f);
}

StepArrays RankBench::Arrays(const Cell& cell) const {
  const int64_t B = cell.batch, T = cell.num_rows();
  StepInput input = {input_.seq_slot.Rows(0, B),   input_.seq_start.Rows(0, B), input_.query_start.Rows(0, B + 1),
                     input_.seq_params.Rows(0, B), input_.tokens.Rows(0, T),    input_.row_token.Rows(0, T),
                     input_.row_seq.Rows(0, T),    input_.row_target.Rows(0, T)};
  return {input, {rows_.tokens.Rows(0, T), rows_.positions.Rows(0, T), rows_.slots.Rows(0, T)}, State(cell)};
}

// As wide as the cell has drafts.
SlotState RankBench::State(const Cell& cell) const {
  SlotState state = state_;
  state.drafts = Tensor();
  if (cell.drafts > 0) state.drafts = Tensor(state_.drafts.data, DType::kI32, {limits_.max_sequences, cell.drafts});
  return state;
}

StepArrays RankBench::DraftArrays(const Cell& cell) const {
  const int64_t B = cell.batch;
  const auto head = [B](const Tensor& t) { return t.Rows(0, B); };
  const StepInput& d = drafts_.input;
  const StepInput input = {head(d.seq_slot), head(d.seq_start), d.query_start.Rows(0, B + 1),
                           Tensor(),         Tensor(),          head(d.row_token),
                           head(d.row_seq),  head(d.row_target)};
  return {input, {head(drafts_.rows.tokens), head(drafts_.rows.positions), head(drafts_.rows.slots)}, State(cell)};
}

SampleOutput RankBench::Output(const Cell& cell) const {
  const int64_t T = cell.num_rows();
  return {output_.tokens.Rows(0, T), output_.logprobs.Rows(0, T), output_.top_tokens.Rows(0, T),
          output_.top_logprobs.Rows(0, T), output_.num_accepted.Rows(0, cell.batch)};
}

void RankBench::Body(const Cell& cell) {
  const StepArrays step = Arrays(cell);
  Ops& ops = backend_->ops();
  ops.BeginStep(step.rows, step.state, step.input);
  model_->Forward(step);
  if (cell.drafts > 0) model_->FeedMtp(step);
  const Tensor logits = model_->Head(step, step.input.row_token);
  ops.Sample(Output(cell), step.state, logits, Tensor(), step.input, step.rows, config_.vocab_size);
  if (cell.drafts > 0) {
    model_->Draft(step, output_.num_accepted.Rows(0, cell.batch), DraftArrays(cell), Proposed(cell), cell.drafts,
                  config_.vocab_size);
  }
}

// Seconds: of every part the larger of its bytes and its operations, at the ceilings of this run.
double RankBench::Roofline(const Cell& cell, const Ceilings& ceilings) const {
  const double D = config_.hidden_size, H = config_.num_attention_heads;
  const double C = config_.kv_lora_rank, R = config_.qk_rope_head_dim, N = config_.qk_nope_head_dim;
  const double V = config_.v_head_dim, Q = config_.q_lora_rank, F = config_.moe_intermediate_size;
  const double keys = std::accumulate(lengths_.begin(), lengths_.end(), 0.0);
  const double fp8_flops = 1.6 * ceilings.bf16_flops_per_s;  // 1.28 to 1.69 measured, by the kind of scales
  const auto part = [&](double bytes, double flops, double rate) {
    return std::max(bytes / ceilings.read_bytes_per_s, flops / rate);
  };
  const auto product = [&](double rows, double weights) { return part(weights, 2 * rows * weights, fp8_flops); };
  const int dense = std::min(config_.first_k_dense_replace, config_.num_hidden_layers);
  const int moe = config_.num_hidden_layers - dense;
  const double entry = options_.kv_dtype == "fp8" ? C + 16 + 2 * R : 2 * (C + R);
  // Of so many rows; those of one sequence read its entries once.
  const auto attention = [&](double rows) {
    return product(rows, D * (Q + C + R)) + product(rows, Q * H * (N + R)) + product(rows, H * V * D) +
           part(2 * H * C * (N + V), 2 * rows * H * C * (N + V), ceilings.bf16_flops_per_s) +
           part(keys * entry, 2 * keys * rows / cell.batch * H * (2 * C + R), ceilings.bf16_flops_per_s);
  };
  const auto experts = [&](double rows) {
    const double each = rows * config_.num_experts_per_tok / options_.local_experts;
    return std::min<double>(options_.local_experts, rows * config_.num_experts_per_tok) *
               product(std::max(each, 1.0), 3 * D * F) +
           product(rows, 3 * D * F) + part(2 * D * config_.n_routed_experts, 0, 1);
  };
  const auto plain = [&](double rows, double weights) {  // bf16
    return part(2 * weights, 2 * rows * weights, ceilings.bf16_flops_per_s);
  };
  const double T = cell.num_rows(), B = cell.batch;
  double seconds = config_.num_hidden_layers * attention(T) + moe * experts(T) +
                   dense * product(T, 3 * D * config_.intermediate_size) + plain(T, D * config_.vocab_size);
  if (cell.drafts == 0) return seconds;
  seconds += product(T, 2 * D * D) + product(T, D * (Q + C + R));
  return seconds + cell.drafts * (product(B, 2 * D * D) + attention(B) + experts(B) + plain(B, D * config_.vocab_size));
}

void RankBench::Run(const Cell& cell, const Ceilings& ceilings) {
  const double wanted = 1.0 * cell.batch * (cell.context + Room(cell));
  if (wanted > static_cast<double>(cache_tokens())) {
    fmt::print("| {} | {} | {} | does not fit: {} tokens of cache, {} wanted |\n", cell.batch, cell.context,
               cell.drafts, cache_tokens(), wanted);
    return;
  }
  Fill(cell);
  Reset(cell);
  const int T = cell.num_rows();
  const StepKey eager = {T, cell.batch, T, 1}, graph = {T, cell.batch, T, 2};
  const auto proposed = [&] { return cell.drafts > 0 ? Get<int32_t>(Proposed(cell)) : std::vector<int32_t>(); };
  // Operation by operation first, then replayed from the same state: the same numbers.
  device_.Submit(eager, [&] { Body(cell); });
  const auto tokens = Get<int32_t>(Output(cell).tokens);
  const auto top = Get<float>(Output(cell).top_logprobs);
  const auto drafts = proposed();
  Must(device_.Prepare(graph, [&] { Body(cell); }));
  Reset(cell);
  device_.Submit(graph, [&] { Body(cell); });
  const bool is_same = tokens == Get<int32_t>(Output(cell).tokens) && top == Get<float>(Output(cell).top_logprobs) &&
                       drafts == proposed();
  const bool is_finite = std::all_of(top.begin(), top.end(), [](float x) { return std::isfinite(x); });

  std::vector<double> times;
  for (int i = 0; i < options_.replays + 3; ++i) {
    const absl::Time begin = absl::Now();
    device_.Submit(graph, [&] { Body(cell); });
    Must(device_.Wait(device_.Record(), absl::Minutes(1)));
    if (i >= 3) times.push_back(absl::ToDoubleSeconds(absl::Now() - begin));
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2], floor = Roofline(cell, ceilings);
  double tokens_a_sequence = 0;
  for (int i = 0; i <= cell.drafts; ++i) tokens_a_sequence += std::pow(options_.acceptance, i);
  fmt::print("| {} | {} | {} | {:.2f} | {:.2f} | {:.0f} % | {:.0f} | {} | {} |\n", cell.batch, cell.context,
             cell.drafts, median * 1e3, floor * 1e3, 100 * floor / median, tokens_a_sequence * cell.batch / median,
             device_.NumKernels(graph),
             !is_finite ? "NOT FINITE"
             : is_same  ? "same"
                        : "DIFFERENT");
  std::fflush(stdout);
  if (!options_.has_trace) return;
  Reset(cell);
  if (!StartTrace()) Die("CUPTI records nothing");
  constexpr int kSteps = 3;
  for (int i = 0; i < kSteps; ++i) device_.Submit(graph, [&] { Body(cell); });
  Must(device_.Wait(device_.Record(), absl::Minutes(1)));
  fmt::print("\n{}\n", Summary(StopTrace(), kSteps));
}

std::vector<Cell> Cells(const Options& options) {
  std::vector<Cell> cells;
  const auto add = [&](int batch, int context) {
    for (int drafts : options.drafts) cells.push_back({batch, context, drafts});
  };
  if (options.cells.empty()) {
    for (int context : {1024, 4096, 32768}) {
      for (int batch : {1, 8, 32, 64, 128, 256}) add(batch, context);
    }
    add(1, 131072);
    add(8, 131072);
    return cells;
  }
  std::stringstream list(options.cells);
  for (std::string cell; std::getline(list, cell, ',');) {
    const size_t x = cell.find('x');
    if (x == std::string::npos) Die("a cell is BATCHxCONTEXT");
    add(std::atoi(cell.c_str()), std::atoi(cell.c_str() + x + 1));
  }
  return cells;
}

void Main(const Options& options) {
  std::ifstream file(options.config);
  std::stringstream json;
  json << file.rdbuf();
  ModelConfig config = Must(ModelConfig::Parse(json.str(), options.config));
  config.num_hidden_layers = options.layers;
  const Ceilings ceilings = MeasureCeilings();
  fmt::print("{}\nread {:.2f} TB/s, bf16 8192^3 {:.0f} TFLOP/s\n", GpuName(), ceilings.read_bytes_per_s / 1e12,
             ceilings.bf16_flops_per_s / 1e12);
  BackendOptions backend_options;
  backend_options.device = "cuda";
  backend_options.activation = ActivationFormat::kFP8;
  backend_options.limits = MakeLimits(config, options);
  const std::unique_ptr<Backend> backend = Must(MakeBackend(backend_options));
  RankBench bench(config, options, *backend);
  bench.Load();
  fmt::print("{} layers, {} of {} routed experts, {} cache of {} tokens\n\n", options.layers, options.local_experts,
             config.n_routed_experts, options.kv_dtype, bench.cache_tokens());
  if (options.max_drafts() > 0) {
    fmt::print("FORCED: steps are measured; tok/s counts {:.0f} % of drafts as right while those before them are.\n\n",
               100 * options.acceptance);
  }
  fmt::print(
      "| batch | context | drafts | ms a step | roofline ms | share | tok/s | kernels | graph against single "
      "operations "
      "|\n");
  fmt::print("|---|---|---|---|---|---|---|---|---|\n");
  for (const Cell& cell : Cells(options)) bench.Run(cell, ceilings);
}

}  // namespace
}  // namespace cachalot::bench

int main(int argc, char** argv) {
  cachalot::bench::Options options;
  CLI::App app(
      "One decode step of a rank of DeepSeek-V3 under expert parallelism, on random weights at real dimensions.");
  app.add_option("--config", options.config, "config.json of the model")->capture_default_str();
  app.add_option("--layers", options.layers, "decoder layers")->capture_default_str();
  app.add_option("--local-experts", options.local_experts, "routed experts on this rank")->capture_default_str();
  app.add_option("--kv-cache-dtype", options.kv_dtype, "bf16 or fp8")->check(CLI::IsMember({"bf16", "fp8"}));
  app.add_option("--cells", options.cells, "BATCHxCONTEXT,...; all by default");
  app.add_option("--drafts", options.drafts, "tokens drafted and verified a step, each in turn")
      ->delimiter(',')
      ->check(CLI::Range(0, 8));
  app.add_option("--acceptance", options.acceptance, "share of drafts that count as right in tok/s")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--replays", options.replays, "steps timed")->capture_default_str();
  app.add_flag("--trace", options.has_trace, "print every kernel's time");
  CLI11_PARSE(app, argc, argv);
  cachalot::bench::Main(options);
  return 0;
}
