#include <nlohmann/json.hpp>

#include "command.h"
#include "report.h"

namespace fovea::tools {

ExitCode command_explain(const ExplainArguments& arguments) {
  const Terminal terminal(stdout);
  const Device device = arguments.runner.parsed_device(true);
  auto reports = nlohmann::ordered_json::array();
  std::string text;  // told when every line is understood
  for (const Problem& asked : problems_of(arguments.lines)) {
    Problem problem = asked;
    text += "\n  " + terminal.paint(Ink::kStrong, to_string(asked)) + '\n';
    for (const Direction pass : {Direction::kForward, Direction::kBackward}) {
      if (!(pass == Direction::kForward ? asked.forward() : asked.backward())) continue;
      problem.direction = pass;
      const Report report = fovea::explain(problem, device, arguments.runner.options);
      reports.push_back(report_json(report));
      text += "\n" + labelled(terminal, "pass", pass == Direction::kForward ? "forward" : "backward");
      text += report_text(terminal, report);
    }
  }
  terminal.line(arguments.json ? json_text(reports) : text);
  return kDone;
}

}  // namespace fovea::tools
