// Drafts change no bit of any answer: greedy or sampled, shaped in every way, in any chunks and company, preempted or
// not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "engine/model/config.h"
#include "kernels/check.h"
#include "tests/engine/checkpoint_writer.h"
#include "tests/engine/golden.h"
#include "tests/engine/step_loop.h"

namespace cachalot {
namespace {

constexpr int kNumRequests = 60;

EngineOptions Options(const Golden& golden, int speculative_tokens) {
  EngineOptions options;
  options.model_dir = golden.model_dir;
  options.device = "cpu";
  options.max_model_len = 192;
  options.max_sequences = kNumRequests;
  options.speculative_tokens = speculative_tokens;
  return options;
}

Request RandomRequest(const Golden& golden, std::mt19937* random) {
  const auto below = [random](int n) { return static_cast<int>((*random)() % static_cast<uint32_t>(n)); };
  const std::vector<int32_t>& text = golden.prompts[1 + below(2)].tokens;  // 37 or 150 tokens
  Request request;
  const int length = 1 + below(std::min<int>(static_cast<int>(text.size()), 150));
  request.prompt.assign(text.begin(), text.begin() + length);
  SamplingParams& s = request.sampling;
  s.temperature = below(3) == 0 ? 0.0f : 0.3f + 0.1f * static_cast<float>(below(11));
  if (below(3) == 0) s.top_p = 0.5f + 0.1f * static_cast<float>(below(5));
  if (below(4) == 0) s.top_k = 1 + below(40);
  if (below(4) == 0) s.min_p = 0.02f * static_cast<float>(below(10));
  if (below(3) == 0) {
    s.repetition_penalty = 1.0f + 0.1f * static_cast<float>(below(5));
    s.frequency_penalty = 0.2f * static_cast<float>(below(5));
    s.presence_penalty = -0.2f * static_cast<float>(below(5));
  }
  s.seed = (*random)();
  s.max_tokens = 1 + below(48);
  s.ignore_eos = below(2) == 0;
  if (below(3) == 0) {
    s.min_tokens = below(s.max_tokens + 1);
    s.stop_token_ids = {static_cast<int32_t>(3 + below(60))};
    s.logit_bias = {{s.stop_token_ids[0], 5.0f}, {static_cast<int32_t>(70 + below(20)), 2.0f}};
  }
  s.logprobs = below(4) - 1;
  s.prompt_logprobs = below(4) == 0 ? 1 : -1;
  return request;
}

class SpeculationTest : public testing::TestWithParam<const char*> {
 protected:
  SpeculationTest() : golden_(LoadGolden(GetParam())) {
    std::mt19937 random(11);
    for (int i = 0; i < kNumRequests; ++i) requests_.push_back(RandomRequest(golden_, &random));
  }

  void RunWithoutDrafts() {
    const auto engine = MakeEngine(Options(golden_, 0));
    for (const Answer& answer : RunAll(*engine, requests_)) expected_.push_back(Bits(answer));
    EXPECT_EQ(engine->stats().draft_tokens, 0u);
  }

  void Check(const EngineOptions& options, const char* what) {
    const auto engine = MakeEngine(options);
    const std::vector<Answer> answers = RunAll(*engine, requests_);
    CheckAnswers(answers, engine->stats(), options.speculative_tokens, what, options.adapts_drafts);
  }

  // Drafts change nothing; prints that there were some.
  void CheckAnswers(const std::vector<Answer>& answers, const EngineStats& stats, int num_drafts, const char* what,
                    bool adapts = false) {
    for (size_t i = 0; i < answers.size(); ++i) {
      EXPECT_EQ(Bits(answers[i]), expected_[i]) << what << ", request " << i;
    }
    std::printf(
        "[ measured ] k = %d, %s: %llu steps, %llu of %llu drafts accepted, %llu preemptions\n", num_drafts, what,
        static_cast<unsigned long long>(stats.steps), static_cast<unsigned long long>(stats.accepted_draft_tokens),
        static_cast<unsigned long long>(stats.draft_tokens), static_cast<unsigned long long>(stats.preemptions));
    if (adapts) return;  // to what steps take on this machine, now: there need be none, or none that is right
    EXPECT_GT(stats.accepted_draft_tokens, 0u);
    EXPECT_GT(stats.draft_tokens, stats.accepted_draft_tokens);
    const auto& by_place = stats.accepted_by_place;
    EXPECT_EQ(std::accumulate(by_place.begin(), by_place.end(), uint64_t{0}), stats.accepted_draft_tokens);
    EXPECT_TRUE(std::is_sorted(by_place.rbegin(), by_place.rend()));
    EXPECT_LE(by_place[0], stats.drafts);
    EXPECT_LE(stats.drafts, stats.draft_tokens);
    EXPECT_LE(stats.draft_tokens, stats.drafts * static_cast<uint64_t>(num_drafts));
  }

