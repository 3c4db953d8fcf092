// TCP meshes whose processes are one, on the loopback interface.
#ifndef CACHALOT_TESTS_KERNELS_LOOPBACK_H_
#define CACHALOT_TESTS_KERNELS_LOOPBACK_H_

#include <memory>
#include <vector>

#include "kernels/tcp_mesh.h"

namespace cachalot {

struct Loopback {
  int num_nodes = 1, ranks_per_node = 1;
  absl::Duration heartbeat = absl::Milliseconds(200), silence = absl::Seconds(30);
};
// By rank.
std::vector<std::unique_ptr<Mesh>> MakeLoopbackMesh(const Loopback& loopback);

}  // namespace cachalot

#endif  // CACHALOT_TESTS_KERNELS_LOOPBACK_H_
