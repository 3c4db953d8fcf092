// The engine plans; this prints.
#include "server/cli/plan.h"

#include <cstdio>
#include <string>

namespace cachalot {

int PlanModel(const PlanOptions& options) {
  const auto report = Plan(options);
  if (!report.ok()) {
    std::fprintf(stderr, "cachalot plan: %s\n", std::string(report.status().message()).c_str());
    return 1;
  }
  std::fputs(report->c_str(), stdout);
  return 0;
}

}  // namespace cachalot
