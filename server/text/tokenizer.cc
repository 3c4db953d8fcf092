// Tokenizer: loading, encoding (added tokens, pieces, BPE) and decoding.
#include "server/text/tokenizer.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/text/byte_level.h"
#include "server/text/tokenizer_files.h"
#include "server/text/utf8.h"
#include "server/text/word_cache.h"

namespace cachalot {
namespace {

// The first added token in `part` of `text` that lies within one of `trusted`.
std::optional<AddedTokenMatcher::Match> FindTrusted(const AddedTokenMatcher& matcher, std::string_view text,
                                                    TextRange part, std::span<const TextRange> trusted) {
  auto range = std::partition_point(trusted.begin(), trusted.end(),
                                    [part](const TextRange& range) { return range.end <= part.begin; });
  for (; range != trusted.end() && range->begin < part.end; ++range) {
    const std::string_view searched = text.substr(0, std::min(range->end, part.end));
    if (const auto match = matcher.Find(searched, std::max(range->begin, part.begin))) return match;
  }
  return std::nullopt;
}

}  // namespace

struct Tokenizer::Scratch {
  PreTokenizer::Scratch split;
  Bpe::Scratch bpe;
  WordCache words;
};

// Scratch for one call, from the idle ones if there are any: as many come to be as calls run at once.
class Tokenizer::ScratchLease {
 public:
  explicit ScratchLease(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
    {
      MutexLock lock(&tokenizer_.mutex_);
      if (!tokenizer_.idle_scratch_.empty()) {
        scratch_ = std::move(tokenizer_.idle_scratch_.back());
        tokenizer_.idle_scratch_.pop_back();
      }
    }
    if (scratch_ == nullptr) scratch_ = std::make_unique<Scratch>();
  }
  ~ScratchLease() {
    scratch_->bpe.Trim();
    MutexLock lock(&tokenizer_.mutex_);
    tokenizer_.idle_scratch_.push_back(std::move(scratch_));
  }
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  Scratch* get() const { return scratch_.get(); }

 private:
  const Tokenizer& tokenizer_;
  std::unique_ptr<Scratch> scratch_;
};

Tokenizer::Tokenizer() = default;
Tokenizer::~Tokenizer() = default;

// --- Loading ---

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  absl::StatusOr<TokenizerFiles> files = ReadTokenizerFiles(model_dir);
  if (!files.ok()) return files.status();
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer);
  if (absl::Status status = tokenizer->Build(*files); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(model_dir, "/tokenizer.json: ", status.message()));
  }
  return tokenizer;
}

absl::Status Tokenizer::Build(const TokenizerFiles& files) {
  absl::StatusOr<std::unique_ptr<const PreTokenizer>> pre_tokenizer = PreTokenizer::Create(files.split_patterns);
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();
  pre_tokenizer_ = *std::move(pre_tokenizer);

  // Tokens, and the single bytes among them. A string outside the byte-level alphabet is its own bytes.
  int32_t max_id = -1;
  for (const auto& [content, id] : files.vocab) max_id = std::max(max_id, id);
  for (const AddedToken& token : files.added_tokens) max_id = std::max(max_id, token.id);
  tokens_.resize(static_cast<size_t>(max_id) + 1);
  std::vector<bool> is_byte_level(tokens_.size()), is_added(tokens_.size());
  std::array<int32_t, 256> byte_ids;
  byte_ids.fill(-1);
  for (const auto& [content, id] : files.vocab) {
    const std::optional<std::string> bytes = ByteLevelDecode(content);
    is_byte_level[id] = bytes.has_value();
    AddToken(id, bytes.has_value() ? *bytes : content, /*special=*/false);
    if (bytes.has_value() && bytes->size() == 1) byte_ids[static_cast<uint8_t>((*bytes)[0])] = id;
  }
  for (const AddedToken& token : files.added_tokens) {
    AddToken(token.id, token.content, token.special);
    is_added[token.id] = true;
    matchers_[token.normalized ? 1 : 0].Add(token.content, token.id);
  }
  for (size_t byte = 0; byte < byte_ids.size(); ++byte) {
    if (byte_ids[byte] >= 0) continue;
    return absl::UnimplementedError(
        absl::StrFormat("a vocabulary without all 256 bytes (0x%02X is missing) is not supported", byte));
  }

  // Only the matchers make added tokens. Where they are on, this changes nothing: what such a merge would make is
  // found.
  std::vector<BpeMerge> merges = files.merges;
  std::erase_if(merges, [&is_added](const BpeMerge& merge) { return is_added[merge.result]; });
  absl::StatusOr<Bpe> bpe = Bpe::Create(byte_ids, std::move(merges));
  if (!bpe.ok()) return bpe.status();
  bpe_ = *std::move(bpe);
  IndexTokens(files, is_byte_level);

  add_bos_token_ = files.add_bos_token;
  for (const auto& [content, id] :
       {std::make_pair(&files.bos_token, &bos_id_), std::make_pair(&files.eos_token, &eos_id_)}) {
    if (!content->has_value()) continue;
    *id = TokenToId(**content);
    if (!id->has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("has no token \"", **content, "\", which tokenizer_config.json names"));
    }
  }
  return absl::OkStatus();
}

