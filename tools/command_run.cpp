#include <fmt/format.h>
#include <fovea/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "attention_call.h"
#include "command.h"
#include "error_rule.h"
#include "picture.h"
#include "report.h"
#include "safetensors.h"
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

struct Run {
  CallSource source;
  Runner runner;
  std::string out;
  std::string plot;
  std::vector<std::int64_t> heads;
  std::int64_t sequence = 0;
  bool check = false;
  bool json = false;

  ExitCode operator()() const;

 private:
  [[nodiscard]] Pass execute(Direction direction, const AttentionCall& call) const;
  void draw(const AttentionCall& call, const Report& report) const;
  void print(const AttentionCall& call, const Summary& summary) const;
  [[nodiscard]] ordered_json to_json(const AttentionCall& call, const Summary& summary) const;
  [[nodiscard]] std::string title() const {
    return source.problem.empty() ? source.file.empty() ? "arrays" : source.file : "random tensors";
  }
};

Pass Run::execute(Direction direction, const AttentionCall& call) const {
  const bool forward = direction == Direction::kForward;
  const Device device = runner.parsed_device(false);
  const Plan plan = forward ? plan_forward(call.problem, device, runner.options)
                            : plan_backward(call.problem, device, runner.options);
  const auto bytes = static_cast<std::int64_t>(plan.workspace_bytes());
  const OwnedTensor workspace(DType::kBool, std::span(&bytes, 1));
  const std::function<void()> once = [&] { plan.execute(call.inputs, call.outputs, workspace.view().data); };
  Pass pass{forward ? "forward" : "backward", plan.report(), {}};
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
  const cpu::ReferenceResult exact = cpu::reference(operands);
  const PlainResult peer = plain(operands);
  std::vector<Figure> figures;
  for (const ResultKind& kind : result_kinds()) {
    const Tensor& tensor = call.outputs.*kind.tensor;
    if (tensor.defined()) figures.push_back(judge(kind, call.problem, exact.*kind.exact, peer.*kind.plain, tensor));
  }
  return figures;
}

void Run::draw(const AttentionCall& call, const Report& report) const {
  AttentionPicture picture = make_attention_picture(call.problem, call.inputs, sequence, heads);
  picture.tokens_q = tokens_of(call, picture.seqlen_q);
  picture.tokens_kv = tokens_of(call, picture.seqlen_kv);
  picture.facts.insert(picture.facts.begin(), {"tensors", title()});
  picture.facts.emplace_back("runs on", report.backend);
  for (const auto& [key, value] : call.metadata) {  // what a file says of itself
    if (key == "title") picture.title = value;
    if (key == "model" || key == "layer" || key == "text source") picture.facts.emplace_back(key, value);
  }
  write_attention_picture(plot, picture);
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
  terminal.line(fmt::format("\n  {}  {}\n", terminal.paint(Ink::kStrong, title()),
                            terminal.paint(Ink::kDim, to_string(call.problem))));
  for (const auto& [name, member] : kInputNames) {
    if ((call.inputs.*member).defined()) terminal.write(labelled(terminal, name, tensor_text(call.inputs.*member)));
  }
  for (const std::string& name : call.unused) {
    terminal.write(labelled(terminal, "not read", terminal.paint(Ink::kDim, in_quotes(name))));
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
  if (check) terminal.write('\n' + check_text(terminal, summary));
  terminal.line();
  for (const auto& [name, tensor] : call.results()) terminal.write(labelled(terminal, name, tensor_text(tensor)));
  if (!out.empty()) terminal.write(labelled(terminal, "written to", out));
  if (!plot.empty()) terminal.write(labelled(terminal, "picture", plot));
  terminal.line();
}

ordered_json Run::to_json(const AttentionCall& call, const Summary& summary) const {
  const auto described = [](const Tensor& tensor) {
    return ordered_json{{"dtype", name(tensor.dtype)},
                        {"shape", std::vector(tensor.shape.begin(), tensor.shape.begin() + tensor.rank)}};
  };
  ordered_json page{{"version", FOVEA_VERSION}, {"tensors", title()}, {"problem", to_string(call.problem)}};
  page["inputs"] = ordered_json::object();
  for (const auto& [name, member] : kInputNames) {
    if ((call.inputs.*member).defined()) page["inputs"][name] = described(call.inputs.*member);
  }
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
  if (check) {
    page["check"] = {{"right", summary.right()}, {"most_ratio", kMostRatio}, {"ratios", ordered_json::object()}};
    page["check"]["failures"] = ordered_json::array();
    for (const Figure& figure : summary.figures) {
      page["check"]["ratios"][figure.name] = figure.ratio;
      if (!figure.failure.empty()) page["check"]["failures"].push_back(figure.failure);
    }
  }
  page["out"] = out.empty() ? ordered_json() : ordered_json(out);
  page["plot"] = plot.empty() ? ordered_json() : ordered_json(plot);
  return page;
}

ExitCode Run::operator()() const {
  const int sources = !source.file.empty() + !source.arrays.empty() + !source.problem.empty();
  if (sources != 1) {
    throw Error(
        ErrorCode::kInvalidArgument,
        sources == 0
            ? "there are no tensors; give FILE.safetensors, --q --k --v, or --problem"
            : "tensors come from one place; give FILE.safetensors, --q --k --v, or --problem, and only one of them");
  }
  if (!source.problem.empty() && !source.options.empty()) {
    throw Error(ErrorCode::kInvalidArgument, "--options go with tensors; write the tokens into the --problem line");
  }
  if (!out.empty()) require_writable(out);
  if (!plot.empty()) require_writable(plot);
  const AttentionCall call = AttentionCall::prepare(source);
  Summary summary;
  summary.passes.push_back(execute(Direction::kForward, call));
  if (call.problem.backward()) summary.passes.push_back(execute(Direction::kBackward, call));
  if (check) summary.figures = judge_results(call);
  if (!out.empty()) write_safetensors(out, call.results());
  if (!plot.empty()) draw(call, summary.passes.front().report);
  if (json) {
    Terminal(stdout).line(to_json(call, summary).dump(2));
  } else {
    print(call, summary);
  }
  return summary.right() ? kDone : kCheckFailed;
}

}  // namespace

