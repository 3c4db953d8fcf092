// Runner: packing, submitting and unpacking of steps.
#include "engine/model/runner.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_format.h"

namespace cachalot {
namespace {

enum SubmitKind { kBlockUpdates = 0, kBiasUpdates = 1, kForward = 2, kSample = 3, kCounts = 4, kNumKinds = 5 };

// NOTE: the staging set's addresses are part of a step's submissions.
StepKey KeyOf(const StepShape& shape, SubmitKind kind, int set) {
  const int path = static_cast<int>(shape.path), what = (path * kMaxStepsInFlight + set) * kNumKinds + kind;
  const int num_kinds = 2 * kMaxStepsInFlight * kNumKinds;
  return {shape.num_tokens, shape.num_sequences, shape.num_rows, shape.num_proposed * num_kinds + what,
          shape.long_chunks};
}

constexpr int64_t kBlockUpdatesAtOnce = 8192;

// A row of Ops::UpdateTokenBiases.
struct BiasUpdate {
  int32_t slot, index;
  TokenBias entry;
};

// Lays arrays out one behind the other, 16-byte aligned; the same calls give the same layout on host and device.
class Packer {
 public:
  explicit Packer(void* base) : base_(reinterpret_cast<uintptr_t>(base)), next_(base_) {}
  Tensor Take(DType dtype, std::initializer_list<int64_t> dims) {
    Tensor tensor(reinterpret_cast<void*>(next_), dtype, dims);
    next_ += (tensor.num_bytes() + 15) / 16 * 16;
    return tensor;
  }
  int64_t bytes() const { return static_cast<int64_t>(next_ - base_); }

