// The tokenizer files of a checkpoint, JSON to plain structs.
#include "server/text/tokenizer_files.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string_view>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace cachalot {
namespace {

using nlohmann::json;

// Bounds on what a hostile file can cost. The largest tokenizer.json known is 33 MB, nested 6 deep.
constexpr std::streamoff kMaxFileBytes = 64 << 20;
constexpr int kMaxNesting = 64;

// What ByteLevel with use_regex splits by (GPT-2's pattern).
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string Quoted(std::string_view text) {
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(std::string(text.substr(0, 100))), "\"");
}

absl::Status Malformed(const std::string& what) { return absl::InvalidArgumentError(what); }
absl::Status Unsupported(const std::string& what) {
  return absl::UnimplementedError(absl::StrCat(what, " is not supported"));
}

absl::Status InFile(const std::string& path, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// How deep arrays and objects are nested, if `text` is JSON.
int NestingOf(std::string_view text) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file.is_open()) {
    const int error = errno;
    const std::string message = absl::StrCat(path, ": ", std::strerror(error));
    return error == ENOENT ? absl::NotFoundError(message) : absl::InvalidArgumentError(message);
  }
  const std::streamoff size = file.tellg();
  if (size < 0 || size > kMaxFileBytes) return InFile(path, Malformed("not a file of at most 64 MiB"));
  std::string text(static_cast<size_t>(size), '\0');
  if (!file.seekg(0).read(text.data(), size)) return InFile(path, Malformed("cannot be read"));
  return text;
}

absl::StatusOr<json> ReadJson(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadText(path);
  if (!text.ok()) return text.status();
  if (NestingOf(*text) > kMaxNesting) return InFile(path, Malformed("nested too deeply"));
  json value = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return InFile(path, Malformed("not JSON"));
  if (!value.is_object()) return InFile(path, Malformed("not a JSON object"));
  return value;
}

