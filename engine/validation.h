// Validation: what the engine refuses of its options and of a request.
#ifndef CACHALOT_ENGINE_VALIDATION_H_
#define CACHALOT_ENGINE_VALIDATION_H_

#include "absl/status/status.h"
#include "engine/options.h"
#include "engine/request.h"
#include "engine/stats.h"

namespace cachalot {

// Both: InvalidArgument with a message for people that names the field, what was found and what was expected.
absl::Status ValidateOptions(const EngineOptions& options);
// ValidateSampling (engine.h), and the prompt. The field is the status's payload.
absl::Status ValidateRequest(const Request& request, const ModelInfo& model);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_VALIDATION_H_
