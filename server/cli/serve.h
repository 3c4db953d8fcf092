// `cachalot serve`: loads, serves, stops.
#ifndef CACHALOT_SERVER_CLI_SERVE_H_
#define CACHALOT_SERVER_CLI_SERVE_H_

#include "server/options.h"

namespace cachalot {

// Returns the process's exit code: 0 after SIGTERM or SIGINT, 1 with one line on stderr when it cannot serve, 1 when
// the engine fails later: a supervisor starts a new process. Ports are claimed before the checkpoint is loaded and
// answer only afterwards. Call once, from the main thread, before any other thread is started: signals are blocked for
// all of them.
int Serve(const ServeOptions& options);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CLI_SERVE_H_
