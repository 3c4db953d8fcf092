// The meshes of a process's ranks: of threads where there is one process, of TCP connections where there are several.
#ifndef CACHALOT_ENGINE_RANK_MESHES_H_
#define CACHALOT_ENGINE_RANK_MESHES_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/options.h"
#include "kernels/mesh.h"

namespace cachalot {

// By local rank; none where there is one rank in all.
struct RankMeshes {
  std::vector<std::unique_ptr<Mesh>> steps, experts;
};

// Where there are several nodes, waits for all of them, as JoinNodes does, which says what it returns: all must have
// the same build, checkpoint and options. `options` were validated.
absl::StatusOr<RankMeshes> MakeRankMeshes(const EngineOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_RANK_MESHES_H_