// The member `key`; nullptr when `object` is no object, lacks it, or has null there.
const json* Find(const json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

const std::string* FindString(const json& object, const char* key) {
  const json* value = Find(object, key);
  return value == nullptr ? nullptr : value->get_ptr<const json::string_t*>();
}

// The string at `key`, for comparing with the names of types; empty when there is none.
std::string_view TypeAt(const json& object, const char* key = "type") {
  const std::string* value = FindString(object, key);
  return value == nullptr ? std::string_view() : std::string_view(*value);
}

absl::StatusOr<bool> ReadBool(const json& object, const char* key, bool fallback) {
  const json* value = Find(object, key);
  if (value == nullptr) return fallback;
  const bool* flag = value->get_ptr<const json::boolean_t*>();
  if (flag == nullptr) return Malformed(absl::StrCat("\"", key, "\" is not a boolean"));
  return *flag;
}

std::optional<int32_t> TokenId(const json& value) {
  const auto* id = value.get_ptr<const json::number_unsigned_t*>();
  if (id == nullptr || *id >= static_cast<uint64_t>(kMaxTokenIds)) return std::nullopt;
  return static_cast<int32_t>(*id);
}

// --- tokenizer.json: model ---

using VocabIndex = absl::flat_hash_map<std::string_view, int32_t>;

absl::Status ReadVocab(const json& model, TokenizerFiles* files) {
  const json* vocab = Find(model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return Malformed("model.vocab is not an object");
  std::vector<bool> seen(kMaxTokenIds);
  files->vocab.reserve(vocab->size());
  for (const auto& [token, value] : vocab->items()) {
    const std::optional<int32_t> id = TokenId(value);
    if (!id.has_value()) {
      return Malformed(
          absl::StrCat("model.vocab: the id of ", Quoted(token), " is not an integer from 0 to ", kMaxTokenIds - 1));
    }
    if (token.empty()) return Malformed("model.vocab has an empty token");
    if (seen[*id]) return Malformed(absl::StrCat("model.vocab gives id ", *id, " to two tokens"));
    seen[*id] = true;
    files->vocab.emplace_back(token, *id);
  }
  return absl::OkStatus();
}

// A merge is "left right" or ["left", "right"].
std::optional<std::pair<std::string, std::string>> MergeParts(const json& merge) {
  if (const auto* text = merge.get_ptr<const json::string_t*>()) {
    const size_t space = text->find(' ');
    if (space == std::string::npos || text->find(' ', space + 1) != std::string::npos) {
      return std::nullopt;
    }
    return std::make_pair(text->substr(0, space), text->substr(space + 1));
  }
  if (!merge.is_array() || merge.size() != 2) return std::nullopt;
  const auto* left = merge[0].get_ptr<const json::string_t*>();
  const auto* right = merge[1].get_ptr<const json::string_t*>();
  if (left == nullptr || right == nullptr) return std::nullopt;
  return std::make_pair(*left, *right);
}

absl::Status ReadMerges(const json& model, TokenizerFiles* files) {
  const json* merges = Find(model, "merges");
  if (merges == nullptr || !merges->is_array()) return Malformed("model.merges is not an array");
  const VocabIndex index(files->vocab.begin(), files->vocab.end());
  files->merges.reserve(merges->size());
  for (size_t rank = 0; rank < merges->size(); ++rank) {
    const std::string name = absl::StrCat("model.merges[", rank, "]");
    const auto parts = MergeParts((*merges)[rank]);
    if (!parts.has_value()) {
      return Malformed(absl::StrCat(name, " is neither \"a b\" nor [\"a\", \"b\"]"));
    }
    const std::string tokens[] = {parts->first, parts->second, parts->first + parts->second};
    int32_t ids[3];
    for (int i = 0; i < 3; ++i) {
      const auto found = index.find(tokens[i]);
      if (found == index.end()) {
        return Malformed(absl::StrCat(name, ": ", Quoted(tokens[i]), " is not in the vocabulary"));
      }
      ids[i] = found->second;
    }
    files->merges.push_back({ids[0], ids[1], ids[2]});
  }
  return absl::OkStatus();
}

absl::Status ReadModel(const json& root, TokenizerFiles* files) {
  const json* model = Find(root, "model");
  if (model == nullptr) return Malformed("\"model\" is missing");
  if (TypeAt(*model).empty()) return Malformed("model.type is not a string");
  if (TypeAt(*model) != "BPE") return Unsupported(absl::StrCat("model type ", Quoted(TypeAt(*model))));
  // NOTE: unk_token, fuse_unk and byte_fallback say what becomes of bytes that are not in the vocabulary;
  // Tokenizer requires all 256, so they never apply.
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json* value = Find(*model, affix);
    if (value != nullptr && *value != "") return Unsupported(absl::StrCat("model.", affix));
  }
  if (const json* dropout = Find(*model, "dropout"); dropout != nullptr && *dropout != 0) {
    return Unsupported("model.dropout");
  }
  absl::StatusOr<bool> ignore_merges = ReadBool(*model, "ignore_merges", false);
  if (!ignore_merges.ok()) return ignore_merges.status();
  files->ignore_merges = *ignore_merges;
  if (absl::Status status = ReadVocab(*model, files); !status.ok()) return status;
  return ReadMerges(*model, files);
}

// --- tokenizer.json: the rest ---

absl::Status ReadNormalizer(const json& root) {
  const json* normalizer = Find(root, "normalizer");
  if (normalizer == nullptr) return absl::OkStatus();
  const json* steps = Find(*normalizer, "normalizers");
  if (TypeAt(*normalizer) == "Sequence" && steps != nullptr && steps->is_array()) {
    if (steps->empty()) return absl::OkStatus();
    return Unsupported(absl::StrCat("normalizer ", Quoted(TypeAt((*steps)[0]))));
  }
  return Unsupported(absl::StrCat("normalizer ", Quoted(TypeAt(*normalizer))));
}

absl::Status ReadSplit(const json& step, TokenizerFiles* files) {
  absl::StatusOr<bool> invert = ReadBool(step, "invert", false);
  if (!invert.ok()) return invert.status();
  if (*invert) return Unsupported("pre_tokenizer Split with \"invert\"");
  if (TypeAt(step, "behavior") != "Isolated") {
    return Unsupported(absl::StrCat("pre_tokenizer Split behavior ", Quoted(TypeAt(step, "behavior"))));
  }
  const json* pattern = Find(step, "pattern");
  if (pattern == nullptr) return Malformed("a pre_tokenizer Split has no \"pattern\"");
  const std::string* regex = FindString(*pattern, "Regex");
  if (regex == nullptr) return Unsupported("a pre_tokenizer Split pattern other than {\"Regex\": …}");
  files->split_patterns.push_back(*regex);
  return absl::OkStatus();
}

absl::Status ReadPreTokenizer(const json& root, TokenizerFiles* files) {
  const json* pre_tokenizer = Find(root, "pre_tokenizer");
  if (pre_tokenizer == nullptr) return Unsupported("a tokenizer without pre_tokenizer");
  json single = json::array();
  const json* steps = &single;
  if (TypeAt(*pre_tokenizer) == "Sequence") {
    steps = Find(*pre_tokenizer, "pretokenizers");
    if (steps == nullptr || !steps->is_array()) return Malformed("pre_tokenizer.pretokenizers is not an array");
  } else {
    single.push_back(*pre_tokenizer);
  }
  bool is_byte_level = false;
  for (const json& step : *steps) {
    if (is_byte_level) return Unsupported("a pre_tokenizer after ByteLevel");
    if (TypeAt(step) == "Split") {
      if (absl::Status status = ReadSplit(step, files); !status.ok()) return status;
    } else if (TypeAt(step) == "ByteLevel") {
      absl::StatusOr<bool> add_prefix_space = ReadBool(step, "add_prefix_space", true);
      if (!add_prefix_space.ok()) return add_prefix_space.status();
      if (*add_prefix_space) return Unsupported("pre_tokenizer ByteLevel with \"add_prefix_space\"");
      absl::StatusOr<bool> use_regex = ReadBool(step, "use_regex", true);
      if (!use_regex.ok()) return use_regex.status();
      if (*use_regex) files->split_patterns.emplace_back(kGpt2Pattern);
      is_byte_level = true;
    } else {
      return Unsupported(absl::StrCat("pre_tokenizer ", Quoted(TypeAt(step))));
    }
  }
  if (!is_byte_level) return Unsupported("a pre_tokenizer without ByteLevel");
  return absl::OkStatus();
}

absl::Status ReadDecoder(const json& root) {
  const json* decoder = Find(root, "decoder");
  if (decoder == nullptr) return Unsupported("a tokenizer without decoder");
  if (TypeAt(*decoder) == "ByteLevel") return absl::OkStatus();
  return Unsupported(absl::StrCat("decoder ", Quoted(TypeAt(*decoder))));
}

// What `post_processor` puts before a text; null for nothing. Only a token before it is supported.
absl::StatusOr<const std::string*> ReadPostProcessor(const json& root) {
  const json* processor = Find(root, "post_processor");
  // ByteLevel concerns offsets only.
  if (processor == nullptr || TypeAt(*processor) == "ByteLevel") return nullptr;
  const json* single = Find(*processor, "single");
  if (TypeAt(*processor) != "TemplateProcessing" || single == nullptr || !single->is_array()) {
    return Unsupported(absl::StrCat("post_processor ", Quoted(TypeAt(*processor))));
  }
  const size_t size = single->size();
  const json* first = size == 2 ? Find((*single)[0], "SpecialToken") : nullptr;
  const std::string* prepended = first == nullptr ? nullptr : FindString(*first, "id");
  const bool ends_in_text = (size == 1 || size == 2) && Find((*single)[size - 1], "Sequence") != nullptr;
  if (!ends_in_text || (size == 2 && prepended == nullptr)) {
    return Unsupported("a post_processor template other than [token,] text");
  }
  return prepended;
}

absl::Status ReadAddedTokens(const json& root, TokenizerFiles* files) {
  const json* tokens = Find(root, "added_tokens");
  if (tokens == nullptr) return absl::OkStatus();
  if (!tokens->is_array()) return Malformed("added_tokens is not an array");
  VocabIndex ids_by_content(files->vocab.begin(), files->vocab.end());
  absl::flat_hash_map<int32_t, std::string_view> contents_by_id;
  for (const auto& [content, id] : files->vocab) contents_by_id[id] = content;
  absl::flat_hash_set<std::string_view> added;
  for (size_t i = 0; i < tokens->size(); ++i) {
    const json& token = (*tokens)[i];
    const std::string name = absl::StrCat("added_tokens[", i, "]");
    const std::string* content = FindString(token, "content");
    if (content == nullptr || content->empty()) return Malformed(absl::StrCat(name, " has no content"));
    const json* id_value = Find(token, "id");
    const std::optional<int32_t> id = id_value == nullptr ? std::nullopt : TokenId(*id_value);
    if (!id.has_value()) {
      return Malformed(absl::StrCat(name, ": the id is not an integer from 0 to ", kMaxTokenIds - 1));
    }
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      absl::StatusOr<bool> flag = ReadBool(token, key, false);
      if (!flag.ok()) return Malformed(absl::StrCat(name, ": ", flag.status().message()));
      if (*flag) return Unsupported(absl::StrCat(name, " with \"", key, "\""));
    }
    absl::StatusOr<bool> special = ReadBool(token, "special", false);
    if (!special.ok()) return Malformed(absl::StrCat(name, ": ", special.status().message()));
    absl::StatusOr<bool> normalized = ReadBool(token, "normalized", !*special);
    if (!normalized.ok()) return Malformed(absl::StrCat(name, ": ", normalized.status().message()));
    // A token may also be in the vocabulary, under the same id.
    const auto [same_content, new_content] = ids_by_content.try_emplace(*content, *id);
    const auto [same_id, new_id] = contents_by_id.try_emplace(*id, *content);
    if (same_content->second != *id || same_id->second != *content || !added.insert(*content).second) {
      return Malformed(absl::StrCat(name, ": content ", Quoted(*content), " or id ", *id, " is taken"));
    }
    files->added_tokens.push_back({*content, *id, *special, *normalized});
  }
  return absl::OkStatus();
}

