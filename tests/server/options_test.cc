// The command line and the config file.
#include "server/options.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

// What `cachalot ARGUMENTS` would do.
template <typename T>
T Parse(std::vector<std::string> arguments) {
  Command command = ParseCommandLine(std::move(arguments));
  if (const auto* exit = std::get_if<ExitNow>(&command); exit != nullptr && !std::holds_alternative<T>(command)) {
    ADD_FAILURE() << exit->text;
    return T();
  }
  return std::get<T>(std::move(command));
}

ExitNow Refused(std::vector<std::string> arguments) { return Parse<ExitNow>(std::move(arguments)); }

TEST(OptionsTest, AModelIsEnough) {
  const auto options = Parse<ServeOptions>({"serve", "--model", "/models/DeepSeek-V3/"});
  EXPECT_EQ(options.engine.model_dir, "/models/DeepSeek-V3/");
  EXPECT_EQ(options.served_model_name, "DeepSeek-V3");
  EXPECT_EQ(options.host, "127.0.0.1");
  EXPECT_EQ(options.port, 8000);
  EXPECT_EQ(options.grpc_port, 50051);
  EXPECT_EQ(options.engine.kv_cache_bytes, 0);
}

TEST(OptionsTest, AllOfThem) {
  const auto options = Parse<ServeOptions>({"serve",
                                            "--model",
                                            "m",
                                            "--device",
                                            "cpu",
                                            "--host",
                                            "0.0.0.0",
                                            "--port",
                                            "0",
                                            "--grpc-port=-1",
                                            "--served-model-name",
                                            "name",
                                            "--max-model-len",
                                            "1024",
                                            "--max-sequences",
                                            "8",
                                            "--max-batch-tokens",
                                            "256",
                                            "--speculative-tokens",
                                            "2",
                                            "--no-prefix-cache",
                                            "--kv-cache-memory",
                                            "8GiB",
                                            "--kv-cache-dtype",
                                            "bf16",
                                            "--activation",
                                            "fp8",
                                            "--threads",
                                            "3",
                                            "--max-waiting",
                                            "5",
                                            "--chat-template",
                                            "v3_1",
                                            "--allow-special-tokens",
                                            "--drain-timeout",
                                            "1.5",
                                            "--log-format",
                                            "json",
                                            "--log-level",
                                            "debug",
                                            "--log-requests",
                                            "prompts"});
  EXPECT_EQ(options.engine.device, "cpu");
  EXPECT_EQ(options.host, "0.0.0.0");
  EXPECT_EQ(options.port, 0);
  EXPECT_EQ(options.grpc_port, -1);
  EXPECT_EQ(options.served_model_name, "name");
  EXPECT_EQ(options.engine.max_model_len, 1024);
  EXPECT_EQ(options.engine.max_sequences, 8);
  EXPECT_EQ(options.engine.max_batch_tokens, 256);
  EXPECT_EQ(options.engine.speculative_tokens, 2);
  EXPECT_FALSE(options.engine.adapts_drafts);
  EXPECT_FALSE(options.engine.prefix_cache);
  EXPECT_EQ(options.engine.kv_cache_bytes, int64_t{8} << 30);
  EXPECT_EQ(options.engine.kv_cache_dtype, "bf16");
  EXPECT_EQ(options.engine.activation, "fp8");
  EXPECT_EQ(options.engine.num_threads, 3);
  EXPECT_EQ(options.engine.max_waiting, 5);
  EXPECT_EQ(options.chat_template, "v3_1");
  EXPECT_TRUE(options.allow_special_tokens);
  EXPECT_EQ(options.drain_timeout, absl::Milliseconds(1500));
  EXPECT_EQ(options.log_format, LogFormat::kJson);
  EXPECT_EQ(options.log_level, "debug");
  EXPECT_EQ(options.log_requests, RequestLog::kPrompts);
  EXPECT_EQ(Parse<ServeOptions>({"serve", "--model", "m", "--port", "1", "--port", "2"}).port, 2);  // the last counts
  const auto adaptive = Parse<ServeOptions>({"serve", "--model", "m", "--speculative-tokens", "auto"}).engine;
  EXPECT_TRUE(adaptive.adapts_drafts);
  EXPECT_EQ(adaptive.speculative_tokens, kMostAdaptiveTokens);
}

