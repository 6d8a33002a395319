#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fovea/error.h>
#include <fovea/version.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>

#include "command.h"
#include "cpu/threads.h"
#include "cuda/driver.h"
#include "device_call.h"
#include "error_rule.h"
#include "examples/ladder/ladder.h"
#include "files/tensor_data.h"
#include "machine.h"
#include "picture.h"
#include "problem/refuse.h"
#include "report.h"
#include "terminal.h"
#include "timing.h"
#include "workload.h"

namespace fovea::tools {
namespace {

using nlohmann::ordered_json;

constexpr int kRungs = ladder::kRungs + 2;  // and the library's own: portable, and the best that the device has
constexpr Direction kPasses[] = {Direction::kForward, Direction::kBackward};
constexpr std::string_view kMasks[] = {"full", "causal"};
constexpr std::string_view kDTypes[] = {"fp32", "fp16", "bf16"};

const char* name_of(Direction pass) { return pass == Direction::kForward ? "forward" : "backward"; }

/// One rung in one pass over one problem.
struct Step {
  int rung = 0;
  std::string problem, backend;
  std::int64_t seqlen = 0, head_dim = 0;
  std::string mask;
  Direction pass = Direction::kForward;
  Timing timing;        // empty where it was not run, because of
  std::string skipped;  // one sentence
  double flops = 0;
  std::size_t extra_bytes = 0;            // of memory, beside the tensors
  std::optional<ladder::Counts> counted;  // of rungs that have their algorithm here

  [[nodiscard]] double rate() const { return flops / timing.median(); }
};

/// How a rung did in the checks.
struct Verdicts {
  int problems = 0, wrong = 0;
  double worst = 0;
  std::string skipped;
};

class LadderRun {
 public:
  explicit LadderRun(const LadderArguments& arguments)
      : asked_(arguments), place_(Runner{.device = arguments.device, .options = {}}.parsed_device(false)) {
    if (asked_.dtypes.empty())
      asked_.dtypes = place_.on_gpu() ? std::vector<std::string>{"bf16"} : std::vector<std::string>{"fp32"};
    if (asked_.seqlens.empty()) {
      asked_.seqlens = place_.on_gpu() ? std::vector<std::int64_t>{512, 1024, 2048, 4096, 8192, 16384}
                                       : std::vector<std::int64_t>{256, 512, 1024, 2048};
    }
    for (const std::int64_t rung : asked_.rungs) rungs_.push_back(static_cast<int>(rung));
    if (asked_.batch == 0) asked_.batch = place_.on_gpu() ? 4 : 1;
    if (asked_.heads == 0) asked_.heads = place_.on_gpu() ? 16 : 4;
    for (const std::string& dtype : asked_.dtypes) {
      if (std::ranges::find(kDTypes, dtype) == std::end(kDTypes))
        refuse(fmt::format("--dtype {} is unknown; use fp32, fp16 or bf16", files::in_quotes(dtype)));
    }
    for (const std::string& mask : asked_.masks) {
      if (std::ranges::find(kMasks, mask) == std::end(kMasks))
        refuse(
            fmt::format("--mask {} is unknown; use full, causal or both, as in full,causal", files::in_quotes(mask)));
    }
  }
  ExitCode run();

 private:
  [[nodiscard]] std::string title(int rung) const;
  [[nodiscard]] Plan plan(int rung, const Problem& problem, Direction pass) const;
  [[nodiscard]] bool check();
  void check_line(const std::string& line, std::vector<Verdicts>& verdicts);
  void measure_sizes(const std::string& dtype, std::int64_t head_dim);
  [[nodiscard]] Step measure_step(int rung, const Problem& problem, Direction pass, const PlacedCall& call);
  void print(const Problem& problem, std::size_t first_step) const;
  [[nodiscard]] ordered_json page() const;
  [[nodiscard]] Facts facts() const;
  void show_progress(const std::string& label) {
    bar_.show(static_cast<double>(done_) / static_cast<double>(all_), label);
  }