// --- tokenizer_config.json ---

// A token is null, a string, or an object with "content".
absl::StatusOr<std::optional<std::string>> ReadConfigToken(const json& config, const char* key) {
  const json* value = Find(config, key);
  if (value == nullptr) return std::nullopt;
  const std::string* content = value->get_ptr<const json::string_t*>();
  if (content == nullptr) content = FindString(*value, "content");
  if (content == nullptr) return Malformed(absl::StrCat("\"", key, "\" is not a token"));
  return *content;
}

// NOTE: transformers adds tokens from here too; files that agree (all known ones) need no second source.
absl::Status CheckAddedTokensDecoder(const json& config, const TokenizerFiles& files) {
  const json* decoder = Find(config, "added_tokens_decoder");
  if (decoder == nullptr) return absl::OkStatus();
  if (!decoder->is_object()) return Malformed("\"added_tokens_decoder\" is not an object");
  absl::flat_hash_map<std::string, int32_t> ids;
  for (const AddedToken& token : files.added_tokens) ids[token.content] = token.id;
  for (const auto& [key, token] : decoder->items()) {
    const std::string* content = FindString(token, "content");
    const auto found = content == nullptr ? ids.end() : ids.find(*content);
    if (found == ids.end() || absl::StrCat(found->second) != key) {
      return Unsupported(absl::StrCat("added_tokens_decoder[", Quoted(key), "], which tokenizer.json lacks,"));
    }
  }
  return absl::OkStatus();
}

