#include <fmt/format.h>
#include <fovea/version.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "attention_call.h"
#include "command.h"
#include "device_call.h"
#include "error_rule.h"
#include "files/safetensors.h"
#include "picture.h"
#include "problem/refuse.h"
#include "report.h"
#include "timing.h"

namespace fovea::tools {
namespace {

using nlohmann::ordered_json;

/// One direction of the call, executed and timed.
struct Pass {
  const char* name;
  Report report;
  Timing timing;
  double gflops = 0.0;
  double gbytes = 0.0;
};

/// What is told when all is done.
struct Summary {
  std::vector<Pass> passes;
  std::vector<Figure> figures;  // of --check

  [[nodiscard]] bool right() const {
    return std::ranges::all_of(figures, [](const Figure& figure) { return figure.failure.empty(); });
  }
};

class Run {
 public:
  explicit Run(const RunArguments& arguments) : asked_(arguments) {}
  ExitCode run() const;

 private:
  [[nodiscard]] Pass execute(Direction direction, const AttentionCall& call, Place& place,
                             const PlacedCall& placed) const;
  void draw(const AttentionCall& call, const Report& report) const;
  void print(const AttentionCall& call, const Summary& summary) const;
  [[nodiscard]] ordered_json to_json(const AttentionCall& call, const Summary& summary) const;
  [[nodiscard]] std::string title() const;