 private:
  const uintptr_t base_;
  uintptr_t next_;
};

StepInput PackInput(Packer* packer, const StepShape& shape) {
  const int64_t T = shape.num_tokens, S = shape.num_sequences, L = shape.num_rows;
  StepInput input;
  input.seq_slot = packer->Take(DType::kI32, {S});
  input.seq_start = packer->Take(DType::kI32, {S});
  input.query_start = packer->Take(DType::kI32, {S + 1});
  input.seq_params = packer->Take(DType::kU8, {S, static_cast<int64_t>(sizeof(SlotParams))});
  input.tokens = packer->Take(DType::kI32, {T});
  input.row_token = packer->Take(DType::kI32, {L});
  input.row_seq = packer->Take(DType::kI32, {L});
  input.row_target = packer->Take(DType::kI32, {L});
  return input;
}

StepOutput PackOutput(Packer* packer, const StepShape& shape, int max_drafts) {
  const int64_t S = shape.num_sequences, L = shape.num_rows;
  StepOutput output;
  output.sample.tokens = packer->Take(DType::kI32, {L});
  output.sample.logprobs = packer->Take(DType::kF32, {L});
  output.sample.top_tokens = packer->Take(DType::kI32, {L, kMaxTopLogprobs});
  output.sample.top_logprobs = packer->Take(DType::kF32, {L, kMaxTopLogprobs});
  output.sample.num_accepted = packer->Take(DType::kI32, {S});
  output.drafts = packer->Take(DType::kI32, {S, max_drafts});
  return output;
}

StepShape LargestShape(const OpLimits& limits) {
  return {StepShape::Path::kMixed, limits.max_sequences, limits.max_tokens, limits.max_tokens};
}

template <typename T>
std::vector<T> Copy(const Tensor& tensor, int64_t rows) {
  return std::vector<T>(tensor.as<T>(), tensor.as<T>() + rows * tensor.row_elements());
}

}  // namespace

absl::StatusOr<std::unique_ptr<Runner>> Runner::Create(const ModelConfig& config, const Checkpoint& checkpoint,
                                                       const RunnerOptions& options, Backend& backend) {
  std::unique_ptr<Runner> runner(new Runner(options, backend));
  const OpLimits& limits = options.limits;
  CHECK(options.kv.has_mtp == (limits.max_drafts > 0), "drafts and the MTP layer come together");
  auto weights = ModelWeights::Load(config, checkpoint, options.experts, options.kv.has_mtp, backend.ops());
  if (!weights.ok()) return weights.status();
  absl::Status status = runner->MakeState();
  if (status.ok()) status = runner->MakeStaging();
  if (status.ok()) status = runner->FillAngles(config);
  if (!status.ok()) return status;

  auto store = KvStore::Create(config, options.kv, options.num_blocks, backend.device());
  if (!store.ok()) return store.status();
  runner->store_ = *std::move(store);

  auto model = DeepSeek::Create(config, *std::move(weights), *runner->store_, RopeTable{runner->angles_}, backend,
                                limits, options.format, options.experts);
  if (!model.ok()) return model.status();
  runner->model_ = *std::move(model);
  return runner;
}

absl::StatusOr<void*> Runner::Allocate(int64_t bytes, Device::Memory memory) {
  if (memory == Device::Memory::kDevice) device_bytes_ += bytes;
  if (is_dry_run_) return nullptr;
  auto buffer = device_.Allocate(std::max<int64_t>(bytes, 1), memory);
  if (!buffer.ok()) return buffer.status();
  buffers_.push_back(*std::move(buffer));
  return buffers_.back().data();
}

absl::StatusOr<Tensor> Runner::NewTensor(DType dtype, std::initializer_list<int64_t> dims) {
  Tensor tensor(nullptr, dtype, dims);
  auto data = Allocate(tensor.num_bytes(), Device::Memory::kDevice);
  if (!data.ok()) return data.status();
  tensor.data = *data;
  return tensor;
}

int64_t Runner::StateBytes(const OpLimits& limits, Backend& backend) {
  RunnerOptions options;
  options.limits = limits;
  Runner runner(options, backend);
  runner.is_dry_run_ = true;
  CHECK(runner.MakeState().ok() && runner.MakeStaging().ok());
  return runner.device_bytes_;
}

// Made on the host, the same in every backend. The first row is of no position.
absl::Status Runner::FillAngles(const ModelConfig& config) {
  const std::vector<float> angles = MakeRopeTable(config, options_.limits.max_context);
  auto staging = device_.Allocate(angles_.num_bytes(), Device::Memory::kPinnedHost);
  if (!staging.ok()) return staging.status();
  auto* staged = static_cast<float*>(staging->data());
  std::copy(angles.begin(), angles.end(), std::fill_n(staged, angles_.dim(1), 0.0f));
  device_.Upload(angles_, staging->data());
  return device_.Wait(device_.Record(), absl::Minutes(1));
}

absl::Status Runner::MakeState() {
  const OpLimits& limits = options_.limits;
  const int64_t U = limits.max_sequences, T = limits.max_tokens;
  const int64_t max_blocks = (limits.max_context + kBlockTokens - 1) / kBlockTokens;
  absl::Status status;
  const auto make = [&](DType dtype, std::initializer_list<int64_t> dims) {
    auto tensor = NewTensor(dtype, dims);
    status.Update(tensor.status());
    return tensor.value_or(Tensor());
  };
  angles_ = make(DType::kF32, {limits.max_context + 1, limits.qk_rope_head_dim});
  state_.block_table = make(DType::kI32, {U, max_blocks});
  state_.length = make(DType::kI32, {U});
  state_.last_token = make(DType::kI32, {U});
  state_.params = make(DType::kU8, {U, static_cast<int64_t>(sizeof(SlotParams))});
  state_.counts = make(DType::kU16, {U, limits.vocab_size});
  rows_ = {make(DType::kI32, {T}), make(DType::kI32, {T}), make(DType::kI32, {T})};
  state_.token_biases = make(DType::kU8, {U, kMaxTokenBiases, static_cast<int64_t>(sizeof(TokenBias))});
  if (limits.max_drafts > 0) {
    state_.drafts = make(DType::kI32, {U, limits.max_drafts});
    drafts_.rows = {make(DType::kI32, {U}), make(DType::kI32, {U}), make(DType::kI32, {U})};
    drafts_.input.query_start = make(DType::kI32, {U + 1});
    for (Tensor* t : {&drafts_.input.seq_slot, &drafts_.input.seq_start, &drafts_.input.row_token,
                      &drafts_.input.row_seq, &drafts_.input.row_target}) {
      *t = make(DType::kI32, {U});
    }
  }
  block_updates_ = make(DType::kI32, {std::min(kBlockUpdatesAtOnce, U * max_blocks), 3});
  bias_updates_ = make(DType::kI32, {U * kMaxTokenBiases, 4});
  counted_tokens_ = make(DType::kI32, {limits.max_context, 3});
  none_accepted_ = make(DType::kI32, {U});
  return status;
}

absl::Status Runner::MakeStaging() {
  const StepShape largest = LargestShape(options_.limits);
  Packer input(nullptr), output(nullptr);
  PackInput(&input, largest);
  PackOutput(&output, largest, options_.limits.max_drafts);
  auto device_input = NewTensor(DType::kU8, {input.bytes()});
  auto device_output = NewTensor(DType::kU8, {output.bytes()});
  if (!device_input.ok()) return device_input.status();
  if (!device_output.ok()) return device_output.status();
  input_ = *device_input;
  output_ = *device_output;
  for (StagingSet& set : staging_) {
    for (auto [pointer, bytes] : {std::pair{&set.input, input.bytes()}, std::pair{&set.output, output.bytes()},
                                  std::pair{&set.block_updates, (max_block_updates() + block_updates_.dim(0)) * 12},
                                  std::pair{&set.bias_updates, bias_updates_.num_bytes()},
                                  std::pair{&set.counted_tokens, counted_tokens_.num_bytes()}}) {
      auto memory = Allocate(bytes, Device::Memory::kPinnedHost);
      if (!memory.ok()) return memory.status();
      *pointer = *memory;
    }
  }
  return absl::OkStatus();
}

StepInput Runner::InputAt(void* base, const StepShape& shape) const {
  Packer packer(base);
  StepInput input = PackInput(&packer, shape);
  input.long_chunks = shape.long_chunks;
  return input;
}

StepOutput Runner::OutputAt(void* base, const StepShape& shape) const {
  Packer packer(base);
  return PackOutput(&packer, shape, options_.limits.max_drafts);
}

Tensor Runner::PackedInput(const StepShape& shape) const {
  Packer packer(nullptr);
  PackInput(&packer, shape);
  return input_.Rows(0, packer.bytes());
}

Tensor Runner::PackedOutput(const StepShape& shape) const {
  Packer packer(nullptr);
  PackOutput(&packer, shape, options_.limits.max_drafts);
  return output_.Rows(0, packer.bytes());
}

void Runner::FillInput(const StepPlan& plan, const StepShape& shape, const StepInput& input) const {
  int row = 0;
  const SequenceStep padding;
  auto* params = reinterpret_cast<SlotParams*>(input.seq_params.as<uint8_t>());
  for (int s = 0; s < shape.num_sequences; ++s) {
    const bool is_real = s < static_cast<int>(plan.sequences.size());
    const SequenceStep& sequence = is_real ? plan.sequences[s] : padding;
    input.seq_slot.as<int32_t>()[s] = is_real ? sequence.slot : -1;
    input.seq_start.as<int32_t>()[s] = sequence.start;
    input.query_start.as<int32_t>()[s] = row;
    params[s] = sequence.params;
    std::copy(sequence.tokens.begin(), sequence.tokens.end(), input.tokens.as<int32_t>() + row);
    row += sequence.num_rows;
  }
  input.query_start.as<int32_t>()[shape.num_sequences] = row;
  for (int l = 0; l < shape.num_rows; ++l) {
    const bool is_real = l < static_cast<int>(plan.logits_rows.size());
    const LogitsRow wanted = is_real ? plan.logits_rows[l] : LogitsRow{-1, -1, -1};
    CHECK(l < options_.limits.max_rows || !is_real || wanted.target >= 0, "row {} samples", l);
    input.row_token.as<int32_t>()[l] = wanted.row;
    input.row_seq.as<int32_t>()[l] = wanted.sequence;
    input.row_target.as<int32_t>()[l] = wanted.target;
  }
}

// At most one for each entry of the table; as many at a time as there is room for on the device.
void Runner::UploadBlockUpdates(const std::vector<BlockUpdate>& updates, int set) {
  CHECK(static_cast<int64_t>(updates.size()) <= max_block_updates(), "{} block updates", updates.size());
  auto* staged = static_cast<BlockUpdate*>(staging_[set].block_updates);
  const int max_count = static_cast<int>(block_updates_.dim(0));
  for (size_t begin = 0; begin < updates.size(); begin += max_count, staged += max_count) {
    const int count = static_cast<int>(std::min<size_t>(updates.size() - begin, max_count));
    const int padded = std::min(device_.Bucket(count), max_count);
    std::copy_n(updates.begin() + begin, count, staged);
    std::fill(staged + count, staged + padded, BlockUpdate{-1, 0, 0});
    const Tensor target = block_updates_.Rows(0, padded);
    device_.Upload(target, staged);
    device_.Submit({padded, 0, 0, kBlockUpdates}, [this, target] { backend_.ops().UpdateBlockTables(state_, target); });
  }
}

void Runner::UploadTokenBiases(const std::vector<SequenceStep>& sequences, int set) {
  auto* staged = static_cast<BiasUpdate*>(staging_[set].bias_updates);
  int count = 0;
  for (const SequenceStep& sequence : sequences) {
    CHECK(sequence.token_biases.size() <= kMaxTokenBiases);
    int32_t index = 0;
    for (const TokenBias& entry : sequence.token_biases) staged[count++] = {sequence.slot, index++, entry};
  }
  if (count == 0) return;
  const int padded = std::min(device_.Bucket(count), static_cast<int>(bias_updates_.dim(0)));
  std::fill(staged + count, staged + padded, BiasUpdate{-1, 0, {}});
  const Tensor target = bias_updates_.Rows(0, padded);
  device_.Upload(target, staged);
  device_.Submit({padded, 0, 0, kBiasUpdates}, [this, target] { backend_.ops().UpdateTokenBiases(state_, target); });
}

void Runner::CountTokens(const std::vector<CountedToken>& tokens, int set) {
  if (tokens.empty()) return;
  const int count = static_cast<int>(tokens.size()), max_count = static_cast<int>(counted_tokens_.dim(0));
  CHECK(count <= max_count, "{} counted tokens", count);
  const int padded = std::min(device_.Bucket(count), max_count);
  auto* staged = static_cast<CountedToken*>(staging_[set].counted_tokens);
  std::copy(tokens.begin(), tokens.end(), staged);
  std::fill(staged + count, staged + padded, CountedToken{-1, 0, 0});
  const Tensor counted = counted_tokens_.Rows(0, padded);
  device_.Upload(counted, staged);
  device_.Submit({padded, 0, 0, kCounts}, [this, counted] { backend_.ops().CountTokens(state_, counted); });
}

StepArrays Runner::ArraysOf(const StepShape& shape) const {
  const int64_t T = shape.num_tokens;
  return {InputAt(input_.data, shape),
          {rows_.tokens.Rows(0, T), rows_.positions.Rows(0, T), rows_.slots.Rows(0, T)},
          state_};
}

StepArrays Runner::DraftsOf(const StepShape& shape) const {
  const int64_t S = shape.num_sequences;
  StepArrays drafts;
  drafts.state = state_;
  drafts.rows = {drafts_.rows.tokens.Rows(0, S), drafts_.rows.positions.Rows(0, S), drafts_.rows.slots.Rows(0, S)};
  drafts.input.seq_slot = drafts_.input.seq_slot.Rows(0, S);
  drafts.input.seq_start = drafts_.input.seq_start.Rows(0, S);
  drafts.input.query_start = drafts_.input.query_start.Rows(0, S + 1);
  drafts.input.row_token = drafts_.input.row_token.Rows(0, S);
  drafts.input.row_seq = drafts_.input.row_seq.Rows(0, S);
  drafts.input.row_target = drafts_.input.row_target.Rows(0, S);
  return drafts;
}

Runner::Submission Runner::Forward(const StepShape& shape, int set) {
  return {KeyOf(shape, kForward, set), [this, shape, set] {
            device_.Upload(PackedInput(shape), staging_[set].input);
            const StepArrays step = ArraysOf(shape);
            backend_.ops().BeginStep(step.rows, step.state, step.input);
            model_->Forward(step);
            if (options_.limits.max_drafts > 0) model_->FeedMtp(step);
          }};
}

Runner::Submission Runner::Sample(const StepShape& shape, int set) {
  return {KeyOf(shape, kSample, set), [this, shape, set] {
            const StepArrays step = ArraysOf(shape);
            const StepOutput output = OutputAt(output_.data, shape);
            SampleRows(step, output.sample);
            if (options_.limits.max_drafts > 0) {
              model_->Draft(step, output.sample.num_accepted, DraftsOf(shape), output.drafts, shape.num_proposed,
                            options_.num_valid_tokens);
            }
            device_.Download(staging_[set].output, PackedOutput(shape));
          }};
}

// As many rows at a time as there is room for logits: a long prompt is scored in steps as long as any. All rows that
// sample, drafts to be verified among them, are among the first.
void Runner::SampleRows(const StepArrays& step, const SampleOutput& output) {
  const int64_t num_rows = step.input.row_token.dim(0), max_rows = options_.limits.max_rows;
  for (int64_t begin = 0; begin == 0 || begin < num_rows; begin += max_rows) {
    const int64_t count = std::min(max_rows, num_rows - begin);
    StepInput input = step.input;
    for (Tensor* rows : {&input.row_token, &input.row_seq, &input.row_target}) *rows = rows->Rows(begin, count);
    SampleOutput part = output;
    for (Tensor* rows : {&part.tokens, &part.logprobs, &part.top_tokens, &part.top_logprobs}) {
      *rows = rows->Rows(begin, count);
    }
    if (begin > 0) part.num_accepted = none_accepted_.Rows(0, output.num_accepted.dim(0));
    const Tensor logits = model_->Head(step, input.row_token);
    backend_.ops().Sample(part, step.state, logits, Tensor(), input, step.rows, options_.num_valid_tokens);
  }
}

// NOTE: every step that is prepared runs on padding only, which changes nothing.
absl::StatusOr<std::string> Runner::Prepare(const std::vector<StepShape>& shapes) {
  int num_graphs = 0, num_kernels = 0;
  for (const StepShape& shape : shapes) {
    for (int set = 0; set < kMaxStepsInFlight; ++set) {
      FillInput(StepPlan(), shape, InputAt(staging_[set].input, shape));
      num_kernels = 0;
      for (const Submission& submission : {Forward(shape, set), Sample(shape, set)}) {
        absl::Status status = device_.Prepare(submission.key, submission.body);
        if (status.ok()) status = device_.Wait(device_.Record(), absl::Minutes(1));
        if (!status.ok()) return status;
        if (device_.NumKernels(submission.key) == 0) return "";  // the CPU: there is nothing to prepare
        ++num_graphs;
        num_kernels += device_.NumKernels(submission.key);
      }
    }
  }
  return absl::StrFormat("%d graphs of decode steps, a step of %d sequences of %d kernels", num_graphs,
                         shapes.empty() ? 0 : shapes.back().num_sequences, num_kernels);
}

void Runner::Launch(const StepPlan& plan, const StepShape& shape) {
  CHECK(pending_.size() < kMaxStepsInFlight, "{} steps in flight", pending_.size());
  const OpLimits& limits = options_.limits;
  const int num_sequences = static_cast<int>(plan.sequences.size());
  const int num_rows = static_cast<int>(plan.logits_rows.size());
  CHECK(plan.num_rows <= shape.num_tokens && num_sequences <= shape.num_sequences && num_rows <= shape.num_rows);
  CHECK(shape.num_tokens <= limits.max_tokens && shape.num_sequences <= limits.max_sequences &&
        shape.num_rows <= limits.max_tokens);
  const int set = next_set_;
  next_set_ = (next_set_ + 1) % kMaxStepsInFlight;

  UploadBlockUpdates(plan.block_updates, set);
  UploadTokenBiases(plan.sequences, set);
  FillInput(plan, shape, InputAt(staging_[set].input, shape));
  Submission forward = Forward(shape, set), sample = Sample(shape, set);
  device_.Submit(forward.key, std::move(forward.body));
  CountTokens(plan.counted_tokens, set);
  device_.Submit(sample.key, std::move(sample.body));
  pending_.push_back({plan.step, shape, num_rows, num_sequences, plan.wants_top, set, device_.Record()});
}

absl::StatusOr<StepResult> Runner::Wait(absl::Duration timeout) {
  CHECK(!pending_.empty());
  const Pending pending = pending_.front();
  const absl::Status status = device_.Wait(pending.event, timeout);
  if (!status.ok()) return status;
  pending_.pop_front();
  const StepOutput brought = OutputAt(staging_[pending.set].output, pending.shape);
  const SampleOutput& output = brought.sample;
  StepResult result;
  result.step = pending.step;
  result.tokens = Copy<int32_t>(output.tokens, pending.num_rows);
  result.logprobs = Copy<float>(output.logprobs, pending.num_rows);
  if (pending.wants_top) {
    result.top_tokens = Copy<int32_t>(output.top_tokens, pending.num_rows);
    result.top_logprobs = Copy<float>(output.top_logprobs, pending.num_rows);
  }
  result.num_accepted = Copy<int32_t>(output.num_accepted, pending.num_sequences);
  result.drafts = Copy<int32_t>(brought.drafts, pending.num_sequences);
  return result;
}

}  // namespace cachalot