absl::Status ReadConfig(const json& config, const std::string* prepended, TokenizerFiles* files) {
  for (const auto& [key, token] :
       {std::make_pair("bos_token", &files->bos_token), std::make_pair("eos_token", &files->eos_token)}) {
    absl::StatusOr<std::optional<std::string>> content = ReadConfigToken(config, key);
    if (!content.ok()) return content.status();
    *token = *std::move(content);
  }
  absl::StatusOr<bool> add_eos_token = ReadBool(config, "add_eos_token", false);
  if (!add_eos_token.ok()) return add_eos_token.status();
  if (*add_eos_token) return Unsupported("\"add_eos_token\"");
  // Unless told otherwise, LlamaTokenizer adds BOS and other classes do what the post-processor says.
  const bool is_llama = TypeAt(config, "tokenizer_class").starts_with("LlamaTokenizer");
  absl::StatusOr<bool> add_bos_token = ReadBool(config, "add_bos_token", prepended != nullptr || is_llama);
  if (!add_bos_token.ok()) return add_bos_token.status();
  if (prepended != nullptr && (!*add_bos_token || files->bos_token != *prepended)) {
    return Unsupported("a post_processor that contradicts \"add_bos_token\" or \"bos_token\"");
  }
  if (*add_bos_token && !files->bos_token.has_value()) return Malformed("\"bos_token\" is missing");
  files->add_bos_token = *add_bos_token;
  return CheckAddedTokensDecoder(config, *files);
}

