// `cachalot inspect`: prints what a checkpoint holds and what is wrong with it.
#ifndef CACHALOT_SERVER_CLI_INSPECT_H_
#define CACHALOT_SERVER_CLI_INSPECT_H_

#include "server/options.h"

namespace cachalot {

// Returns the process's exit code: 1 if there is any problem. The report goes to stdout, problems to stderr, one line
// each.
int InspectModel(const InspectOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CLI_INSPECT_H_