  LadderArguments asked_;
  std::vector<int> rungs_;  // that are asked for, and then that have run
  Place place_;
  ProgressBar bar_;
  std::size_t done_ = 0, all_ = 1;
  std::vector<Step> steps_;
  ordered_json checks_ = ordered_json::array();
};

std::string LadderRun::title(int rung) const {
  if (rung < ladder::kRungs) return ladder::describe(rung).name;
  if (rung == ladder::kRungs) return "Fovea, portable";
  return place_.on_gpu() ? "Fovea, Hopper" : "Fovea, this CPU";
}

Plan LadderRun::plan(int rung, const Problem& problem, Direction pass) const {
  if (rung < ladder::kRungs) return ladder::plan(rung, problem, pass, place_.device());
  PlanOptions options;
  if (rung == ladder::kRungs) options.backend = place_.on_gpu() ? "cuda_portable" : "cpu_portable";
  if (rung > ladder::kRungs && place_.on_gpu()) options.backend = "cuda_hopper";
  return plan_pass(problem, pass, place_.device(), options);
}

// ---- against the oracle

/// Every rung on one problem, forward and backward.
void LadderRun::check_line(const std::string& line, std::vector<Verdicts>& verdicts) {
  Workload work(parse_problem(line), 1);
  const Problem& problem = work.problem();
  const PlacedCall call(place_, work.inputs(), work.outputs(), work.allocations());
  const cpu::Operands operands(problem, work.inputs());
  const Peers peers(operands, cpu::reference(operands));
  const Terminal terminal(stdout);
  for (const int rung : rungs_) {
    show_progress(fmt::format("rung {} against the oracle", rung));
    ++done_;
    Verdicts& verdict = verdicts[static_cast<std::size_t>(rung)];
    std::string wrong;
    try {
      work.poison_outputs();
      call.upload();
      for (const Direction pass : kPasses) {
        const Plan planned = plan(rung, problem, pass);
        const Workspace workspace(place_, planned.workspace_bytes());
        workspace.fill(0xff);  // NaN
        call.execute(planned, workspace);
        if (workspace.overrun()) wrong = fmt::format("the {} pass has written past its workspace", name_of(pass));
      }
      call.download();
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
      verdict.skipped = error.what();
      continue;
    }
    if (call.overrun()) wrong = "memory beside an output has been written";
    for (const ResultKind& kind : result_kinds()) {
      const Tensor& tensor = work.outputs().*kind.tensor;
      if (!tensor.defined()) continue;
      const Figure figure = judge(kind, peers, tensor);
      verdict.worst = std::max(verdict.worst, figure.ratio);
      if (!figure.failure.empty()) wrong = figure.failure;
    }
    ++verdict.problems;
    if (wrong.empty()) continue;
    ++verdict.wrong;
    bar_.clear();
    terminal.line(fmt::format("  {} rung {}, {}: {}", terminal.paint(Ink::kBad, "wrong"), rung, line, wrong));
  }
}

/// Short, long, lying and standing problems, with rows that see nothing and sizes that are no whole tiles.
bool LadderRun::check() {
  constexpr const char* kShapes[] = {"b2 hq3 sq200 skv330 d{}",
                                     "b1 hq2 sq333 skv333 d{} causal=bottom_right",
                                     "b2 hq1 sq129 skv257 d{} causal=top_left layout=bhsd",
                                     "b1 hq2 sq257 skv70 d{} causal=bottom_right",
                                     "b2 hq2 sq150 skv150 d{} layout=qkv_packed",
                                     "b1 hq2 sq1 skv700 d{} causal=bottom_right"};
  std::vector<std::string> lines;
  for (const std::string& dtype : asked_.dtypes) {
    for (const std::int64_t dim : asked_.head_dims) {
      for (const char* shape : kShapes) {
        std::string line = fmt::format("fwd+bwd {} {}", dtype, fmt::format(fmt::runtime(shape), dim));
        lines.push_back(std::move(line));
      }
    }
  }
  done_ = 0, all_ = lines.size() * rungs_.size();
  std::vector<Verdicts> verdicts(kRungs);
  for (const std::string& line : lines) check_line(line, verdicts);
  bar_.clear();
  if (std::ranges::all_of(verdicts, [](const Verdicts& v) { return v.problems == 0; }))
    throw Error(ErrorCode::kUnsupported, verdicts[static_cast<std::size_t>(rungs_.front())].skipped);
  Table table({{"rung"}, {""}, {"against the oracle"}, {"worst error", true}});
  bool right = true;
  for (const int rung : rungs_) {
    const Verdicts& v = verdicts[static_cast<std::size_t>(rung)];
    right = right && v.wrong == 0;
    const std::string said = v.problems == 0 ? "not run"
                             : v.wrong > 0   ? fmt::format("wrong in {} of {} problems", v.wrong, v.problems)
                                             : fmt::format("right in {} problems", v.problems);
    table.add({{std::to_string(rung)},
               {title(rung), Ink::kStrong},
               {said, v.problems == 0 ? Ink::kDim
                      : v.wrong > 0   ? Ink::kBad
                                      : Ink::kGood},
               {v.problems == 0 ? "" : fmt::format("{:.2f}", v.worst)}});
    checks_.push_back({{"rung", rung},
                       {"name", title(rung)},
                       {"problems", v.problems},
                       {"wrong", v.wrong},
                       {"worst_error_over_peers", v.worst}});
    if (!v.skipped.empty()) checks_.back()["skipped"] = v.skipped;
  }
  const Terminal terminal(stdout);
  terminal.write(table.text(terminal));
  for (const int rung : rungs_) {
    const std::string& why = verdicts[static_cast<std::size_t>(rung)].skipped;
    if (!why.empty()) terminal.line("  " + terminal.paint(Ink::kDim, "left out: " + why));
  }
  terminal.line("  " + terminal.paint(
                           Ink::kDim,
                           fmt::format("errors over those of their peers, at most {} (docs/contract.md)", kMostRatio)));
  // What has just been told once is not told again for every length.
  std::erase_if(rungs_, [&](int rung) { return verdicts[static_cast<std::size_t>(rung)].problems == 0; });
  return right;
}

// ---- measured

Step LadderRun::measure_step(int rung, const Problem& problem, Direction pass, const PlacedCall& call) {
  Step step;
  step.rung = rung;
  step.problem = to_string(problem);
  step.seqlen = problem.seqlen_q;
  step.head_dim = problem.head_dim;
  step.mask = kMasks[problem.causal == Causal::kNone ? 0 : 1];
  step.pass = pass;
  step.flops = flops_of(problem, pass);
  try {
    const Plan planned = plan(rung, problem, pass);
    step.backend = planned.report().backend;
    step.extra_bytes = planned.workspace_bytes();
    if (rung < ladder::kRungs) step.counted = ladder::counts(rung, problem, pass);
    const std::int64_t memory =
        place_.on_gpu() ? cuda::gpu(place_.device().index).memory_bytes : processor().memory_bytes / 2;
    if (std::cmp_greater(step.extra_bytes, memory)) {
      step.skipped =
          fmt::format("out of memory: it needs {} beside its tensors, and there are {}",
                      bytes_text(static_cast<double>(step.extra_bytes)), bytes_text(static_cast<double>(memory)));
      return step;
    }
    const Workspace workspace(place_, planned.workspace_bytes());
    const std::function<double()> once[] = {
        [&] { return place_.seconds_of([&] { call.execute(planned, workspace); }); }};
    step.timing = measure(once, asked_.effort).front();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kDevice || error.code() == ErrorCode::kInternal) throw;
    step.skipped = error.what();
  }
  return step;
}

void LadderRun::measure_sizes(const std::string& dtype, std::int64_t head_dim) {
  for (const std::int64_t seqlen : asked_.seqlens) {
    // The tensors are the same, whatever the mask.
    const Workload work(
        parse_problem(fmt::format("fwd+bwd {} b{} hq{} sq{} d{}", dtype, asked_.batch, asked_.heads, seqlen, head_dim)),
        0);
    const PlacedCall call(place_, work.inputs(), work.outputs(), work.allocations());
    call.upload();
    for (const std::string& mask : asked_.masks) {
      Problem problem = work.problem();
      if (mask == kMasks[1]) problem.causal = Causal::kBottomRight;
      const std::size_t first = steps_.size();
      for (const Direction pass : kPasses) {
        for (const int rung : rungs_) {
          show_progress(fmt::format("{} {} of rung {}, {}", seqlen, mask, rung, name_of(pass)));
          steps_.push_back(measure_step(rung, problem, pass, call));
          ++done_;
        }
      }
      bar_.clear();
      print(problem, first);
    }
  }
}

void LadderRun::print(const Problem& problem, std::size_t first_step) const {
  const Terminal terminal(stdout);
  terminal.line("\n  " + terminal.paint(Ink::kStrong, to_string(problem)));
  const std::string rate = place_.on_gpu() ? "TFLOP/s" : "GFLOP/s";
  Table table({{"rung"},
               {""},
               {"forward", true, 8},
               {rate, true},
               {"backward", true, 8},
               {rate, true},
               {"extra memory", true},
               {"moved", true, 8},
               {"per score", true}});
  for (std::size_t i = 0; i < rungs_.size(); ++i) {
    const int rung = rungs_[i];
    const Step &forward = steps_[first_step + i], &backward = steps_[first_step + rungs_.size() + i];
    std::vector<Table::Cell> cells{{std::to_string(rung)}, {title(rung), Ink::kStrong}};
    for (const Step* step : {&forward, &backward}) {
      const bool run = step->skipped.empty();
      cells.push_back({run ? seconds_text(step->timing.median()) : "-", run ? Ink::kStrong : Ink::kDim});
      cells.push_back({run ? number_text(step->rate() / (place_.on_gpu() ? 1e12 : 1e9)) : "-"});
    }
    const std::size_t extra_bytes = std::max(forward.extra_bytes, backward.extra_bytes);
    const bool planned = !forward.backend.empty() || !backward.backend.empty();
    cells.push_back({planned ? bytes_text(static_cast<double>(extra_bytes)) : "-"});
    const bool counted = forward.counted && backward.counted;
    cells.push_back({counted ? bytes_text(forward.counted->bytes + backward.counted->bytes) : "-"});
    cells.push_back({counted ? fmt::format("{} + {}", number_text(forward.counted->other_per_score),
                                           number_text(backward.counted->other_per_score))
                             : "-"});
    table.add(std::move(cells));
  }
  terminal.write(table.text(terminal));
  for (std::size_t i = first_step; i < steps_.size(); ++i) {
    const bool told = i >= first_step + rungs_.size() && steps_[i].skipped == steps_[i - rungs_.size()].skipped;
    if (steps_[i].skipped.empty() || told) continue;
    terminal.line("  " + terminal.paint(Ink::kDim, fmt::format("rung {}, {}: {}", steps_[i].rung,
                                                               name_of(steps_[i].pass), steps_[i].skipped)));
  }
}

// ---- told

Facts LadderRun::facts() const {
  Facts facts{{"processor", processor().model}};
  if (place_.on_gpu()) {
    const int driver = cuda::driver_version();
    facts.emplace_back("gpu", cuda::gpu(place_.device().index).name);
    facts.emplace_back("driver", fmt::format("CUDA {}.{}", driver / 1000, driver % 1000 / 10));
  } else {
    facts.emplace_back("threads", std::to_string(cpu::worker_count(0)));
  }
  facts.emplace_back("version", FOVEA_VERSION);
  facts.emplace_back("date", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))));
  return facts;
}

