// The engine inspects the model, the tokenizer itself.
#include "server/cli/inspect.h"

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/inspect.h"
#include "server/text/tokenizer.h"

namespace cachalot {

int InspectModel(const InspectOptions& options) {
  std::vector<std::string> problems;
  absl::StatusOr<InspectReport> report = Inspect(options.model_dir, options.deep);
  if (report.ok()) {
    std::fputs(report->text.c_str(), stdout);
    if (!report->text.empty() && report->text.back() != '\n') std::fputc('\n', stdout);
    problems = std::move(report->problems);
    const auto tokenizer = Tokenizer::Load(options.model_dir);
    if (tokenizer.ok()) {
      const std::optional<int32_t> end = (*tokenizer)->eos_id();
      std::printf("tokenizer: %d ids%s\n", (*tokenizer)->vocab_size(),
                  end.has_value() ? absl::StrCat(", answers end at token ", *end).c_str() : "");
    } else {
      problems.emplace_back(tokenizer.status().message());
    }
  } else {
    problems.emplace_back(report.status().message());
  }
  std::fflush(stdout);
  for (const std::string& problem : problems) {
    std::fprintf(stderr, "cachalot: %s\n", absl::StrReplaceAll(problem, {{"\n", " "}}).c_str());
  }
  return problems.empty() ? 0 : 1;
}

}  // namespace cachalot
