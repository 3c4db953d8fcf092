// Reads /proc/meminfo, /proc/self/cgroup and the groups it names, and RLIMIT_AS.
#include "kernels/cpu/available_memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/strings/str_split.h"

namespace cachalot {
namespace {

constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();
constexpr size_t kPageBytes = 4096;

// What a version of control groups calls its files.
struct GroupFiles {
  const char* limit;
  const char* usage;
  const char* inactive;  // pages of files in memory.stat, of the groups below too
  const char* active;
};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
                                  "total_active_file"};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file", "active_file"};

// The number after `key` in a file of "key value" lines; a file of one number has the key "".
std::optional<size_t> ReadNumber(const std::filesystem::path& path, std::string_view key) {
  std::ifstream file(path);
  std::string word;
  while (key.empty() || file >> word) {
    if (!key.empty() && word != key) continue;
    size_t value = 0;
    if (file >> value) return value;
    return std::nullopt;
  }
  return std::nullopt;
}

// What a control group leaves: its limit less what it uses, of which pages of files can be had back.
size_t GroupAvailable(const std::filesystem::path& folder, const GroupFiles& files) {
  const auto limit = ReadNumber(folder / files.limit, "");  // none: "max", or no such group
  const auto usage = ReadNumber(folder / files.usage, "");
  if (!limit || !usage) return kNoLimit;
  const std::filesystem::path stat = folder / "memory.stat";
  const size_t cached = ReadNumber(stat, files.inactive).value_or(0) + ReadNumber(stat, files.active).value_or(0);
  const size_t held = *usage - std::min(cached, *usage);
  return *limit - std::min(held, *limit);
}

// The least of the group `path` below `mount` and of those above it. NOTE: in a container the path may be the host's
// and not be there, or begin with "..": what is at the mount's root is then the process's own group.
size_t GroupsAvailable(const std::filesystem::path& mount, const std::string& path, const GroupFiles& files) {
  size_t least = GroupAvailable(mount, files);
  std::filesystem::path folder = mount;
  for (const absl::string_view name : absl::StrSplit(path, '/', absl::SkipEmpty())) {
    if (name == "..") return least;
    folder /= std::string(name);
    least = std::min(least, GroupAvailable(folder, files));
  }
  return least;
}

size_t AddressSpaceAvailable(const std::filesystem::path& proc) {
  rlimit limit = {};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kNoLimit;
  const size_t used = ReadNumber(proc / "self/statm", "").value_or(0) * kPageBytes;
  return limit.rlim_cur - std::min<size_t>(used, limit.rlim_cur);
}

}  // namespace

size_t AvailableMemory(const std::string& root) {
  const std::filesystem::path proc = root + "/proc", mount = root + "/sys/fs/cgroup";
  const size_t machine = ReadNumber(proc / "meminfo", "MemAvailable:").value_or(0) * 1024;
  size_t least = std::min(machine, AddressSpaceAvailable(proc));
  std::ifstream groups(proc / "self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "4:cpu,memory:/path", of version 2 "0::/path"
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const std::vector<std::string> controllers = absl::StrSplit(parts[1], ',');
    if (parts[0] == "0" && parts[1].empty()) {
      least = std::min(least, GroupsAvailable(mount, parts[2], kVersion2));
    } else if (std::find(controllers.begin(), controllers.end(), "memory") != controllers.end()) {
      least = std::min(least, GroupsAvailable(mount / "memory", parts[2], kVersion1));
    }
  }
  return least;
}

}  // namespace cachalot