ordered_json LadderRun::page() const {
  ordered_json page{{"device", name(place_.device())}};
  for (const auto& [key, value] : facts()) page[key] = value;
  page["rungs"] = ordered_json::array();
  for (const int rung : rungs_) {
    page["rungs"].push_back(
        {{"rung", rung},
         {"name", title(rung)},
         {"idea", rung < ladder::kRungs ? ladder::describe(rung).idea : "the library's own kernels"}});
  }
  page["checks"] = checks_;
  page["results"] = ordered_json::array();
  for (const Step& step : steps_) {
    ordered_json row{{"rung", step.rung},         {"name", title(step.rung)},   {"backend", step.backend},
                     {"problem", step.problem},   {"pass", name_of(step.pass)}, {"seqlen", step.seqlen},
                     {"head_dim", step.head_dim}, {"mask", step.mask}};
    row["extra_bytes"] = step.extra_bytes;
    if (step.counted) {
      row["moved_bytes"] = step.counted->bytes;
      row["other_operations_per_score"] = step.counted->other_per_score;
    }
    if (step.skipped.empty()) {
      row["median_seconds"] = step.timing.median();
      row["min_seconds"] = step.timing.quantile(0);
      row["p90_seconds"] = step.timing.quantile(0.9);
      row["runs"] = step.timing.seconds.size();
      row["tflops"] = step.rate() / 1e12;
    } else {
      row["skipped"] = step.skipped;
    }
    page["results"].push_back(std::move(row));
  }
  return page;
}

