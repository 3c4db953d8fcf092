// `cachalot plan`: prints what a model would take of so many GPUs.
#ifndef CACHALOT_SERVER_CLI_PLAN_H_
#define CACHALOT_SERVER_CLI_PLAN_H_

#include "engine/plan.h"

namespace cachalot {

// Returns the process's exit code: 1 if it does not fit, with a line on stderr.
int PlanModel(const PlanOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CLI_PLAN_H_