TEST(OptionsTest, NodesAreThoseOfLeaderWorkerSet) {
  setenv("LWS_GROUP_SIZE", "4", 1);
  setenv("LWS_WORKER_INDEX", "3", 1);
  setenv("LWS_LEADER_ADDRESS", "whale-0.pod", 1);
  const auto from_pod = Parse<ServeOptions>({"serve", "--model", "m"});
  const auto asked = Parse<ServeOptions>({"serve", "--model", "m", "--nodes", "2", "--node-rank", "0", "--leader",
                                          "[::1]:7", "--cluster-secret-file", "f", "--join-timeout", "9"});
  for (const char* name : {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}) unsetenv(name);
  EXPECT_EQ(from_pod.engine.num_nodes, 4);
  EXPECT_EQ(from_pod.engine.node_rank, 3);
  EXPECT_EQ(from_pod.engine.leader, "whale-0.pod:29500");
  EXPECT_EQ(from_pod.engine.join_timeout_seconds, 300);
  EXPECT_EQ(asked.engine.num_nodes, 2);
  EXPECT_EQ(asked.engine.node_rank, 0);
  EXPECT_EQ(asked.engine.leader, "[::1]:7");
  EXPECT_EQ(asked.engine.cluster_secret_file, "f");
  EXPECT_EQ(asked.engine.join_timeout_seconds, 9);
  EXPECT_EQ(Parse<ServeOptions>({"serve", "--model", "m"}).engine.num_nodes, 1);
}

TEST(OptionsTest, GenerationConfig) {
  EXPECT_EQ(Parse<ServeOptions>({"serve", "--model", "m"}).generation_config, "auto");
  EXPECT_EQ(Parse<ServeOptions>({"serve", "--model", "m", "--generation-config", "none"}).generation_config, "none");
  EXPECT_EQ(Parse<ChatOptions>({"chat", "--model", "m", "--generation-config", "none"}).serve.generation_config,
            "none");
}

TEST(OptionsTest, Chat) {
  const auto remote = Parse<ChatOptions>({"chat", "--url", "http://h:1", "--served-model-name", "m", "--system", "s",
                                          "--max-tokens", "7", "--temperature", "0.5", "--thinking"});
  EXPECT_EQ(remote.url, "http://h:1");
  EXPECT_EQ(remote.model, "m");
  EXPECT_EQ(remote.system, "s");
  EXPECT_EQ(remote.max_tokens, 7);
  EXPECT_EQ(remote.temperature, 0.5f);
  EXPECT_TRUE(remote.thinking);
  const auto local =
      Parse<ChatOptions>({"chat", "--model", "dir", "--chat-template", "r1", "--kv-cache-memory", "1GiB"});
  EXPECT_EQ(local.serve.engine.model_dir, "dir");
  EXPECT_EQ(local.serve.chat_template, "r1");
  EXPECT_EQ(local.serve.engine.kv_cache_bytes, int64_t{1} << 30);
  EXPECT_FALSE(local.temperature.has_value());
}

TEST(OptionsTest, InspectHelpAndVersion) {
  const auto inspect = Parse<InspectOptions>({"inspect", "--model", "m", "--deep"});
  EXPECT_EQ(inspect.model_dir, "m");
  EXPECT_TRUE(inspect.deep);
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {"--help"}, {"-h"}, {"--version"}, {"serve", "--help"}, {"chat", "--help"}, {"inspect", "--help"}}) {
    const ExitNow exit = Refused(arguments);
    EXPECT_EQ(exit.code, 0);
    EXPECT_FALSE(exit.text.empty());
  }
  EXPECT_NE(Refused({"serve", "--help"}).text.find("--kv-cache-memory"), std::string::npos);
}

TEST(OptionsTest, MistakesAreOneLineThatNamesThem) {
  const struct {
    std::vector<std::string> arguments;
    const char* named;
  } kCases[] = {
      {{"sevre"}, "sevre"},
      {{"serve"}, "--model"},
      {{"serve", "--model", "m", "--prot", "1"}, "--prot"},
      {{"serve", "--model", "m", "--port", "65536"}, "--port"},
      {{"serve", "--model", "m", "--port", "x"}, "--port"},
      {{"serve", "--model", "m", "--grpc-port", "-2"}, "--grpc-port"},
      {{"serve", "--model", "m", "--device", "tpu"}, "--device"},
      {{"serve", "--model", "m", "--max-sequences", "0"}, "--max-sequences"},
      {{"serve", "--model", "m", "--speculative-tokens", "9"}, "--speculative-tokens"},
      {{"serve", "--model", "m", "--speculative-tokens", "1.5"}, "0 to 8 or auto"},
      {{"serve", "--model", "m", "--speculative-tokens", "-1"}, "--speculative-tokens"},
      {{"serve", "--model", "m", "--kv-cache-dtype", "int4"}, "--kv-cache-dtype"},
      {{"serve", "--model", "m", "--kv-cache-memory", "lots"}, "--kv-cache-memory"},
      {{"serve", "--model", "m", "--config", "/no/such/file"}, "/no/such/file"},
      {{"serve", "--model", "m", "--chat-template", "v4"}, "--chat-template"},
      {{"serve", "--model", "m", "--generation-config", "vllm"}, "--generation-config"},
      {{"serve", "--model", "m", "--log-format", "xml"}, "--log-format"},
      {{"serve", "--model", "m", "--log-requests", "all"}, "--log-requests"},
      {{"serve", "--model", "m", "--drain-timeout", "-1"}, "--drain-timeout"},
      {{"serve", "--model", "m", "--drain-timeout", "nan"}, "--drain-timeout"},
      {{"serve", "--model", "m", "--served-model-name", "\xff"}, "--served-model-name"},
      {{"serve", "--model", "m", "--max-batch-tokens", "2147483647"}, "--max-batch-tokens"},
      {{"serve", "--model", "m", "--log-format", "1"}, "--log-format"},
      {{"serve", "--bogus"}, "--bogus"},
      {{"chat"}, "--model or --url"},
      {{"chat", "--model", "m", "--url", "http://h"}, "--url"},
      {{"chat", "--model", "m", "--temperature", "3"}, "--temperature"},
      {{"inspect"}, "--model"},
  };
  for (const auto& test : kCases) {
    const ExitNow exit = Refused(test.arguments);
    EXPECT_EQ(exit.code, 1);
    EXPECT_NE(exit.text.find(test.named), std::string::npos) << exit.text;
    EXPECT_EQ(exit.text.find('\n'), exit.text.size() - 1) << exit.text;
  }
  EXPECT_EQ(Refused({}).code, 1);
}

