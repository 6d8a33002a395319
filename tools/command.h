#pragma once

#include <fovea/plan.h>

#include <functional>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace fovea::tools {

enum ExitCode : int {
  kDone = 0,
  kCheckFailed = 1,
  kRefused = 2,  ///< the user's input
  kFailed = 3,   ///< the device or the system
};

/// What the words on the command line ask for; run once they are all understood.
using Action = std::function<ExitCode()>;

// Each adds one subcommand to `app`, which sets `action` where the user names it.
void add_run(CLI::App& app, Action& action);
void add_explain(CLI::App& app, Action& action);
void add_check(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_doctor(CLI::App& app, Action& action);

/// An option that names a file; an empty name is refused.
CLI::Option* add_path(CLI::App& command, const std::string& name, std::string& path, const std::string& help);

/// The flags that say who shall compute.
struct Runner {
  std::string device = "cpu";
  PlanOptions options;

  void add_to(CLI::App& command, bool architectures);
  void add_strict(CLI::App& command);
  /// The device named; `architectures` allows "sm_90", a GPU that need not be there.
  [[nodiscard]] Device parsed_device(bool architectures) const;
};

/// Problem lines as given, those of a file for each "@FILE": blank lines and what follows a '#' are left out.
[[nodiscard]] std::vector<std::string> problem_lines(const std::vector<std::string>& arguments);

}  // namespace fovea::tools