void add_run(CLI::App& app, Action& action) {
  auto run = std::make_shared<Run>();
  CLI::App* command = app.add_subcommand("run", "Attention over the tensors of a file, or over random ones");
  add_path(*command, "file", run->source.file, "q, k, v and what the call needs, by name")
      ->type_name("FILE.safetensors");
  command->add_option("--problem", run->source.problem, "random tensors for a problem line instead")
      ->type_name("\"LINE\"");
  command->add_option("--seed", run->source.seed, "of the random tensors")->type_name("N")->capture_default_str();
  command->add_option("--options", run->source.options, "tokens of a problem line: \"causal=top_left dropout=0.1\"")
      ->type_name("\"TOKENS\"");
  command->add_flag("--grad", run->source.gradients, "the gradients too; the tensors must hold dout");
  add_path(*command, "--out", run->out, "write the results")->type_name("OUT.safetensors");
  add_path(*command, "--plot", run->plot, "draw the attention weights as one self-contained page")
      ->type_name("FILE.html");
  command->add_option("--heads", run->heads, "heads to draw, as in 0,3,5; all where left out")
      ->type_name("LIST")
      ->delimiter(',');
  command->add_option("--sequence", run->sequence, "batch element or packed sequence to draw")
      ->type_name("N")
      ->capture_default_str();
  run->runner.add_to(*command, false);
  run->runner.add_strict(*command);
  command->add_flag("--check", run->check, "hold the results against the double reference; exit 1 where one is wrong");
  command->add_flag("--json", run->json, "one JSON object");
  for (const auto& [name, member] : kInputNames) {
    std::string flag = fmt::format("--{}", name);
    std::ranges::replace(flag, '_', '-');
    command
        ->add_option_function<std::string>(
            flag, [run, name = name](const std::string& path) { run->source.arrays[name] = path; },
            fmt::format("{} from a NumPy file", name))
        ->type_name("FILE.npy")
        ->group("Tensors one by one");
  }
  command->callback([run, &action] { action = [run] { return (*run)(); }; });
}

}  // namespace fovea::tools
