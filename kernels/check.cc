// NOTE: the only place below the server that includes spdlog: its headers cost every file that does seconds to compile.
#include "kernels/check.h"

#include <spdlog/spdlog.h>

#include <cstdlib>

namespace cachalot {

void CheckFailed(const char* condition, const std::string& detail, const char* file, int line) {
  spdlog::critical("{}:{}: CHECK({}) failed{}{}", file, line, condition, detail.empty() ? "" : ": ", detail);
  spdlog::shutdown();
  std::abort();
}

}  // namespace cachalot
