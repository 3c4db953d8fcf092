// CHECK: for our own bugs only. Prints one line and aborts; never for files, configs, requests or peers.
#ifndef CACHALOT_KERNELS_CHECK_H_
#define CACHALOT_KERNELS_CHECK_H_

#include <fmt/core.h>

#include <string>
#include <utility>

namespace cachalot {

[[noreturn]] void CheckFailed(const char* condition, const std::string& detail, const char* file, int line);
inline std::string CheckDetail() { return ""; }
template <typename... Args>
std::string CheckDetail(fmt::format_string<Args...> format, Args&&... args) {
  return fmt::format(format, std::forward<Args>(args)...);
}

}  // namespace cachalot

// CHECK(condition) or CHECK(condition, "format {}", value).
#define CHECK(condition, ...)                                                                        \
  do {                                                                                               \
    if (!(condition)) [[unlikely]] {                                                                 \
      ::cachalot::CheckFailed(#condition, ::cachalot::CheckDetail(__VA_ARGS__), __FILE__, __LINE__); \
    }                                                                                                \
  } while (false)

#endif  // CACHALOT_KERNELS_CHECK_H_
