// AvailableMemory: the least of machine, control groups of both versions and address space, in trees made up here.
#include "kernels/cpu/available_memory.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace cachalot {
namespace {

constexpr size_t kMB = 1'000'000;

class AvailableMemoryTest : public testing::Test {
 protected:
  AvailableMemoryTest() : root_(testing::TempDir() + "available_memory_test") {
    std::filesystem::remove_all(root_);
    Write("proc/meminfo", "MemTotal: 9999 kB\nMemAvailable: 8000000 kB\n");
    Write("proc/self/statm", "100 50 0 0 0 0 0\n");
  }
  ~AvailableMemoryTest() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_ + "/" + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  void WriteGroup2(const std::string& path, const std::string& limit, size_t usage, size_t cached = 0) {
    Write("sys/fs/cgroup/" + path + "/memory.max", limit + "\n");
    Write("sys/fs/cgroup/" + path + "/memory.current", std::to_string(usage) + "\n");
    Write("sys/fs/cgroup/" + path + "/memory.stat",
          "anon 5\ninactive_file " + std::to_string(cached) + "\nactive_file 1000\n");
  }
  void WriteGroup1(const std::string& path, size_t limit, size_t usage, size_t cached = 0) {
    const std::string folder = "sys/fs/cgroup/memory/" + path;
    Write(folder + "/memory.limit_in_bytes", std::to_string(limit) + "\n");
    Write(folder + "/memory.usage_in_bytes", std::to_string(usage) + "\n");
    Write(folder + "/memory.stat", "inactive_file 7\ntotal_inactive_file " + std::to_string(cached) + "\n");
  }
  size_t Available() const { return AvailableMemory(root_); }

  const std::string root_;
};

TEST_F(AvailableMemoryTest, OfTheMachineWithoutGroups) {
  EXPECT_EQ(Available(), size_t{8'000'000} * 1024);
  Write("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(Available(), size_t{8'000'000} * 1024);
}

// As under systemd's MemoryMax: the limit is the service's own, far below the mount's root.
TEST_F(AvailableMemoryTest, OfTheOwnGroup) {
  Write("proc/self/cgroup", "0::/system.slice/cachalot.service\n");
  WriteGroup2("system.slice", "max", 900 * kMB);
  WriteGroup2("system.slice/cachalot.service", "250000000", 100 * kMB, 30 * kMB - 1000);
  EXPECT_EQ(Available(), 180 * kMB);
}

TEST_F(AvailableMemoryTest, OfEveryGroupAbove) {
  Write("proc/self/cgroup", "0::/a/b/c\n");
  WriteGroup2("a/b/c", "max", 10 * kMB);
  WriteGroup2("a/b", "500000000", 450 * kMB);
  WriteGroup2("a", "800000000", 100 * kMB);
  EXPECT_EQ(Available(), 50 * kMB + 1000);
  WriteGroup2("a", "800000000", 790 * kMB);
  EXPECT_EQ(Available(), 10 * kMB + 1000);
  WriteGroup2("a", "800000000", 900 * kMB);  // more than it may, for now
  EXPECT_EQ(Available(), 0u + 0);
}

TEST_F(AvailableMemoryTest, OfGroupsOfVersion1) {
  Write("proc/self/cgroup", "9:name=systemd:/\n5:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:/jobs/one\n0::/\n");
  WriteGroup1("", size_t{1} << 62, 5000 * kMB);
  WriteGroup1("jobs", 3000 * kMB, 1000 * kMB);
  WriteGroup1("jobs/one", 9223372036854771712u, 700 * kMB);
  WriteGroup1("elsewhere", 10, 10);
  EXPECT_EQ(Available(), 2000 * kMB);
  WriteGroup1("jobs/one", 1000 * kMB, 700 * kMB, 200 * kMB);
  EXPECT_EQ(Available(), 500 * kMB);
}

// In a container the path is the host's, which is not there: the mount's root is the container's own group.
TEST_F(AvailableMemoryTest, OfAContainer) {
  for (const std::string path : {"/docker/0123", "/../../pod", "/"}) {
    Write("proc/self/cgroup", "4:memory:" + path + "\n");
    WriteGroup1("", 600 * kMB, 100 * kMB);
    EXPECT_EQ(Available(), 500 * kMB) << path;
    Write("proc/self/cgroup", "0::" + path + "\n");
    WriteGroup2("", "400000000", 100 * kMB);
    EXPECT_EQ(Available(), 300 * kMB + 1000) << path;
  }
}

TEST_F(AvailableMemoryTest, OfTheAddressSpace) {
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  const rlimit low = {.rlim_cur = rlim_t{1} << 42, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_AS, &low), 0);
  Write("proc/meminfo", "MemAvailable: 99000000000 kB\n");
  const size_t available = Available();
  setrlimit(RLIMIT_AS, &before);
  EXPECT_EQ(available, (size_t{1} << 42) - 100 * 4096);
}

TEST(AvailableMemory, OfThisProcess) { EXPECT_GT(AvailableMemory(), size_t{1} << 20); }

}  // namespace
}  // namespace cachalot
