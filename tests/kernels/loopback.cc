// Every node in a thread of its own, until all have met.
#include "tests/kernels/loopback.h"

#include <gtest/gtest.h>

#include <thread>

#include "absl/time/clock.h"

namespace cachalot {

std::vector<std::unique_ptr<Mesh>> MakeLoopbackMesh(const Loopback& loopback) {
  TcpMeshOptions options;
  options.ranks_per_node = loopback.ranks_per_node;
  options.heartbeat = loopback.heartbeat;
  options.silence = loopback.silence;
  options.session.fill('s');
  std::vector<Socket> listeners;
  for (int node = 0; node < loopback.num_nodes; ++node) {
    auto listener = Socket::Listen("127.0.0.1:0");
    EXPECT_TRUE(listener.ok()) << listener.status();
    options.nodes.push_back(listener->local_address());
    listeners.push_back(*std::move(listener));
  }
  std::vector<std::unique_ptr<Mesh>> ranks(loopback.num_nodes * loopback.ranks_per_node);
  std::vector<std::thread> nodes;
  for (int node = 0; node < loopback.num_nodes; ++node) {
    nodes.emplace_back([&, node, mine = options]() mutable {
      mine.node = node;
      auto meshes = ConnectTcpMeshes(listeners[node], mine, absl::Now() + absl::Minutes(1));
      ASSERT_TRUE(meshes.ok()) << meshes.status();
      for (auto& mesh : (*meshes)[0]) {
        const int rank = mesh->rank();
        ranks[rank] = std::move(mesh);
      }
    });
  }
  for (std::thread& node : nodes) node.join();
  return ranks;
}

}  // namespace cachalot
