// The cachalot program: picks the command.
#include <cstdio>
#include <string>
#include <variant>
#include <vector>

#include "server/cli/chat.h"
#include "server/cli/inspect.h"
#include "server/cli/plan.h"
#include "server/cli/serve.h"
#include "server/cli/uncaught.h"
#include "server/logging.h"
#include "server/options.h"

// NOTE: before other static objects: one of gRPC's opens a descriptor.
[[gnu::constructor(101)]] static void BeforeAll() { cachalot::OpenStandardFiles(); }

int main(int argc, char** argv) {
  cachalot::ExitOnUncaught();
  const cachalot::Command command = cachalot::ParseCommandLine(std::vector<std::string>(argv + 1, argv + argc));
  if (const auto* serve = std::get_if<cachalot::ServeOptions>(&command)) return cachalot::Serve(*serve);
  if (const auto* chat = std::get_if<cachalot::ChatOptions>(&command)) return cachalot::Chat(*chat);
  if (const auto* inspect = std::get_if<cachalot::InspectOptions>(&command)) return cachalot::InspectModel(*inspect);
  if (const auto* plan = std::get_if<cachalot::PlanOptions>(&command)) return cachalot::PlanModel(*plan);
  const auto& exit = std::get<cachalot::ExitNow>(command);
  std::fwrite(exit.text.data(), 1, exit.text.size(), exit.code == 0 ? stdout : stderr);
  return exit.code;
}