  const Golden golden_;
  std::vector<Request> requests_;
  std::vector<std::vector<uint32_t>> expected_;
};
INSTANTIATE_TEST_SUITE_P(Family, SpeculationTest, testing::Values("v3_like", "v31"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(SpeculationTest, DraftsChangeNothing) {
  RunWithoutDrafts();
  for (int k : {1, 2, 4}) {
    EngineOptions options = Options(golden_, k);
    Check(options, "all at once");
    options.max_sequences = 1;
    Check(options, "one by one");
    options.max_sequences = 4;
    options.max_batch_tokens = 9;  // not room for every draft
    Check(options, "in small chunks");
  }
  EngineOptions options = Options(golden_, 4);
  options.adapts_drafts = true;
  Check(options, "as many as pay, all at once");
  options.max_sequences = 4;
  options.max_batch_tokens = 9;
  Check(options, "as many as pay, in small chunks");
}

TEST_P(SpeculationTest, PreemptedOrNot) {
  requests_.resize(14);
  for (size_t i = 0; i < requests_.size(); ++i) {
    requests_[i].prompt = golden_.prompts[2].tokens;
    requests_[i].prompt.resize(40 + i);
    requests_[i].sampling.max_tokens = 120;
    requests_[i].sampling.ignore_eos = true;
    requests_[i].sampling.stop_token_ids.clear();
  }
  RunWithoutDrafts();
  for (int k : {1, 3}) {
    StepLoop tight(golden_.model_dir, {64, kNumRequests, 192, {}, k}, 9);
    const std::vector<Answer> answers = tight.Run(requests_);
    CheckAnswers(answers, tight.stats(), k, "in a small cache");
    EXPECT_GT(tight.stats().preemptions, 0u);
  }
}

EngineOptions DemoOptions(int speculative_tokens) {
  EngineOptions options;
  options.model_dir = DemoDir();
  options.device = "cpu";
  options.max_model_len = 512;
  options.speculative_tokens = speculative_tokens;
  return options;
}

double ShareAccepted(const EngineStats& stats) {
  return static_cast<double>(stats.accepted_draft_tokens) / static_cast<double>(stats.draft_tokens);
}

// The demo's MTP layer was trained: most of its drafts are right, greedy and sampled.
TEST(DemoSpeculationTest, DraftsChangeNothing) {
  std::vector<Request> requests = DemoRequests(0.0f, 96);
  for (Request& request : DemoRequests(1.0f, 96)) requests.push_back(std::move(request));
  const std::vector<Answer> expected = RunAll(*MakeEngine(DemoOptions(0)), requests);
  for (int k : {1, 2, 4, -4}) {  // below 0: at most, as many as pay
    EngineOptions options = DemoOptions(std::abs(k));
    options.adapts_drafts = k < 0;
    const auto engine = MakeEngine(options);
    const std::vector<Answer> answers = RunAll(*engine, requests);
    for (size_t i = 0; i < answers.size(); ++i) EXPECT_EQ(Bits(answers[i]), Bits(expected[i])) << k << " " << i;
    const double share = ShareAccepted(engine->stats());
    std::printf("[ measured ] k = %d: %.1f %% of %llu drafts accepted in %llu steps\n", k, 100 * share,
                static_cast<unsigned long long>(engine->stats().draft_tokens),
                static_cast<unsigned long long>(engine->stats().steps));
    EXPECT_GT(share, k == 1 ? 0.9 : 0.4);
  }
}

// As many are right as the trainer says (deploy/demo/README.md, eval/eval_mtp.py: 64 tokens an answer).
TEST(DemoSpeculationTest, AcceptanceIsTheTrainers) {
  for (const auto& [temperature, trainers] : {std::pair{0.0f, 0.958}, {1.0f, 0.956}}) {
    const auto engine = MakeEngine(DemoOptions(1));
    RunAll(*engine, DemoRequests(temperature, 64));
    const double share = ShareAccepted(engine->stats());
    std::printf("[ measured ] temperature %g: %.1f %% of %llu drafts accepted, the trainer's %.1f %%\n", temperature,
                100 * share, static_cast<unsigned long long>(engine->stats().draft_tokens), 100 * trainers);
    EXPECT_NEAR(share, trainers, 0.03);
  }
}

// A copy of the demo, one of its tensors overwritten with these two bytes throughout.
void CopyDemo(const TempDir& dir, const std::string& tensor, uint16_t bits) {
  namespace fs = std::filesystem;
  for (const fs::directory_entry& entry : fs::directory_iterator(DemoDir())) {
    if (entry.is_regular_file()) fs::copy_file(entry.path(), dir / entry.path().filename().string());
  }
  std::ifstream index_file(dir / "model.safetensors.index.json");
  const auto index = nlohmann::json::parse(index_file);
  std::fstream file(dir / index.at("weight_map").at(tensor).get<std::string>(),
                    std::ios::in | std::ios::out | std::ios::binary);
  uint64_t header_bytes = 0;
  file.read(reinterpret_cast<char*>(&header_bytes), sizeof(header_bytes));
  std::string header(header_bytes, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header_bytes));
  const auto entry = nlohmann::json::parse(header).at(tensor);
  CHECK(entry.at("dtype") == "BF16", "{}", entry.dump());
  const auto begin = entry.at("data_offsets").at(0).get<uint64_t>(),
             end = entry.at("data_offsets").at(1).get<uint64_t>();
  file.seekp(static_cast<std::streamoff>(sizeof(header_bytes) + header_bytes + begin));
  for (uint64_t i = begin; i < end; i += sizeof(bits)) file.write(reinterpret_cast<const char*>(&bits), sizeof(bits));
  CHECK(file.good(), "{} not overwritten", tensor);
}

// Whatever is drafted, and be it drafted from no numbers at all.
TEST(DemoSpeculationTest, ABrokenDraftHeadChangesNothing) {
  std::vector<Request> requests = DemoRequests(0.0f, 32);
  for (Request& request : DemoRequests(1.0f, 32)) requests.push_back(std::move(request));
  const std::vector<Answer> expected = RunAll(*MakeEngine(DemoOptions(0)), requests);
  const ModelConfig config = *ModelConfig::Load(DemoDir());
  const std::string layer = absl::StrCat("model.layers.", config.num_hidden_layers, ".");
  const std::tuple<const char*, const char*, uint16_t> breaks[] = {{"eh_proj.weight", "NaN", uint16_t{0x7fc0}},
                                                                   {"eh_proj.weight", "zero", uint16_t{0}},
                                                                   {"shared_head.norm.weight", "-4", uint16_t{0xc080}}};
  for (const auto& [tensor, value, bits] : breaks) {
    const TempDir dir;
    CopyDemo(dir, layer + tensor, bits);
    EngineOptions options = DemoOptions(3);
    options.model_dir = dir.path();
    const auto engine = MakeEngine(options);
    const std::vector<Answer> answers = RunAll(*engine, requests);
    for (size_t i = 0; i < answers.size(); ++i) EXPECT_EQ(Bits(answers[i]), Bits(expected[i])) << value << " " << i;
    const double share = ShareAccepted(engine->stats());
    std::printf("[ measured ] k = 3, %s all %s: %.1f %% of %llu drafts accepted\n", tensor, value, 100 * share,
                static_cast<unsigned long long>(engine->stats().draft_tokens));
    EXPECT_LT(share, 0.3) << "it is not broken";
  }
}

}  // namespace
}  // namespace cachalot
