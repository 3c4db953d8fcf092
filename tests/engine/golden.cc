// Reading golden cases, and running requests to their end.
#include "tests/engine/golden.h"

#include <bit>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "engine/model/safetensors.h"
#include "kernels/check.h"
#include "kernels/ops_types.h"

namespace cachalot {
namespace {

// A safetensors file is read as a checkpoint is.
class GoldenFile {
 public:
  explicit GoldenFile(const std::string& model_dir) {
    auto file = Checkpoint::Open(model_dir + "/golden.safetensors");
    CHECK(file.ok(), "{}", file.status().ToString());
    file_ = *std::move(file);
  }
  bool Has(const std::string& name) const { return file_->Find(name) != nullptr; }

  template <typename T>
  std::vector<T> Read(const std::string& name) const {
    const CheckpointTensor* tensor = file_->Find(name);
    CHECK(tensor != nullptr, "{} is missing", name);
    if (tensor->dtype == "F64") return Convert<double, T>(*tensor);
    if (tensor->dtype == "F32") return Convert<float, T>(*tensor);
    CHECK(tensor->dtype == "I32", "{} holds {}", name, tensor->dtype);
    return Convert<int32_t, T>(*tensor);
  }

 private:
  template <typename Stored, typename T>
  static std::vector<T> Convert(const CheckpointTensor& tensor) {
    std::vector<Stored> stored(tensor.num_bytes / sizeof(Stored));
    std::memcpy(stored.data(), tensor.data, tensor.num_bytes);
    return std::vector<T>(stored.begin(), stored.end());
  }
  std::unique_ptr<Checkpoint> file_;
};

}  // namespace

Golden LoadGolden(const std::string& name, const std::string& prefix) {
  Golden golden;
  golden.model_dir = std::string(CACHALOT_TEST_DATA_DIR) + "/golden/data/" + name;
  const GoldenFile file(golden.model_dir);
  for (int i = 0; file.Has(absl::StrCat("prompt.", i)); ++i) {
    const std::string index = absl::StrCat(".", i);
    GoldenPrompt p;
    p.tokens = file.Read<int32_t>("prompt" + index);
    p.logprobs = file.Read<double>(prefix + "logprobs" + index);
    p.top1 = file.Read<int32_t>(prefix + "top1" + index);
    p.top1_margin = file.Read<float>(prefix + "top1_margin" + index);
    p.router_margin = file.Read<float>(prefix + "router_margin" + index);
    p.last_logprobs = file.Read<double>(prefix + "last_logits" + index);
    if (file.Has(prefix + "mtp_logprobs" + index)) {
      p.mtp_logprobs = file.Read<double>(prefix + "mtp_logprobs" + index);
      p.mtp_last_logprobs = file.Read<double>(prefix + "mtp_last_logits" + index);
    }
    golden.prompts.push_back(std::move(p));
  }
  CHECK(!golden.prompts.empty());
  if (file.Has("greedy.prompt")) {
    golden.greedy_prompt = file.Read<int32_t>("greedy.prompt");
    golden.greedy_tokens = file.Read<int32_t>("greedy.tokens");
    golden.greedy_margin = file.Read<float>("greedy.margin");
  }
  return golden;
}

std::string DemoDir() { return CACHALOT_TEST_DATA_DIR "/../deploy/demo"; }

std::vector<std::vector<int32_t>> DemoPrompts() {
  std::ifstream file(CACHALOT_TEST_DATA_DIR "/engine/data/demo_prompts.txt");
  std::vector<std::vector<int32_t>> prompts;
  for (std::string line; std::getline(file, line);) {
    std::istringstream tokens(line);
    std::vector<int32_t>& prompt = prompts.emplace_back();
    for (int32_t token; tokens >> token;) prompt.push_back(token);
  }
  CHECK(prompts.size() == 50, "{} prompts", prompts.size());
  return prompts;
}

std::vector<Request> DemoRequests(float temperature, int max_tokens) {
  std::vector<Request> requests;
  for (const std::vector<int32_t>& prompt : DemoPrompts()) {
    Request& request = requests.emplace_back();
    request.prompt = prompt;
    request.sampling.temperature = temperature;
    request.sampling.seed = requests.size();
    request.sampling.max_tokens = max_tokens;
    request.sampling.logprobs = 2;
  }
  return requests;
}

void AppendDelta(Delta delta, Answer* answer) {
  answer->tokens.insert(answer->tokens.end(), delta.tokens.begin(), delta.tokens.end());
  for (auto& l : delta.logprobs) answer->logprobs.push_back(std::move(l));
  for (auto& l : delta.prompt_logprobs) answer->prompt_logprobs.push_back(std::move(l));
  answer->finish_reason = delta.finish_reason;
  answer->error = delta.error;
  answer->times = delta.times;
  answer->num_cached_tokens = delta.num_cached_tokens;
}

std::vector<Answer> RunAll(Engine& engine, const std::vector<Request>& requests) {
  std::vector<Answer> answers(requests.size());
  std::mutex mutex;
  std::condition_variable changed;
  size_t num_ended = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    auto id = engine.Submit(requests[i], [&, i](Delta delta) {
      AppendDelta(std::move(delta), &answers[i]);
      if (answers[i].finish_reason == FinishReason::kNone) return;
      std::lock_guard lock(mutex);
      ++num_ended;
      changed.notify_one();
    });
    CHECK(id.ok(), "{}", id.status().ToString());
  }
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return num_ended == requests.size(); });
  return answers;
}

std::vector<uint32_t> Bits(const Answer& answer) {
  std::vector<uint32_t> bits;
  const auto add = [&bits](const TokenLogprob& l) {
    bits.push_back(l.token);
    bits.push_back(std::bit_cast<uint32_t>(l.logprob));
    for (const auto& [token, logprob] : l.top) {
      bits.push_back(token);
      bits.push_back(std::bit_cast<uint32_t>(logprob));
    }
  };
  for (int32_t token : answer.tokens) bits.push_back(token);
  for (const TokenLogprob& l : answer.logprobs) add(l);
  for (const TokenLogprob& l : answer.prompt_logprobs) add(l);
  return bits;
}

std::unique_ptr<Engine> MakeEngine(const EngineOptions& options) {
  auto engine = Engine::Create(options);
  CHECK(engine.ok(), "{}", engine.status().ToString());
  return *std::move(engine);
}

Request ScoreRequest(const std::vector<int32_t>& prompt, int top) {
  Request request;
  request.prompt = prompt;
  request.sampling.temperature = 0;
  request.sampling.max_tokens = 1;
  request.sampling.ignore_eos = true;
  request.sampling.logprobs = kMaxTopLogprobs;
  request.sampling.prompt_logprobs = top;
  return request;
}

}  // namespace cachalot
