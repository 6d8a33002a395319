#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "report.h"

namespace fovea::tools {
namespace {

struct Explain {
  std::vector<std::string> lines;
  Runner runner;
  bool json = false;

  ExitCode operator()() const {
    const Terminal terminal(stdout);
    const Device device = runner.parsed_device(true);
    auto reports = nlohmann::ordered_json::array();
    std::string text;  // told when every line is understood
    for (const std::string& line : problem_lines(lines)) {
      Problem problem = parse_problem(line);
      const Problem asked = problem;
      text += "\n  " + terminal.paint(Ink::kStrong, to_string(asked)) + '\n';
      for (const Direction pass : {Direction::kForward, Direction::kBackward}) {
        if (!(pass == Direction::kForward ? asked.forward() : asked.backward())) continue;
        problem.direction = pass;
        const Report report = fovea::explain(problem, device, runner.options);
        reports.push_back(report_json(report));
        text += "\n" + labelled(terminal, "pass", pass == Direction::kForward ? "forward" : "backward");
        text += report_text(terminal, report);
      }
    }
    terminal.line(json ? reports.dump(2) : text);
    return kDone;
  }
};

}  // namespace

void add_explain(CLI::App& app, Action& action) {
  auto explain = std::make_shared<Explain>();
  CLI::App* command =
      app.add_subcommand("explain", "Who would run a problem, how, and why the others would not; needs no GPU");
  command->add_option("problem", explain->lines, "problem lines, or @FILE of them")
      ->type_name("\"LINE\"|@FILE")
      ->required();
  explain->runner.add_to(*command, true);
  explain->runner.add_strict(*command);
  command->add_flag("--json", explain->json, "a JSON list, one report a pass");
  command->callback([explain, &action] { action = [explain] { return (*explain)(); }; });
}

}  // namespace fovea::tools
