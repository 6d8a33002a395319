#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fovea/error.h>
#include <fovea/version.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <map>
#include <nlohmann/json.hpp>

#include "command.h"
#include "cpu/flash_backend.h"
#include "cpu/threads.h"
#include "cuda/driver.h"
#include "device_call.h"
#include "files/tensor_data.h"
#include "machine.h"
#include "picture.h"
#include "report.h"
#include "terminal.h"
#include "timing.h"
#include "workload.h"

namespace fovea::tools {
namespace {

using nlohmann::ordered_json;

constexpr const char* kStandardOutput = "-";

/// One contender in one pass over one problem.
struct Result {
  std::string problem;
  std::string pass;
  std::string backend;
  Timing timing;
  double flops = 0.0;
  double bytes = 0.0;
  std::string isa;       // whose multiply-add rate is the ceiling; empty: a GPU, whose copy rate is
  double ceiling = 0.0;  // FLOP/s, or bytes/s
  double plan_seconds = 0.0;
  std::size_t workspace_bytes = 0;
  std::vector<std::pair<std::string, std::string>> details;  // of the report
  std::string against;  // the contender that `ratio` compares with; empty: this is that one
  double ratio = 0.0;   // how many times as long this one takes

  [[nodiscard]] double gflops() const { return flops / timing.median() / 1e9; }
  [[nodiscard]] double gbytes() const { return bytes / timing.median() / 1e9; }
  [[nodiscard]] double percent() const {
    return ceiling > 0 ? 100 * (isa.empty() ? bytes : flops) / timing.median() / ceiling : 0.0;
  }
};

/// A plan with a workspace of its own, so that no allocation is timed.
struct Contender {
  Plan plan;
  double plan_seconds;
  Workspace workspace;
};

/// The rates of this run: each instruction set, or the GPU's copies, measured around every problem; the best time
/// counts.
class Ceilings {
 public:
  Ceilings(Place& place, int threads) : place_(place), threads_(threads) {}

  void measure(const std::string& isa) {
    constexpr double kSeconds = 0.15;
    double& rate = rates_[isa];
    rate = std::max(rate,
                    isa.empty() ? place_.copy_rate() : fma_rate(name_of(isa), isa != name_of(isa), threads_, kSeconds));
  }
  [[nodiscard]] double rate(const std::string& isa) const { return rates_.at(isa); }

  /// The instruction set that a backend's name ends in, else the best there is, and " bf16" if it multiplies pairs of
  /// that; none on a GPU.
  [[nodiscard]] std::string isa_of(const std::string& backend, DType dtype) const {
    if (place_.on_gpu()) return {};
    const std::vector<std::string> isas = cpu::available_isas();
    const auto named = std::ranges::find_if(isas, [&](const std::string& isa) { return backend.ends_with("_" + isa); });
    const std::string isa = named == isas.end() ? isas.front() : *named;
    return isa + (dtype == DType::kBFloat16 && multiplies_pairs(isa) ? kPairs : "");
  }

 private:
  static constexpr const char* kPairs = " bf16";
  static std::string name_of(const std::string& isa) { return isa.substr(0, isa.find(kPairs)); }

  Place& place_;
  int threads_;
  std::map<std::string, double> rates_;
};

class Bench {
 public:
  explicit Bench(const BenchArguments& arguments)
      : asked_(arguments),
        threads_(cpu::worker_count(asked_.runner.options.num_threads)),
        place_(asked_.runner.parsed_device(false)),
        ceilings_(place_, threads_) {}
  ExitCode run();

 private:
  std::vector<Result> run_problem(const Problem& problem, const std::string& place);
  std::vector<Result> run_pass(Direction pass, const Workload& work, const PlacedCall& call,
                               const std::function<void(double)>& progress);
  [[nodiscard]] Contender make_contender(Direction pass, const Problem& problem, const std::string& backend) const;
  void print_problem(const Terminal& terminal, const std::vector<Result>& results) const;
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> facts() const;
  void write_files(const std::vector<Result>& results) const;