ExitCode LadderRun::run() {
  require_duration(asked_.effort);
  if (!asked_.json.empty()) files::require_writable(asked_.json);
  if (!asked_.html.empty()) files::require_writable(asked_.html);
  files::require_apart("--json", asked_.json, "--html", asked_.html);
  const Terminal terminal(stdout);
  const bool right = check();
  if (asked_.check || !right) return right ? kDone : kCheckFailed;
  done_ = 0, all_ = asked_.dtypes.size() * asked_.head_dims.size() * asked_.seqlens.size() * asked_.masks.size() *
                    rungs_.size() * 2;
  for (const std::string& dtype : asked_.dtypes) {
    for (const std::int64_t dim : asked_.head_dims) measure_sizes(dtype, dim);
  }
  terminal.line("  " + terminal.paint(Ink::kDim,
                                      "moved, per score: bytes to and from memory, and operations that are no product, "
                                      "counted from the algorithm"));
  terminal.line();
  const ordered_json told = page();
  if (!asked_.json.empty()) {
    files::write_atomically(asked_.json, [&](std::ostream& stream) { stream << json_text(told) << '\n'; });
    terminal.write(labelled(terminal, "numbers", printable(asked_.json)));
  }
  if (!asked_.html.empty()) {
    write_ladder_page(asked_.html, told, facts());
    terminal.write(labelled(terminal, "picture", printable(asked_.html)));
  }
  return kDone;
}

}  // namespace

ExitCode command_ladder(const LadderArguments& arguments) { return LadderRun(arguments).run(); }

}  // namespace fovea::tools
