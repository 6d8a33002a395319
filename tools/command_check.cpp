#include "command.h"
#include "problem/refuse.h"

namespace fovea::tools {

ExitCode command_check(const CheckArguments& arguments) {
  CheckRun run = arguments.run;
  if (!arguments.lines.empty()) run.problems = problems_of(arguments.lines);
  if (run.problems.empty() && run.random == 0) {
    refuse("there is nothing to check; give a problem line, @FILE or --random N");
  }
  run.options.device = arguments.runner.parsed_device(false);
  run.options.backend = arguments.runner.options.backend;
  run.options.num_threads = arguments.runner.options.num_threads;
  return run_check(run) == 0 ? kDone : kCheckFailed;
}

}  // namespace fovea::tools
