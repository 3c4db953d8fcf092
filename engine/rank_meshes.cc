// What nodes must have alike, then the join, then connections.
#include "engine/rank_meshes.h"

#include <openssl/evp.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/join.h"
#include "kernels/check.h"
#include "kernels/cuda_plugin.h"

namespace cachalot {
namespace {

constexpr absl::Duration kConnectTime = absl::Seconds(30);

absl::StatusOr<std::string> ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) return absl::NotFoundError(absl::StrCat("cannot read ", path));
  return std::move(text).str();
}

// Of config.json, and the names and sizes of the files with weights: what they hold would take minutes to read.
absl::StatusOr<std::string> DigestOf(const std::string& model_dir) {
  const std::filesystem::path folder(model_dir);
  auto text = ReadAll(folder / "config.json");
  if (!text.ok()) return text.status();
  std::vector<std::string> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().extension() != ".safetensors") continue;
    files.push_back(absl::StrCat("\n", entry.path().filename().string(), " ", entry.file_size(error)));
  }
  std::sort(files.begin(), files.end());
  for (const std::string& file : files) text->append(file);
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  CHECK(EVP_Digest(text->data(), text->size(), digest, &size, EVP_sha256(), nullptr) == 1);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), 8));
}

absl::StatusOr<JoinOptions> MakeJoinOptions(const EngineOptions& options) {
  JoinOptions join;
  join.num_nodes = options.num_nodes;
  join.node = options.node_rank;
  join.leader = options.leader;
  join.timeout = absl::Seconds(options.join_timeout_seconds);
  if (!options.cluster_secret_file.empty()) {
    auto secret = ReadAll(options.cluster_secret_file);
    if (secret.ok()) join.secret = std::string(absl::StripAsciiWhitespace(*secret));
    if (join.secret.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("cluster-secret-file: there is no secret in ", options.cluster_secret_file));
    }
  }
  const auto digest = DigestOf(options.model_dir);
  if (!digest.ok()) return digest.status();
  const auto or_auto = [](const std::string& name) { return name.empty() ? std::string("auto") : name; };
  join.facts = {
      {"build", kBuildId},
      {"nodes", absl::StrCat(options.num_nodes)},
      {"ranks", absl::StrCat(options.num_ranks)},
      {"model", *digest},
      {"device", options.device},
      {"max-model-len", absl::StrCat(options.max_model_len)},
      {"max-sequences", absl::StrCat(options.max_sequences)},
      {"max-batch-tokens", absl::StrCat(options.max_batch_tokens)},
      {"redundant-experts", absl::StrCat(options.num_redundant_experts)},
      {"speculative-tokens", options.adapts_drafts ? "auto" : absl::StrCat(options.speculative_tokens)},
      {"prefix-cache", options.prefix_cache ? "on" : "off"},
      {"kv-cache-dtype", or_auto(options.kv_cache_dtype)},
      {"activation", options.activation},
  };
  return join;
}

}  // namespace

absl::StatusOr<RankMeshes> MakeRankMeshes(const EngineOptions& options) {
  const int num_local = options.num_ranks;
  if (options.num_nodes == 1 && num_local == 1) return RankMeshes();
  if (options.num_nodes == 1) return RankMeshes{MakeThreadMesh(num_local), MakeThreadMesh(num_local)};
  const auto join = MakeJoinOptions(options);
  if (!join.ok()) return join.status();
  auto joined = JoinNodes(*join);
  if (!joined.ok()) return joined.status();
  TcpMeshOptions mesh;
  mesh.nodes = joined->nodes;
  mesh.node = options.node_rank;
  mesh.ranks_per_node = num_local;
  mesh.num_meshes = 2;
  mesh.session = joined->session;
  auto meshes = ConnectTcpMeshes(joined->listener, mesh, absl::Now() + kConnectTime);
  if (!meshes.ok()) return meshes.status();
  return RankMeshes{std::move((*meshes)[0]), std::move((*meshes)[1])};
}

}  // namespace cachalot
