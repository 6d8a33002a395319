#include <fovea/error.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "check.h"
#include "command.h"

namespace fovea::tools {

void add_check(CLI::App& app, Action& action) {
  struct Check {
    CheckRun run;
    std::vector<std::string> lines;
    Runner runner;
  };
  auto check = std::make_shared<Check>();
  CLI::App* command = app.add_subcommand("check", "Holds results against the double reference by the error rule");
  command->add_option("problem", check->lines, "problem lines, or @FILE of them")->type_name("\"LINE\"|@FILE");
  command->add_option("--random", check->run.random, "so many random problems, out of the whole option space")
      ->type_name("N")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{100'000'000}).description(""));
  command->add_option("--seed", check->run.seed, "of the random problems and tensors")
      ->type_name("S")
      ->capture_default_str();
  command->add_flag("--pairs", check->run.pairs, "count how often each two options came together");
  command->add_option("--jobs", check->run.jobs, "problems at once; 0: as many as the process may use threads")
      ->type_name("N")
      ->check(CLI::Range(0, 65536).description(""));
  check->runner.add_to(*command, false);
  command->callback([check, &action] {
    action = [check] {
      CheckRun& run = check->run;
      if (!check->lines.empty()) run.lines = problem_lines(check->lines);
      if (run.lines.empty() && run.random == 0) {
        throw Error(ErrorCode::kInvalidArgument, "there is nothing to check; give a problem line, @FILE or --random N");
      }
      run.options.device = check->runner.parsed_device(false);
      run.options.backend = check->runner.options.backend;
      run.options.num_threads = check->runner.options.num_threads;
      return run_check(run) == 0 ? kDone : kCheckFailed;
    };
  });
}

}  // namespace fovea::tools