class ConfigFileTest : public testing::Test {
 protected:
  void Write(const std::string& text) { std::ofstream(path_) << text; }
  void TearDown() override { std::filesystem::remove(path_); }
  const std::string path_ = absl::StrCat(testing::TempDir(), "/cachalot_options_", getpid(), ".toml");
};

TEST_F(ConfigFileTest, GivesWhatTheCommandLineDoesNot) {
  Write("model = \"from/file\"\nmax-sequences = 7\nport = 1\n");
  const auto options = Parse<ServeOptions>({"serve", "--config", path_, "--port", "2"});
  EXPECT_EQ(options.engine.model_dir, "from/file");
  EXPECT_EQ(options.engine.max_sequences, 7);
  EXPECT_EQ(options.port, 2);
}

TEST_F(ConfigFileTest, UnknownAndWrongOptionsAreRefused) {
  Write("max-seqences = 7\n");
  EXPECT_NE(Refused({"serve", "--model", "m", "--config", path_}).text.find("max-seqences"), std::string::npos);
  Write("max-sequences = 0\n");
  EXPECT_NE(Refused({"serve", "--model", "m", "--config", path_}).text.find("max-sequences"), std::string::npos);
}

TEST_F(ConfigFileTest, IsToml) {
  Write(
      "model = \"a # b\"  # a comment\nserved-model-name = 'c'\nallow-special-tokens = true\ndrain-timeout = 1.5\n"
      "max-batch-tokens = 1_000\nport = 0x10\n");
  const auto options = Parse<ServeOptions>({"serve", "--config", path_});
  EXPECT_EQ(options.engine.model_dir, "a # b");
  EXPECT_EQ(options.served_model_name, "c");
  EXPECT_TRUE(options.allow_special_tokens);
  EXPECT_EQ(options.drain_timeout, absl::Seconds(1.5));
  EXPECT_EQ(options.engine.max_batch_tokens, 1000);
  EXPECT_EQ(options.port, 16);
  for (const char* text : {"port = [1, 2]\n", "[network]\nport = 1\n", "port = 1\nport = 2\n", "model = \"x\n",
                           "port\n", "port = nan\n"}) {
    Write(text);
    const ExitNow exit = Refused({"serve", "--model", "m", "--config", path_});
    EXPECT_EQ(exit.code, 1) << text;
    EXPECT_NE(exit.text.find(path_), std::string::npos) << exit.text;
    EXPECT_EQ(exit.text.find('\n'), exit.text.size() - 1) << exit.text;
  }
}

TEST(ParseMemoryTest, SizesAndShares) {
  EXPECT_EQ(ParseMemory("8GiB")->bytes, int64_t{8} << 30);
  EXPECT_EQ(ParseMemory("0.5 gib")->bytes, int64_t{1} << 29);
  EXPECT_EQ(ParseMemory("512MiB")->bytes, int64_t{512} << 20);
  EXPECT_EQ(ParseMemory("2GB")->bytes, 2'000'000'000);
  EXPECT_EQ(ParseMemory("4096")->bytes, 4096);
  EXPECT_EQ(ParseMemory("4096")->share, 0);
  EXPECT_EQ(ParseMemory("80%")->share, 0.8);
  EXPECT_EQ(ParseMemory("80%")->bytes, 0);
  for (const char* text : {"", "GiB", "8Gib8", "-1", "0", "0%", "101%", "1e3", "8 G", "99999999TiB", "80%%"}) {
    EXPECT_FALSE(ParseMemory(text).ok()) << text;
  }
}

}  // namespace
}  // namespace cachalot
