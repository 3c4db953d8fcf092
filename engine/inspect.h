// Inspect: what a model directory holds and what is wrong with it, for people and for tests.
#ifndef CACHALOT_ENGINE_INSPECT_H_
#define CACHALOT_ENGINE_INSPECT_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"

namespace cachalot {

struct InspectReport {
  std::string text;                   // config, tensors and bytes by kind and dtype, parameters, KV bytes a token
  std::vector<std::string> problems;  // one line each; empty: `serve` will load it
};

// "temperature 0.6, top_p 0.95": where `sampling` is not as SamplingParams begins; empty when it is.
std::string DescribeSampling(const SamplingParams& sampling);

// A config or header that cannot be read at all is the Status; everything found after that is a problem. `deep` also
// scans every weight for NaN, which reads the whole checkpoint.
absl::StatusOr<InspectReport> Inspect(const std::string& model_dir, bool deep);

}  // namespace cachalot

#endif  // CACHALOT_ENGINE_INSPECT_H_
