// Validation: what the engine refuses of its options and of a request.
#ifndef CACHALOT_ENGINE_VALIDATION_H_
#define CACHALOT_ENGINE_VALIDATION_H_

#include <vector>

#include "absl/status/status.h"
#include "engine/options.h"
#include "engine/request.h"
#include "engine/stats.h"

namespace cachalot {

// Both: InvalidArgument with a message for people that names the field, what was found and what was expected.
absl::Status ValidateOptions(const EngineOptions& options);
absl::Status ValidateRequest(const Request& request, const ModelInfo& model, const std::vector<int>& eos_token_ids);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_VALIDATION_H_
