// Meshes of ranks in several processes, over TCP.
#ifndef CACHALOT_KERNELS_TCP_MESH_H_
#define CACHALOT_KERNELS_TCP_MESH_H_

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/mesh.h"
#include "kernels/socket.h"

namespace cachalot {

// What only those know who are meant to meet: every connection begins with it.
using MeshSession = std::array<char, 32>;

struct TcpMeshOptions {
  std::vector<std::string> nodes;  // where each process listens
  int node = 0;                    // which of them this is
  int ranks_per_node = 1;          // rank r is on node r / ranks_per_node
  int num_meshes = 1;              // apart from each other
  MeshSession session = {};
  // What has nothing to say says so this often; who has not been heard of for so long is gone.
  absl::Duration heartbeat = absl::Seconds(1), silence = absl::Seconds(4);
};

// This process's end of them, [num_meshes][ranks_per_node]. Every two ranks have a connection of their own, which the
// higher one makes; one that does not begin as it must is closed and forgotten. `listener` listens at this node's
// address, and is not needed afterwards. DeadlineExceeded, naming one that is missing; Unavailable.
//
// Beyond what Mesh promises: a mesh is aborted by itself when a rank closes its connection, or stops, or is cut off
// (found within `silence`), or speaks another language, and the reason names it. Where several abort a mesh at the same
// time, ranks may have either reason. One that is destroyed has left: whoever needs something of it later aborts.
absl::StatusOr<std::vector<std::vector<std::unique_ptr<Mesh>>>> ConnectTcpMeshes(const Socket& listener,
                                                                                 const TcpMeshOptions& options,
                                                                                 absl::Time deadline);

// What connections are made of, for those who test with a rank that misbehaves.
namespace tcp_mesh {

struct Hello {
  std::array<char, 8> magic = {'c', 'a', 'c', 'h', 'm', 'e', 's', 'h'};
  int32_t mesh = 0, from = 0, to = 0, unused = 0;
  MeshSession session = {};
};

enum class Kind : uint32_t { kRows = 0x51700, kHeartbeat, kLeave, kAbort };
// Before every message, which follows: of kRows the outbox, of kAbort an absl::StatusCode (int32_t) and the reason.
struct Header {
  Kind kind = Kind::kHeartbeat;
  uint32_t unused = 0;
  uint64_t length = 0;
};
inline constexpr uint64_t kMaxRows = uint64_t{1} << 34, kMaxReason = 4096;  // bytes

}  // namespace tcp_mesh
}  // namespace cachalot

#endif  // CACHALOT_KERNELS_TCP_MESH_H_
