// NOTE: CLI11 throws; nothing leaves this file but values.
#include "server/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/config_file.h"
#include "server/text/chat_template.h"
#include "server/text/utf8.h"

namespace cachalot {
namespace {

constexpr char kUsage[] =
    "Cachalot serves DeepSeek-V3-family models over OpenAI's HTTP API and gRPC.\n"
    "Usage: cachalot COMMAND [OPTIONS]\n"
    "\n"
    "Commands:\n"
    "  serve      load a checkpoint and serve it:  cachalot serve --model DIR\n"
    "  chat       talk to a model, here or on a server:  cachalot chat --model DIR\n"
    "  inspect    report what a checkpoint holds and what is wrong with it:  cachalot inspect --model DIR\n"
    "  plan       say what a model takes of how many GPUs:  cachalot plan --model DIR --gpus 8 --gpu-memory 80GiB\n"
    "\n"
    "Options:\n"
    "  -h,--help  this text; 'cachalot COMMAND --help' has a command's options\n"
    "  --version  print the version\n";

constexpr int kMaxInt = std::numeric_limits<int>::max();

// Runs the parser; true if the command is to be run, otherwise `exit` says what to print.
bool Parse(CLI::App* app, std::vector<std::string> arguments, ExitNow* exit) {
  std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them from the back
  try {
    app->parse(std::move(arguments));
    return true;
  } catch (const CLI::CallForHelp&) {
    *exit = {.code = 0, .text = app->help()};
  } catch (const CLI::Error& error) {
    *exit = {.code = 1, .text = absl::StrCat(app->get_name(), ": ", error.what(), " (--help lists the options)\n")};
  } catch (const std::exception& error) {
    *exit = {.code = 1, .text = absl::StrCat(app->get_name(), ": ", error.what(), "\n")};
  }
  return false;
}

std::string DirectoryName(const std::string& directory) {
  std::error_code ignored;
  std::filesystem::path path = std::filesystem::weakly_canonical(directory, ignored);
  if (!path.has_filename()) path = path.parent_path();
  return path.filename().empty() ? "model" : path.filename().string();
}

// Checks that say what they want in the help text's own words.
void MustBeWithin(CLI::Option* option, double low, double high, const char* type_name = "N") {
  // NOTE: Range lets through what is no number.
  const auto is_number = [](std::string& text) { return text == "nan" || text == "-nan" ? "not a number" : ""; };
  option->check(CLI::Range(low, high).description(""))->check(CLI::Validator(is_number, ""))->type_name(type_name);
}
void MustBeOneOf(CLI::Option* option, const std::vector<std::string>& names) {
  option->check(CLI::IsMember(names).description(""))->type_name(absl::StrJoin(names, "|"));
}
const std::vector<std::string>& ChatTemplateNames() {
  static const std::vector<std::string> names = absl::StrSplit(ChatTemplate::Names(), ", ");
  return names;
}

constexpr char kServeFooter[] =
    "\nExamples:\n"
    "  cachalot serve --model /models/DeepSeek-V3                      everything by default, on 127.0.0.1:8000\n"
    "  cachalot serve --model DIR --host 0.0.0.0 --max-sequences 256   more at once, for other machines too\n"
    "  cachalot serve --config serve.toml                              options from a file: max-sequences = 256\n"
    "\n"
    "Then:\n"
    "  curl localhost:8000/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'\n"
    "  curl localhost:8000/metrics\n";

constexpr char kChatFooter[] =
    "\nReads a line a turn from the terminal (or from a pipe); /reset forgets the conversation, /exit or Ctrl-D "
    "leaves,\n"
    "Ctrl-C stops an answer.\n"
    "\nExamples:\n"
    "  cachalot chat --model DIR                  loads the model itself\n"
    "  cachalot chat --url http://host:8000       talks to a server\n";

void AddSpeculativeTokens(EngineOptions* engine, CLI::App* app) {
  const auto parse = [](const std::string& text, int* num_tokens) {
    return absl::SimpleAtoi(text, num_tokens) && *num_tokens >= 0 && *num_tokens <= kMaxSpeculativeTokens;
  };
  const auto check = [parse](std::string& text) -> std::string {
    int num_tokens = 0;
    if (text == "auto" || parse(text, &num_tokens)) return "";
    return absl::StrCat("found ", text, ", expected 0 to ", kMaxSpeculativeTokens, " or auto");
  };
  const auto take = [engine, parse](const std::string& text) {
    engine->adapts_drafts = text == "auto";
    if (engine->adapts_drafts) engine->speculative_tokens = kMostAdaptiveTokens;
    if (!engine->adapts_drafts) parse(text, &engine->speculative_tokens);
  };
  app->add_option_function<std::string>("--speculative-tokens", take,
                                        "tokens that the checkpoint's MTP layer drafts a step; they change no token; "
                                        "auto: up to 2, in each step as many as pay [0]")
      ->check(CLI::Validator(check, ""))
      ->type_name("N|auto");
}

// Options of the engine, which several commands have.
void AddEngineOptions(EngineOptions* engine, std::string* kv_cache_memory, CLI::App* app) {
  MustBeOneOf(app->add_option("--device", engine->device, "where the model runs"), {"auto", "cpu", "cuda"});
  MustBeWithin(app->add_option("--max-model-len", engine->max_model_len,
                               "tokens of one request, prompt and answer; 0: the model's"),
               0, kMaxModelLen);
  MustBeWithin(app->add_option("--max-sequences", engine->max_sequences, "requests that run at once; others wait"), 1,
               kMaxSequences);
  MustBeWithin(
      app->add_option("--max-batch-tokens", engine->max_batch_tokens,
                      "tokens of one step; less: steadier streams, more: faster prompts; 0: 512, on a GPU 4096"),
      0, kMaxBatchTokens);
  AddSpeculativeTokens(engine, app);
  app->add_flag_function(
      "--no-prefix-cache", [engine](int64_t count) { engine->prefix_cache = count <= 0; },
      "compute every prompt from its start, even where another began the same");
  MustBeWithin(
      app->add_option("--max-waiting", engine->max_waiting, "requests that wait; one more is refused with 429"), 1,
      kMaxWaiting);
  app->add_option("--kv-cache-memory", *kv_cache_memory,
                  "8GiB, or 80% of the memory that the model leaves free [what is needed]")
      ->type_name("SIZE");
  MustBeOneOf(app->add_option("--kv-cache-dtype", engine->kv_cache_dtype,
                              "type of the KV cache [f32 on the CPU, bf16 on the GPU]"),
              {"f32", "bf16", "fp8"});
  MustBeOneOf(app->add_option("--activation", engine->activation, "type of activations"),
              {"auto", "f32", "fp8", "fp8-f32"});
  app->add_flag("--random-weights", engine->random_weights,
                "make weights up: a model of config.json alone, to measure with (GPU)");
  MustBeWithin(
      app->add_option("--ranks", engine->num_ranks,
                      "GPUs that the experts are spread over, each with sequences and a cache of its own; on the "
                      "CPU threads, which test what GPUs do"),
      1, kMaxRanks);
  MustBeWithin(app->add_option("--redundant-experts", engine->num_redundant_experts,
                               "copies of experts over all ranks, beside one of each, to share their tokens"),
               0, kMaxRedundantExperts);
  MustBeWithin(app->add_option("--threads", engine->num_threads, "CPU threads of the model; 0: one per core"), 0,
               kMaxThreads);
}

// Of LeaderWorkerSet's pods by default, which are told all but the port.
constexpr char kLeaderPort[] = "29500";

void AddNodeOptions(EngineOptions* engine, CLI::App* app) {
  MustBeWithin(app->add_option("--nodes", engine->num_nodes,
                               "processes that the experts are spread over, with --ranks of them each, on the CPU; all "
                               "serve [LWS_GROUP_SIZE]")
                   ->envname("LWS_GROUP_SIZE"),
               1, kMaxNodes);
  MustBeWithin(app->add_option("--node-rank", engine->node_rank, "which of them this is, from 0 [LWS_WORKER_INDEX]")
                   ->envname("LWS_WORKER_INDEX"),
               0, kMaxNodes - 1);
  app->add_option("--leader", engine->leader, "where node 0 listens for the others [LWS_LEADER_ADDRESS, port 29500]")
      ->envname("LWS_LEADER_ADDRESS")
      ->type_name("HOST:PORT");
  app->add_option("--cluster-secret-file", engine->cluster_secret_file,
                  "a secret that all nodes must have; it is never sent")
      ->type_name("FILE");
  MustBeWithin(
      app->add_option("--join-timeout", engine->join_timeout_seconds, "that nodes wait for each other at start"), 1,
      kMaxJoinTimeout, "SECONDS");
}

void AddChatTemplateOption(std::string* chat_template, CLI::App* app) {
  MustBeOneOf(app->add_option("--chat-template", *chat_template, "how chats are written [as the checkpoint's own]"),
              ChatTemplateNames());
}

void AddGenerationConfigOption(std::string* generation_config, CLI::App* app) {
  MustBeOneOf(
      app->add_option("--generation-config", *generation_config,
                      "how requests that say nothing are drawn: auto as the checkpoint's generation_config.json "
                      "says, none at temperature 1"),
      {"auto", "none"});
}

// The texts become enums in FinishLogs.
struct LogTexts {
  std::string format = "text", requests = "none";
};

void AddLogOptions(ServeOptions* options, LogTexts* texts, CLI::App* app) {
  MustBeOneOf(app->add_option("--log-format", texts->format, "lines for people, or JSON objects"), {"text", "json"});
  MustBeOneOf(app->add_option("--log-level", options->log_level, "least important messages to log"),
              {"debug", "info", "warning", "error"});
  MustBeOneOf(app->add_option("--log-requests", texts->requests,
                              "a line a request: counts and times, or prompts and answers too"),
              {"none", "summary", "prompts"});
}

void FinishLogs(const LogTexts& texts, ServeOptions* options) {
  options->log_format = texts.format == "json" ? LogFormat::kJson : LogFormat::kText;
  options->log_requests = texts.requests == "none"      ? RequestLog::kNone
                          : texts.requests == "summary" ? RequestLog::kSummary
                                                        : RequestLog::kPrompts;
}

// Sizes and names that need more than CLI11's checks; an error's text is for stderr.
std::optional<ExitNow> FinishServe(const char* command, const std::string& kv_cache_memory, ServeOptions* options) {
  if (!kv_cache_memory.empty()) {
    const absl::StatusOr<MemorySize> size = ParseMemory(kv_cache_memory);
    if (!size.ok()) {
      return ExitNow{1, absl::StrCat("cachalot ", command, ": --kv-cache-memory: ", size.status().message(), "\n")};
    }
    options->engine.kv_cache_bytes = size->bytes;
    options->engine.kv_cache_share = size->share;
  }
  if (options->served_model_name.empty()) options->served_model_name = DirectoryName(options->engine.model_dir);
  if (FindInvalidUtf8(options->served_model_name).has_value()) {
    return ExitNow{1, absl::StrCat("cachalot ", command, ": --served-model-name: the name is not valid UTF-8\n")};
  }
  return std::nullopt;
}

// Puts what the file of the last --config says before all arguments, so that these count more.
absl::Status PrependConfig(std::vector<std::string>* arguments) {
  std::string path;
  for (size_t i = 0; i < arguments->size(); ++i) {
    const std::string& argument = (*arguments)[i];
    if (argument == "--config" && i + 1 < arguments->size()) path = (*arguments)[i + 1];
    if (argument.rfind("--config=", 0) == 0) path = argument.substr(sizeof("--config=") - 1);
  }
  if (path.empty()) return absl::OkStatus();
  absl::StatusOr<std::vector<std::string>> from_file = ReadConfigFile(path);
  if (!from_file.ok()) return from_file.status();
  arguments->insert(arguments->begin(), from_file->begin(), from_file->end());
  return absl::OkStatus();
}

Command ParseServe(std::vector<std::string> arguments) {
  ServeOptions options;
  std::string kv_cache_memory;
  double drain_seconds = absl::ToDoubleSeconds(options.drain_timeout);
  CLI::App app("Loads a checkpoint and serves it over HTTP (OpenAI's API) and gRPC until SIGTERM or SIGINT.",
               "cachalot serve");
  app.footer(kServeFooter);
  app.option_defaults()->always_capture_default()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.option_defaults()->group("Model");
  app.add_option("--model", options.engine.model_dir, "checkpoint directory (required)")->type_name("DIR");
  app.add_option("--served-model-name", options.served_model_name, "name clients use [the directory's name]")
      ->type_name("NAME");
  AddChatTemplateOption(&options.chat_template, &app);
  AddGenerationConfigOption(&options.generation_config, &app);
  app.add_flag("--allow-special-tokens", options.allow_special_tokens,
               "texts of messages may hold special tokens, and so forge turns");
  app.option_defaults()->group("Network");
  app.add_option("--host", options.host, "name or address to listen on")->type_name("HOST");
  MustBeWithin(app.add_option("--port", options.port, "HTTP port; 0: any free one"), 0, 65535);
  MustBeWithin(app.add_option("--grpc-port", options.grpc_port, "gRPC port; 0: any free one; -1: no gRPC"), -1, 65535);
  MustBeWithin(app.add_option("--drain-timeout", drain_seconds, "what requests in flight have to end after SIGTERM"), 0,
               86400, "SECONDS");
  app.option_defaults()->group("Engine");
  AddEngineOptions(&options.engine, &kv_cache_memory, &app);
  app.option_defaults()->group("Nodes");
  AddNodeOptions(&options.engine, &app);
  app.option_defaults()->group("Logs");
  LogTexts log_texts;
  AddLogOptions(&options, &log_texts, &app);
  app.option_defaults()->group("Options");
  std::string config;
  app.add_option("--config", config, "file of options in TOML, e.g. max-sequences = 128")->type_name("FILE");

  ExitNow exit;
  if (absl::Status status = PrependConfig(&arguments); !status.ok()) {
    return ExitNow{1, absl::StrCat("cachalot serve: ", status.message(), "\n")};
  }
  if (!Parse(&app, std::move(arguments), &exit)) return exit;
  if (options.engine.model_dir.empty()) {
    return ExitNow{1, "cachalot serve: --model is required (--help lists the options)\n"};
  }
  std::string& leader = options.engine.leader;
  if (!leader.empty() && !absl::StrContains(leader, ':')) absl::StrAppend(&leader, ":", kLeaderPort);
  FinishLogs(log_texts, &options);
  if (const auto error = FinishServe("serve", kv_cache_memory, &options)) return *error;
  options.drain_timeout = absl::Seconds(drain_seconds);
  return options;
}

Command ParseChat(std::vector<std::string> arguments) {
  ChatOptions options;
  std::string kv_cache_memory;
  CLI::App app("Talks to a model: one on a server, or one that it loads itself.", "cachalot chat");
  app.footer(kChatFooter);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  auto* url = app.add_option("--url", options.url, "a server's address, http://HOST:PORT")->type_name("URL");
  auto* model =
      app.add_option("--model", options.serve.engine.model_dir, "checkpoint directory to load")->type_name("DIR");
  url->excludes(model);
  app.add_option("--served-model-name", options.model, "model to ask the server for [its first]")->type_name("NAME");
  app.add_option("--system", options.system, "system message")->type_name("TEXT");
  MustBeWithin(
      app.add_option("--max-tokens", options.max_tokens, "tokens of an answer at most [what the context holds]"), 1,
      kMaxInt);
  MustBeWithin(
      app.add_option("--temperature", options.temperature, "0: the likeliest token always [the server's default]"), 0,
      2, "T");
  app.add_flag("--thinking", options.thinking, "let the model think first, where its template knows both ways");
  app.option_defaults()->group("With --model")->always_capture_default();
  AddChatTemplateOption(&options.serve.chat_template, &app);
  AddGenerationConfigOption(&options.serve.generation_config, &app);
  options.serve.engine.max_sequences = 1;
  AddEngineOptions(&options.serve.engine, &kv_cache_memory, &app);

  ExitNow exit;
  if (!Parse(&app, std::move(arguments), &exit)) return exit;
  if (options.url.empty() && options.serve.engine.model_dir.empty()) {
    return ExitNow{1, "cachalot chat: --model or --url is required (--help lists the options)\n"};
  }
  if (const auto error = FinishServe("chat", kv_cache_memory, &options.serve)) return *error;
  return options;
}

Command ParseInspect(std::vector<std::string> arguments) {
  InspectOptions options;
  CLI::App app("Reports what a checkpoint holds and what is wrong with it. Exit code 1 if anything is.",
               "cachalot inspect");
  app.add_option("--model", options.model_dir, "checkpoint directory")->required()->type_name("DIR");
  app.add_flag("--deep", options.deep, "read every weight and look for NaN");
  ExitNow exit;
  if (!Parse(&app, std::move(arguments), &exit)) return exit;
  return options;
}

// "131072" or "128K".
bool ParseTokens(const std::string& text, int* tokens) {
  const bool is_k = !text.empty() && (text.back() == 'K' || text.back() == 'k');
  return absl::SimpleAtoi(text.substr(0, text.size() - (is_k ? 1 : 0)), tokens) && *tokens > 0 &&
         *tokens <= kMaxModelLen && (!is_k || (*tokens *= 1024) <= kMaxModelLen);
}

Command ParsePlan(std::vector<std::string> arguments) {
  PlanOptions options;
  std::string memory, context = "4096";
  options.engine.max_sequences = 128;
  CLI::App app(
      "Says what a model takes of so many GPUs, a rank each, how many tokens fit, and how fast that could be. The "
      "directory may hold a config.json alone, and no GPU need be there. Exit code 1 if it does not fit.",
      "cachalot plan");
  app.option_defaults()->always_capture_default()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--model", options.engine.model_dir, "directory of the checkpoint, or of its config.json")
      ->required()
      ->type_name("DIR");
  MustBeWithin(app.add_option("--gpus", options.num_gpus, "how many")->required(), 1, kMaxInt);
  app.add_option("--gpu-memory", memory, "of each, as it is sold: 80GiB, 141GB")->required()->type_name("SIZE");
  app.add_option("--context", context, "tokens of a sequence, for the expected step: 4096, 128K")->type_name("N");
  MustBeWithin(app.add_option("--max-sequences", options.engine.max_sequences, "of a rank at once"), 1, kMaxSequences);
  MustBeWithin(app.add_option("--max-batch-tokens", options.engine.max_batch_tokens,
                              "of a rank's step; 0: 16384 of all ranks, 256 to 4096 of each"),
               0, kMaxBatchTokens);
  MustBeOneOf(app.add_option("--kv-cache-dtype", options.engine.kv_cache_dtype, "type of the KV cache [bf16]"),
              {"bf16", "fp8"});
  MustBeWithin(app.add_option("--speculative-tokens", options.engine.speculative_tokens, "with room for the MTP layer"),
               0, kMaxSpeculativeTokens);
  app.add_flag("--table", options.has_table, "other numbers of GPUs too");
  ExitNow exit;
  if (!Parse(&app, std::move(arguments), &exit)) return exit;
  const auto size = ParseMemory(memory);
  if (!size.ok() || size->bytes == 0) {
    return ExitNow{1, absl::StrCat("cachalot plan: --gpu-memory: '", memory, "' is no size: write 80GiB or 141GB\n")};
  }
  options.gpu_memory = size->bytes;
  if (!ParseTokens(context, &options.context)) {
    return ExitNow{
        1, absl::StrCat("cachalot plan: --context: '", context, "' is no number of tokens: write 4096 or 128K\n")};
  }
  return options;
}

}  // namespace

Command ParseCommandLine(std::vector<std::string> arguments) {
  if (arguments.empty()) return ExitNow{1, kUsage};
  const std::string command = std::move(arguments.front());
  arguments.erase(arguments.begin());
  if (command == "serve") return ParseServe(std::move(arguments));
  if (command == "chat") return ParseChat(std::move(arguments));
  if (command == "inspect") return ParseInspect(std::move(arguments));
  if (command == "plan") return ParsePlan(std::move(arguments));
  if (command == "-h" || command == "--help") return ExitNow{0, kUsage};
  if (command == "--version") return ExitNow{0, std::string("cachalot ").append(Version()).append("\n")};
  return ExitNow{1, absl::StrCat("cachalot: there is no command '", command, "' (--help lists them)\n")};
}

absl::StatusOr<MemorySize> ParseMemory(std::string_view text) {
  constexpr struct {
    std::string_view name;
    double bytes;
  } kUnits[] = {
      {"", 1},     {"b", 1},    {"kib", 1024.0}, {"mib", 1048576.0}, {"gib", 1073741824.0}, {"tib", 1099511627776.0},
      {"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9},     {"tb", 1e12}};
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  const std::string unit =
      absl::AsciiStrToLower(absl::StripAsciiWhitespace(absl::string_view(text.data() + digits, text.size() - digits)));
  double number = 0, scale = 0;
  const bool is_number = absl::SimpleAtod(absl::string_view(text.data(), digits), &number);
  if (unit == "%" && is_number && number > 0 && number <= 100) return MemorySize{.share = number / 100};
  for (const auto& known : kUnits) {
    if (unit == known.name) scale = known.bytes;
  }
  const double bytes = number * scale;
  if (is_number && bytes >= 1 && bytes < 9e18) return MemorySize{.bytes = static_cast<int64_t>(bytes)};
  return absl::InvalidArgumentError(
      absl::StrCat("'", absl::string_view(text.data(), text.size()), "' is no size: write 8GiB, 512MiB or 80%"));
}

std::string_view Version() { return CACHALOT_VERSION; }

}  // namespace cachalot
