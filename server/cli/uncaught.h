// ExitOnUncaught: what the system refuses at start (a thread, memory) ends the process with one line.
#ifndef CACHALOT_SERVER_CLI_UNCAUGHT_H_
#define CACHALOT_SERVER_CLI_UNCAUGHT_H_

namespace cachalot {

// The standard library and others throw where the system has no thread or no memory left, in the middle of what cannot
// be taken back (a pool with half its threads). From now on what nobody catches is said on stderr, and the exit code is
// 1. Whatever else ends in std::terminate aborts as before.
void ExitOnUncaught();

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CLI_UNCAUGHT_H_