  const BenchArguments& asked_;
  int threads_;
  Place place_;
  Ceilings ceilings_;
  ProgressBar bar_;
};

Contender Bench::make_contender(Direction pass, const Problem& problem, const std::string& backend) const {
  PlanOptions options = asked_.runner.options;
  options.backend = backend;
  const auto start = std::chrono::steady_clock::now();
  Plan plan = plan_pass(problem, pass, place_.device(), options);
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  Workspace workspace(place_, plan.workspace_bytes());
  return {std::move(plan), time.count(), std::move(workspace)};
}

std::vector<Result> Bench::run_pass(Direction pass, const Workload& work, const PlacedCall& call,
                                    const std::function<void(double)>& progress) {
  std::vector<std::string> backends{asked_.runner.options.backend};
  backends.insert(backends.end(), asked_.against.begin(), asked_.against.end());
  std::vector<Contender> contenders;
  contenders.reserve(backends.size());
  for (const std::string& backend : backends) contenders.push_back(make_contender(pass, work.problem(), backend));
  std::vector<std::function<double()>> executions;
  for (const Contender& contender : contenders) {
    executions.emplace_back([this, &call, &contender] {
      return place_.seconds_of([&] { call.execute(contender.plan, contender.workspace); });
    });
    ceilings_.measure(ceilings_.isa_of(contender.plan.report().backend, work.problem().dtype));
  }
  const std::vector<Timing> timings = measure(executions, asked_.effort, progress);
  std::vector<Result> results;
  for (std::size_t i = 0; i < contenders.size(); ++i) {
    const Report& report = contenders[i].plan.report();
    Result result;
    result.pass = pass == Direction::kForward ? "forward" : "backward";
    result.backend = report.backend;
    result.timing = timings[i];
    result.flops = flops_of(work.problem(), pass);
    result.bytes = traffic_bytes(pass, work.inputs(), work.outputs());
    result.plan_seconds = contenders[i].plan_seconds;
    result.workspace_bytes = report.workspace_bytes;
    result.details = report.details;
    result.isa = ceilings_.isa_of(report.backend, work.problem().dtype);
    ceilings_.measure(result.isa);
    if (i > 0) {
      result.against = results.front().backend;
      result.ratio = result.timing.median() / results.front().timing.median();
    }
    results.push_back(std::move(result));
  }
  return results;
}

std::vector<Result> Bench::run_problem(const Problem& problem, const std::string& place) {
  const Workload work(problem, asked_.seed);
  const PlacedCall call(place_, work.inputs(), work.outputs(), work.allocations());
  call.upload();
  if (problem.backward()) {  // which reads out and lse
    const Contender forward = make_contender(Direction::kForward, work.problem(), "");
    call.execute(forward.plan, forward.workspace);
    place_.synchronize();
  }
  std::vector<Result> results;
  for (const Direction pass : {Direction::kForward, Direction::kBackward}) {
    if (!(pass == Direction::kForward ? problem.forward() : problem.backward())) continue;
    const std::string label = place + (pass == Direction::kForward ? " forward" : " backward");
    bar_.show(0.0, label);
    for (Result& result : run_pass(pass, work, call, [&](double share) { bar_.show(share, label); })) {
      result.problem = to_string(problem);
      results.push_back(std::move(result));
    }
  }
  for (Result& result : results) result.ceiling = ceilings_.rate(result.isa);
  return results;
}

void Bench::print_problem(const Terminal& terminal, const std::vector<Result>& results) const {
  const bool compared = std::ranges::any_of(results, [](const Result& r) { return r.ratio > 0; });
  std::vector<Table::Column> columns{
      {"pass", false, 8},      {"backend", false, 12}, {"median", true, 8},
      {"p10 … p90", true, 19}, {"fastest", true, 8},   {"runs", true, 5},
      {"GFLOP/s", true, 7},    {"GB/s", true, 6},      {place_.on_gpu() ? "of copy" : "of FMA", true, 6},
      {"workspace", true, 9},  {"planned", true, 8}};
  if (compared) columns.push_back({"time ratio", true});
  Table table(columns);
  for (const Result& r : results) {
    std::vector<Table::Cell> cells{
        {r.pass},
        {r.backend, r.ratio > 0 ? Ink::kPlain : Ink::kAccent},
        {seconds_text(r.timing.median()), Ink::kStrong},
        {fmt::format("{} … {}", seconds_text(r.timing.quantile(0.1)), seconds_text(r.timing.quantile(0.9))), Ink::kDim},
        {seconds_text(r.timing.quantile(0)), Ink::kDim},
        {std::to_string(r.timing.seconds.size()), Ink::kDim},
        {number_text(r.gflops()), Ink::kStrong},
        {number_text(r.gbytes())},
        {fmt::format("{:.0f}%", r.percent()), Ink::kStrong},
        {bytes_text(static_cast<double>(r.workspace_bytes))},
        {seconds_text(r.plan_seconds), Ink::kDim}};
    if (compared) cells.push_back({r.ratio > 0 ? number_text(r.ratio) + "×" : "1×"});
    table.add(std::move(cells));
  }
  terminal.line("\n  " + terminal.paint(Ink::kStrong, results.front().problem));
  terminal.write(table.text(terminal));
  const auto note = [&](const std::string& text) { terminal.line("  " + terminal.paint(Ink::kDim, text)); };
  std::map<std::string, double> ceilings;
  for (const Result& r : results) {
    ceilings[r.isa] = r.ceiling;
    if (!place_.on_gpu()) continue;
    std::string how;
    for (const auto& [key, value] : r.details) how += fmt::format("{}{} {}", how.empty() ? "" : ", ", key, value);
    note(fmt::format("{} {}: {}", r.pass, r.backend, how));
  }
  for (const auto& [isa, rate] : ceilings) {
    note(isa.empty() ? fmt::format("copies measured in this run: {} GB/s read and written", number_text(rate / 1e9))
                     : fmt::format("FMA rate measured in this run: {} GFLOP/s, {}, {} thread{}",
                                   number_text(rate / 1e9), isa, threads_, threads_ == 1 ? "" : "s"));
  }
}

ordered_json json_of(const Result& r) {
  ordered_json json{{"problem", r.problem},
                    {"pass", r.pass},
                    {"backend", r.backend},
                    {"median_seconds", r.timing.median()},
                    {"min_seconds", r.timing.quantile(0)},
                    {"p10_seconds", r.timing.quantile(0.1)},
                    {"p90_seconds", r.timing.quantile(0.9)},
                    {"runs", r.timing.seconds.size()},
                    {"gflops", r.gflops()},
                    {"gbytes_per_second", r.gbytes()},
                    {"plan_seconds", r.plan_seconds},
                    {"workspace_bytes", r.workspace_bytes}};
  for (const auto& [key, value] : r.details) json["details"][key] = value;
  if (r.isa.empty()) {
    json["copy_gbytes_per_second"] = r.ceiling / 1e9;
    json["percent_of_copy"] = r.percent();
  } else {
    json["fma_isa"] = r.isa;
    json["fma_gflops"] = r.ceiling / 1e9;
    json["percent_of_fma"] = r.percent();
  }
  if (r.ratio > 0) {
    json["against"] = r.against;
    json["time_ratio"] = r.ratio;
  }
  return json;
}

BenchRow row_of(const Result& r) {
  return {.problem = r.problem,
          .pass = r.pass,
          .backend = r.backend,
          .seconds = r.timing.median(),
          .seconds_low = r.timing.quantile(0.25),
          .seconds_high = r.timing.quantile(0.75),
          .repeats = static_cast<int>(r.timing.seconds.size()),
          .gflops = r.gflops(),
          .gbytes = r.gbytes(),
          .ceiling_gflops = r.isa.empty() ? 0.0 : r.ceiling / 1e9,
          .workspace_bytes = r.workspace_bytes};
}

/// What ran, for those who read the numbers elsewhere.
std::vector<std::pair<std::string, std::string>> Bench::facts() const {
  if (!place_.on_gpu()) return {{"processor", processor().model}};
  const int driver = cuda::driver_version();
  return {{"processor", processor().model},
          {"gpu", cuda::gpu(place_.device().index).name},
          {"driver", fmt::format("CUDA {}.{}", driver / 1000, driver % 1000 / 10)}};
}

void Bench::write_files(const std::vector<Result>& results) const {
  const std::string date = fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
  if (!asked_.json.empty()) {
    ordered_json page{{"version", FOVEA_VERSION}, {"date", date}, {"device", name(place_.device())}};
    for (const auto& [key, value] : facts()) page[key] = value;
    page["threads"] = threads_;
    page["results"] = ordered_json::array();
    for (const Result& result : results) page["results"].push_back(json_of(result));
    if (asked_.json == kStandardOutput) {
      Terminal(stdout).line(json_text(page));
    } else {
      files::write_atomically(asked_.json, [&](std::ostream& stream) { stream << json_text(page) << '\n'; });
    }
  }
  if (!asked_.html.empty()) {
    std::vector<BenchRow> rows;
    rows.reserve(results.size());
    for (const Result& result : results) rows.push_back(row_of(result));
    std::vector<std::pair<std::string, std::string>> said = facts();
    said.emplace_back("threads", std::to_string(threads_));
    if (!place_.on_gpu()) said.emplace_back("instruction set", results.front().isa);
    said.emplace_back("version", FOVEA_VERSION);
    said.emplace_back("date", date);
    write_bench_page(asked_.html, rows, said);
  }
}

ExitCode Bench::run() {
  require_duration(asked_.effort);
  const bool table = asked_.json != kStandardOutput;
  if (table) require_output("--json", asked_.json, files_of(asked_.lines));
  require_output("--html", asked_.html, files_of(asked_.lines));
  if (table) files::require_apart("--json", asked_.json, "--html", asked_.html);
  const std::vector<Problem> problems = problems_of(asked_.lines);
  const Terminal terminal(stdout);
  std::vector<Result> results;
  for (std::size_t i = 0; i < problems.size(); ++i) {
    std::vector<Result> of_problem = run_problem(problems[i], fmt::format("{}/{}", i + 1, problems.size()));
    bar_.clear();
    if (table) print_problem(terminal, of_problem);
    std::ranges::move(of_problem, std::back_inserter(results));
  }
  write_files(results);
  if (!table) return kDone;
  terminal.line();
  if (!asked_.json.empty()) terminal.write(labelled(terminal, "numbers", printable(asked_.json)));
  if (!asked_.html.empty()) terminal.write(labelled(terminal, "picture", printable(asked_.html)));
  return kDone;
}

}  // namespace

ExitCode command_bench(const BenchArguments& arguments) { return Bench(arguments).run(); }

}  // namespace fovea::tools