// Returns what the post-processor puts before a text, or null.
absl::StatusOr<const std::string*> ReadTokenizer(const json& root, TokenizerFiles* files) {
  if (absl::Status status = ReadModel(root, files); !status.ok()) return status;
  if (absl::Status status = ReadNormalizer(root); !status.ok()) return status;
  if (absl::Status status = ReadPreTokenizer(root, files); !status.ok()) return status;
  if (absl::Status status = ReadDecoder(root); !status.ok()) return status;
  if (absl::Status status = ReadAddedTokens(root, files); !status.ok()) return status;
  return ReadPostProcessor(root);
}

}  // namespace

absl::StatusOr<TokenizerFiles> ReadTokenizerFiles(const std::string& model_dir) {
  const std::string tokenizer_path = absl::StrCat(model_dir, "/tokenizer.json");
  const std::string config_path = absl::StrCat(model_dir, "/tokenizer_config.json");
  const absl::StatusOr<json> root = ReadJson(tokenizer_path);
  if (!root.ok()) return root.status();
  const absl::StatusOr<json> config = ReadJson(config_path);
  if (!config.ok()) return config.status();
  TokenizerFiles files;
  const absl::StatusOr<const std::string*> prepended = ReadTokenizer(*root, &files);
  if (!prepended.ok()) return InFile(tokenizer_path, prepended.status());
  if (absl::Status status = ReadConfig(*config, *prepended, &files); !status.ok()) {
    return InFile(config_path, status);
  }
  return files;
}

absl::StatusOr<ChatTemplateSource> ReadChatTemplateSource(const std::string& model_dir) {
  const std::string own_path = absl::StrCat(model_dir, "/chat_template.jinja");
  absl::StatusOr<std::string> own = ReadText(own_path);
  if (own.ok()) return ChatTemplateSource{.jinja = *std::move(own), .path = own_path};
  if (!absl::IsNotFound(own.status())) return own.status();
  const std::string path = absl::StrCat(model_dir, "/tokenizer_config.json");
  const absl::StatusOr<json> config = ReadJson(path);
  if (!config.ok()) return config.status();
  const json* value = Find(*config, "chat_template");
  if (value == nullptr) return absl::NotFoundError(absl::StrCat(path, " has no \"chat_template\""));
  if (value->is_array()) {
    const auto named =
        std::find_if(value->begin(), value->end(), [](const json& item) { return TypeAt(item, "name") == "default"; });
    if (named == value->end()) return absl::NotFoundError(absl::StrCat(path, " has no chat_template \"default\""));
    value = Find(*named, "template");
  }
  if (value == nullptr || !value->is_string()) return InFile(path, Malformed("\"chat_template\" is not a string"));
  return ChatTemplateSource{.jinja = *value->get_ptr<const json::string_t*>(), .path = path};
}

}  // namespace cachalot
