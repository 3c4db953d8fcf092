// Options from a file: TOML whose keys are the options' names.
#ifndef CACHALOT_SERVER_CONFIG_FILE_H_
#define CACHALOT_SERVER_CONFIG_FILE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace cachalot {

// What the file says as command-line arguments: max-sequences = 128 becomes "--max-sequences=128". One line naming file
// and place for a file that cannot be read, is no TOML, or holds tables or lists.
absl::StatusOr<std::vector<std::string>> ReadConfigFile(const std::string& path);

}  // namespace cachalot

#endif  // CACHALOT_SERVER_CONFIG_FILE_H_