void Tokenizer::AddToken(int32_t id, std::string_view bytes, bool special) {
  tokens_[id] = {static_cast<uint32_t>(token_bytes_.size()), static_cast<uint32_t>(bytes.size()), special};
  token_bytes_.append(bytes);
  max_token_bytes_ = std::max(max_token_bytes_, bytes.size());
}

// Which token has which bytes, and which pieces are single tokens. Most pieces of ordinary text are, so
// this table spares them the BPE; a token whose bytes merge in another way is not in it.
void Tokenizer::IndexTokens(const TokenizerFiles& files, const std::vector<bool>& is_byte_level) {
  Bpe::Scratch scratch;
  std::vector<int32_t> ids;
  ids_by_bytes_.reserve(tokens_.size());
  for (const auto& [content, id] : files.vocab) {
    TokenIds& entry = ids_by_bytes_[BytesOf(id)];
    if (!is_byte_level[id]) {
      if (entry.token < 0) entry.token = id;
      continue;
    }
    entry.token = id;
    ids.clear();
    if (!files.ignore_merges) bpe_->Encode(BytesOf(id), &scratch, &ids);
    if (files.ignore_merges || (ids.size() == 1 && ids[0] == id)) entry.piece = id;
  }
  for (const AddedToken& token : files.added_tokens) {
    TokenIds& entry = ids_by_bytes_[BytesOf(token.id)];
    entry.token = token.id;
    if (entry.piece == token.id) entry.piece = -1;
  }
}

// --- Encoding ---

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(absl::StrCat("text of ", text.size(), " bytes is too long"));
  }
  if (const std::optional<size_t> offset = FindInvalidUtf8(text); offset.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("text is not valid UTF-8 at byte ", *offset));
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 4 + 2);
  if (options.add_bos) {
    if (!bos_id_.has_value()) return absl::FailedPreconditionError("the tokenizer has no BOS token");
    ids.push_back(*bos_id_);
  }
  const ScratchLease scratch(*this);
  const TextRange whole = {0, text.size()};
  std::span<const TextRange> trusted;
  if (options.match_special) trusted = options.trusted == nullptr ? std::span(&whole, 1) : std::span(*options.trusted);
  absl::Status status = EncodeWithAddedTokens(text, whole, trusted, 0, scratch.get(), &ids);
  if (!status.ok()) return status;
  return ids;
}

// The tokens of `part` of `text`.
absl::Status Tokenizer::EncodeWithAddedTokens(std::string_view text, TextRange part, std::span<const TextRange> trusted,
                                              size_t matcher_idx, Scratch* scratch, std::vector<int32_t>* ids) const {
  if (matcher_idx == std::size(matchers_)) {
    return EncodePlain(text.substr(part.begin, part.end - part.begin), scratch, ids);
  }
  size_t done = part.begin;
  while (const auto match = FindTrusted(matchers_[matcher_idx], text, {done, part.end}, trusted)) {
    absl::Status status = EncodeWithAddedTokens(text, {done, match->begin}, trusted, matcher_idx + 1, scratch, ids);
    if (!status.ok()) return status;
    ids->push_back(match->id);
    done = match->end;
  }
  return EncodeWithAddedTokens(text, {done, part.end}, trusted, matcher_idx + 1, scratch, ids);
}

absl::Status Tokenizer::EncodePlain(std::string_view text, Scratch* scratch, std::vector<int32_t>* ids) const {
  return pre_tokenizer_->Split(text, &scratch->split,
                               [&](std::string_view piece) { EncodePiece(piece, scratch, ids); });
}

void Tokenizer::EncodePiece(std::string_view piece, Scratch* scratch, std::vector<int32_t>* ids) const {
  if (scratch->words.Find(piece, ids)) return;
  const size_t begin = ids->size();
  const auto token = ids_by_bytes_.find(piece);
  if (token != ids_by_bytes_.end() && token->second.piece >= 0) {
    ids->push_back(token->second.piece);
  } else {
    bpe_->Encode(piece, &scratch->bpe, ids);
  }
  scratch->words.Insert(piece, std::span(*ids).subspan(begin));
}

// --- Decoding ---

std::string_view Tokenizer::BytesOf(int32_t id) const {
  if (!InRange(id)) return {};
  return std::string_view(token_bytes_).substr(tokens_[id].begin, tokens_[id].size);
}

std::string Tokenizer::TokenBytes(int32_t id) const { return std::string(BytesOf(id)); }

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes, text;
  for (const int32_t id : ids) {
    if (!skip_special || !is_special(id)) bytes.append(BytesOf(id));
  }
  AppendLossyUtf8(bytes, /*at_end=*/true, &text);
  return text;
}

std::optional<int32_t> Tokenizer::TokenToId(std::string_view bytes) const {
  const auto found = ids_by_bytes_.find(bytes);
  if (found == ids_by_bytes_.end()) return std::nullopt;
  return found->second.token;
}

}  // namespace cachalot
