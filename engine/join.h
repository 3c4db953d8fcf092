// Join: how the processes that share a model's experts find each other at start, and whether they fit together.
#ifndef CACHALOT_ENGINE_JOIN_H_
#define CACHALOT_ENGINE_JOIN_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/tcp_mesh.h"

namespace cachalot {

struct JoinOptions {
  int num_nodes = 1, node = 0;
  std::string leader;  // HOST:PORT, where node 0 listens
  // Proven, never sent. NOTE: it keeps out who does not have it; nothing that follows is encrypted.
  std::string secret;
  absl::Duration timeout;
  // What must be the same on all nodes: names, and values of a line each.
  std::vector<std::pair<std::string, std::string>> facts;
};

struct JoinedNodes {
  Socket listener;                 // for this node's meshes
  std::vector<std::string> nodes;  // where each listens
  MeshSession session = {};
};

// Waits until all nodes are there. A node that does not fit is told why and gets InvalidArgument ("node 1:
// max-sequences is 32, the leader's is 64"); PermissionDenied where the secret is another; the leader goes on waiting
// for one that fits, and takes a node that was started again. DeadlineExceeded names who is missing; Unavailable where
// the leader cannot listen.
absl::StatusOr<JoinedNodes> JoinNodes(const JoinOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_JOIN_H_