  const RunArguments& asked_;
};

std::string Run::title() const {
  if (!asked_.source.problem.empty()) return "random tensors";
  return asked_.source.file.empty() ? "arrays" : asked_.source.file;
}

Pass Run::execute(Direction direction, const AttentionCall& call, Place& place, const PlacedCall& placed) const {
  const Plan plan = plan_pass(call.problem, direction, place.device(), asked_.runner.options);
  const Workspace workspace(place, plan.workspace_bytes());
  const std::function<double()> once = [&] { return place.seconds_of([&] { placed.execute(plan, workspace); }); };
  Pass pass{direction == Direction::kForward ? "forward" : "backward", plan.report(), {}};
  pass.timing = measure(std::span(&once, 1), {.seconds = 0.1}).front();
  pass.gflops = flops_of(call.problem, direction) / pass.timing.median() / 1e9;
  pass.gbytes = traffic_bytes(direction, call.inputs, call.outputs) / pass.timing.median() / 1e9;
  return pass;
}

/// The tokens that a file's metadata name as a JSON list, where there are as many as positions.
std::vector<std::string> tokens_of(const AttentionCall& call, std::int64_t seqlen) {
  const auto found = call.metadata.find("tokens");
  if (found == call.metadata.end()) return {};
  const auto list = nlohmann::json::parse(found->second, nullptr, false);
  if (!list.is_array() || static_cast<std::int64_t>(list.size()) != seqlen) return {};
  if (!std::ranges::all_of(list, [](const auto& token) { return token.is_string(); })) return {};
  return list.get<std::vector<std::string>>();
}

/// Every result of the call against the double reference, by the error rule.
std::vector<Figure> judge_results(const AttentionCall& call) {
  const cpu::Operands operands(call.problem, call.inputs);
  const Peers peers(operands, cpu::reference(operands));
  std::vector<Figure> figures;
  for (const ResultKind& kind : result_kinds()) {
    const Tensor& tensor = call.outputs.*kind.tensor;
    if (tensor.defined()) figures.push_back(judge(kind, peers, tensor));
  }
  return figures;
}

void Run::draw(const AttentionCall& call, const Report& report) const {
  AttentionPicture picture = make_attention_picture(call.problem, call.inputs, asked_.sequence, asked_.heads);
  picture.tokens_q = tokens_of(call, picture.seqlen_q);
  picture.tokens_kv = tokens_of(call, picture.seqlen_kv);
  picture.facts.insert(picture.facts.begin(), {"tensors", title()});
  picture.facts.emplace_back("runs on", report.backend);
  for (const auto& [key, value] : call.metadata) {  // what a file says of itself
    if (key == "title") picture.title = value;
    if (key == "model" || key == "layer" || key == "text source") picture.facts.emplace_back(key, value);
  }
  write_attention_picture(asked_.plot, picture);
}

std::string tensor_text(const Tensor& tensor) {
  return fmt::format("{} [{}]", name(tensor.dtype), fmt::join(std::span(tensor.shape).first(tensor.rank), ", "));
}

std::string check_text(const Terminal& terminal, const Summary& summary) {
  std::string ratios;
  std::string failures;
  for (const Figure& figure : summary.figures) {
    ratios += fmt::format("{}{} {:.2f}", ratios.empty() ? "" : ", ", figure.name, figure.ratio);
    if (!figure.failure.empty()) failures += labelled(terminal, "", terminal.paint(Ink::kBad, figure.failure));
  }
  const std::string verdict =
      summary.right() ? terminal.paint(Ink::kGood, "right") : terminal.paint(Ink::kBad, "wrong");
  return labelled(terminal, "check",
                  fmt::format("{}  {}", verdict, terminal.paint(Ink::kDim, "against the double reference"))) +
         labelled(terminal, "",
                  ratios + terminal.paint(Ink::kDim,
                                          fmt::format("  times the plain formula's error; at most {}", kMostRatio))) +
         failures;
}

void Run::print(const AttentionCall& call, const Summary& summary) const {
  const Terminal terminal(stdout);
  terminal.line(fmt::format("\n  {}  {}\n", terminal.paint(Ink::kStrong, printable(title())),
                            terminal.paint(Ink::kDim, to_string(call.problem))));
  for (const auto& [name, tensor] : call.given()) terminal.write(labelled(terminal, name, tensor_text(tensor)));
  for (const std::string& name : call.unused) {
    terminal.write(labelled(terminal, "not read", terminal.paint(Ink::kDim, files::in_quotes(name))));
  }
  for (const Pass& pass : summary.passes) {
    terminal.write("\n" + labelled(terminal, pass.name,
                                   fmt::format("{}  {} GFLOP/s, {} GB/s  {}",
                                               terminal.paint(Ink::kStrong, seconds_text(pass.timing.median())),
                                               number_text(pass.gflops), number_text(pass.gbytes),
                                               terminal.paint(Ink::kDim, fmt::format("median of {}",
                                                                                     pass.timing.seconds.size())))));
    terminal.write(report_text(terminal, pass.report));
  }
  if (asked_.check) terminal.write('\n' + check_text(terminal, summary));
  terminal.line();
  for (const auto& [name, tensor] : call.results()) terminal.write(labelled(terminal, name, tensor_text(tensor)));
  if (!asked_.out.empty()) terminal.write(labelled(terminal, "written to", printable(asked_.out)));
  if (!asked_.plot.empty()) terminal.write(labelled(terminal, "picture", printable(asked_.plot)));
  terminal.line();
}

ordered_json Run::to_json(const AttentionCall& call, const Summary& summary) const {
  const auto described = [](const Tensor& tensor) {
    return ordered_json{{"dtype", name(tensor.dtype)},
                        {"shape", std::vector(tensor.shape.begin(), tensor.shape.begin() + tensor.rank)}};
  };
  ordered_json page{{"version", FOVEA_VERSION}, {"tensors", title()}, {"problem", to_string(call.problem)}};
  page["inputs"] = ordered_json::object();
  for (const auto& [name, tensor] : call.given()) page["inputs"][name] = described(tensor);
  page["not_read"] = call.unused;
  page["passes"] = ordered_json::array();
  for (const Pass& pass : summary.passes) {
    page["passes"].push_back({{"pass", pass.name},
                              {"report", report_json(pass.report)},
                              {"median_seconds", pass.timing.median()},
                              {"min_seconds", pass.timing.quantile(0)},
                              {"runs", pass.timing.seconds.size()},
                              {"gflops", pass.gflops},
                              {"gbytes_per_second", pass.gbytes}});
  }
  page["results"] = ordered_json::object();
  for (const auto& [name, tensor] : call.results()) page["results"][name] = described(tensor);
  page["check"] = nullptr;
  if (asked_.check) {
    page["check"] = {{"right", summary.right()}, {"most_ratio", kMostRatio}, {"ratios", ordered_json::object()}};
    page["check"]["failures"] = ordered_json::array();
    for (const Figure& figure : summary.figures) {
      page["check"]["ratios"][figure.name] = figure.ratio;
      if (!figure.failure.empty()) page["check"]["failures"].push_back(figure.failure);
    }
  }
  page["out"] = asked_.out.empty() ? ordered_json() : ordered_json(asked_.out);
  page["plot"] = asked_.plot.empty() ? ordered_json() : ordered_json(asked_.plot);
  return page;
}

ExitCode Run::run() const {
  const int sources = !asked_.source.file.empty() + !asked_.source.arrays.empty() + !asked_.source.problem.empty();
  if (sources != 1) {
    refuse(sources == 0
               ? "there are no tensors; give FILE.safetensors, --q --k --v, or --problem"
               : "tensors come from one place; give FILE.safetensors, --q --k --v, or --problem, and only one of them");
  }
  if (!asked_.source.problem.empty() && !asked_.source.options.empty()) {
    refuse("--options go with tensors; write the tokens into the --problem line");
  }
  if (asked_.source.file.ends_with(".npy")) {
    refuse(fmt::format("{} is a NumPy file; say whose it is, as in --q {}", files::in_quotes(asked_.source.file),
                       asked_.source.file));
  }
  std::vector<std::string> inputs{asked_.source.file};
  for (const auto& [name, path] : asked_.source.arrays) inputs.push_back(path);
  require_output("--out", asked_.out, inputs);
  require_output("--plot", asked_.plot, inputs);
  files::require_apart("--out", asked_.out, "--plot", asked_.plot);
  Place place(asked_.runner.parsed_device(false));
  const AttentionCall call = AttentionCall::prepare(asked_.source);
  if (!asked_.plot.empty()) require_drawable(call.problem, asked_.sequence, asked_.heads);
  const PlacedCall placed(place, call.inputs, call.outputs, call.allocations());
  placed.upload();
  Summary summary;
  summary.passes.push_back(execute(Direction::kForward, call, place, placed));
  if (call.problem.backward()) summary.passes.push_back(execute(Direction::kBackward, call, place, placed));
  placed.download();
  if (asked_.check) summary.figures = judge_results(call);
  if (!asked_.out.empty()) files::write_safetensors(asked_.out, call.results());
  if (!asked_.plot.empty()) draw(call, summary.passes.front().report);
  if (asked_.json) {
    Terminal(stdout).line(json_text(to_json(call, summary)));
  } else {
    print(call, summary);
  }
  return summary.right() ? kDone : kCheckFailed;
}

}  // namespace

ExitCode command_run(const RunArguments& arguments) { return Run(arguments).run(); }

}  // namespace fovea::tools
