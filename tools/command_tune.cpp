#include <fmt/format.h>
#include <fovea/error.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "command.h"
#include "cpu/threads.h"
#include "cuda/jit/cache.h"
#include "cuda/planned_call.h"
#include "cuda/requests.h"
#include "device_call.h"
#include "files/tensor_data.h"
#include "problem/refuse.h"
#include "terminal.h"
#include "timing.h"
#include "workload.h"

namespace fovea::tools {
namespace {

using cuda::kMeasured;
using cuda::jit::Binary;

constexpr int kFirstRuns = 3;
constexpr double kStillOpen = 1.2;      // slower tiles than so many times the fastest of the first runs are out
constexpr double kWorthwhile = 0.99;    // of the table's time, below which a tile is a gain
constexpr std::int64_t kChecked = 300;  // rows and keys of a problem that is checked against the oracle
constexpr int kCheckedSeeds = 3;

/// A tile in the race.
struct Contender {
  std::string name;
  std::vector<std::shared_ptr<const Binary>> binaries;  // the main kernel's first
  std::optional<Plan> plan;
  double seconds = 0;    // median
  bool finalist = true;  // it was measured to the end
};

std::string word_of(Direction pass) { return pass == Direction::kForward ? "forward" : "backward"; }

std::string tile_of(const Report& report) {
  for (const auto& [key, value] : report.details) {
    if (key == "tile") return value;
  }
  return {};
}

class Tune {
 public:
  explicit Tune(const TuneArguments& asked)
      : asked_(asked),
        place_(gpu_of(asked)),
        choices_(cuda::jit::Cache::shared().tiles(cuda::gpu(place_.device().index).name)) {}
  ExitCode run();

 private:
  static Device gpu_of(const TuneArguments& asked) {
    const Device device = asked.runner.parsed_device(false);
    if (device.kind == DeviceKind::kCuda) return device;
    refuse("--device cpu has no tiles to choose; name a GPU, as in cuda:0");
  }
  void require_kept() const;
  void tell() const;
  ExitCode forget();
  void tune(const Problem& problem);
  void tune_pass(Direction pass, const Workload& work, const PlacedCall& call);
  [[nodiscard]] Plan plan(const Problem& problem, const std::string& backend) const;
  [[nodiscard]] std::vector<Contender> compiled(const Problem& problem, const std::string& backend);
  void measure_all(std::vector<Contender>& contenders, const std::string& table, const PlacedCall& call);
  [[nodiscard]] std::string fault_of(Problem problem, const std::string& backend, const std::string& tile);
  void print(const std::vector<Contender>& contenders, const std::string& table) const;

  const TuneArguments& asked_;
  Place place_;
  cuda::TileChoices& choices_;
  Terminal terminal_{stdout};
  ProgressBar bar_;
};

/// Refuses before anything is measured that could not be kept.
void Tune::require_kept() const {
  const cuda::jit::Disk& disk = cuda::jit::Cache::shared().disk();
  if (!choices_.file().empty() && disk.usage().writable) return;
  refuse(choices_.file().empty()
             ? "there is no folder to keep tiles in; set FOVEA_CACHE_DIR to one, and FOVEA_JIT to on"
             : fmt::format("{} cannot be written; set FOVEA_CACHE_DIR to a folder that can", disk.folder().string()));
}

void Tune::tell() const {
  const auto all = choices_.all();
  for (const auto& [kind, tile] : all)
    terminal_.line(fmt::format("  {}: {}", kind, terminal_.paint(Ink::kStrong, tile)));
  terminal_.line(fmt::format("{} of their own on {}",
                             count_text(all.size(), "kind of problems has a tile", "kinds of problems have a tile"),
                             cuda::gpu(place_.device().index).name));
  if (!all.empty()) terminal_.write(labelled(terminal_, "kept in", printable(choices_.file().string())));
}

ExitCode Tune::forget() {
  for (const auto& [kind, tile] : choices_.all()) choices_.set(kind, "");
  if (!choices_.save()) refuse(fmt::format("{} cannot be written", choices_.file().string()));
  tell();
  return kDone;
}

Plan Tune::plan(const Problem& problem, const std::string& backend) const {
  PlanOptions options = asked_.runner.options;
  options.backend = backend;
  return plan_pass(problem, problem.direction, place_.device(), options);
}

/// Every tile that the backend could use, with its kernels, which are compiled in parallel.
std::vector<Contender> Tune::compiled(const Problem& problem, const std::string& backend) {
  struct Task {
    const cuda::jit::KernelRequest* kernel;
    std::shared_ptr<const Binary>* result;
  };
  struct Work {
    std::vector<Task> tasks;
    ProgressBar& bar;
    std::size_t done = 0;
    std::mutex mutex{};  // of the bar
  } work{{}, bar_};
  const auto offered = cuda::tiles_on_offer(problem, backend, cuda::model_of_device(place_.device()));
  std::vector<Contender> contenders(offered.size());
  for (std::size_t i = 0; i < offered.size(); ++i) {
    contenders[i].name = offered[i].name;
    contenders[i].binaries.resize(offered[i].kernels.size());
    for (std::size_t k = 0; k < offered[i].kernels.size(); ++k)
      work.tasks.push_back({&offered[i].kernels[k], &contenders[i].binaries[k]});
  }
  cpu::run_tasks(
      std::ssize(work.tasks), cpu::worker_count(asked_.jobs),
      [](void* self, std::int64_t index, int) {
        auto& w = *static_cast<Work*>(self);
        const Task& task = w.tasks[static_cast<std::size_t>(index)];
        try {
          *task.result = cuda::jit::Cache::shared().binary(*task.kernel);
        } catch (const Error& error) {
          if (error.code() != ErrorCode::kInternal) throw;  // what does not compile is no tile
        }
        const std::lock_guard lock(w.mutex);
        w.bar.show(static_cast<double>(++w.done) / static_cast<double>(w.tasks.size()), task.kernel->name);
      },
      &work);
  bar_.clear();
  std::erase_if(contenders,
                [](const Contender& contender) { return std::ranges::count(contender.binaries, nullptr) > 0; });
  return contenders;
}

/// Drops tiles that are slow in the first runs, and measures the others, and the table's tile, in turns.
void Tune::measure_all(std::vector<Contender>& contenders, const std::string& table, const PlacedCall& call) {
  std::size_t bytes = 0;
  for (const Contender& contender : contenders) bytes = std::max(bytes, contender.plan->workspace_bytes());
  const Workspace workspace(place_, bytes);
  const auto round = [&](const Effort& effort, const std::string& label) {
    std::vector<Contender*> running;
    std::vector<std::function<double()>> executions;
    for (Contender& contender : contenders) {
      if (!contender.finalist) continue;
      running.push_back(&contender);
      executions.emplace_back([&] { return place_.seconds_of([&] { call.execute(*contender.plan, workspace); }); });
    }
    const auto timings = measure(executions, effort, [&](double share) { bar_.show(share, label); });
    for (std::size_t i = 0; i < running.size(); ++i) running[i]->seconds = timings[i].median();
    bar_.clear();
  };
  round({.repeats = kFirstRuns}, "first runs");
  const double fastest = std::ranges::min_element(contenders, {}, &Contender::seconds)->seconds;
  for (Contender& contender : contenders)
    contender.finalist = contender.name == table || contender.seconds <= kStillOpen * fastest;
  round(asked_.effort, "in turns");
}

/// What is wrong with a tile's results by the double reference; empty: nothing.
std::string Tune::fault_of(Problem problem, const std::string& backend, const std::string& tile) {
  problem = shortened(std::move(problem), kChecked);
  const std::string kind = cuda::kind_of(backend, problem), before = choices_.find(kind);
  choices_.set(kind, tile);
  std::string fault;
  if (!tile_of(plan(problem, backend).report()).ends_with(kMeasured))
    fault = "it does not take a problem that is short enough for the reference";
  for (int seed = 1; seed <= kCheckedSeeds && fault.empty(); ++seed) {
    const CheckResult result = check_problem(problem, static_cast<std::uint64_t>(seed),
                                             {.device = place_.device(), .place = &place_, .backend = backend});
    if (!result.ok()) fault = result.failures.front();
  }
  choices_.set(kind, before);
  return fault;
}

/// The time of the table's own tile.
double standard_of(const std::vector<Contender>& contenders, const std::string& table) {
  return std::ranges::find(contenders, table, &Contender::name)->seconds;
}

void Tune::print(const std::vector<Contender>& contenders, const std::string& table) const {
  Table rows({{"tile"}, {"median", true, 8}, {"of the table's", true}, {"registers", true}, {"local", true}});
  const double standard = standard_of(contenders, table);
  for (const Contender& c : contenders) {
    rows.add({{c.name, c.name == table ? Ink::kAccent : Ink::kPlain},
              {seconds_text(c.seconds), c.finalist ? Ink::kStrong : Ink::kDim},
              {number_text(c.seconds / standard) + "×", c.finalist ? Ink::kPlain : Ink::kDim},
              {std::to_string(c.binaries.front()->registers), Ink::kDim},
              {bytes_text(c.binaries.front()->local_bytes), Ink::kDim}});
  }
  terminal_.write(rows.text(terminal_));
}

void Tune::tune_pass(Direction pass, const Workload& work, const PlacedCall& call) {
  Problem problem = work.problem();
  problem.direction = pass;
  const std::string backend = plan(problem, asked_.runner.options.backend).report().backend;
  const std::string kind = cuda::kind_of(backend, problem), before = choices_.find(kind);
  choices_.set(kind, "");
  const std::string table = tile_of(plan(problem, backend).report());
  std::vector<Contender> contenders = compiled(problem, backend);
  if (std::ranges::find(contenders, table, &Contender::name) == contenders.end())
    throw Error(ErrorCode::kInternal, fmt::format("the table's tile ({}) is none of those on offer", table));
  for (Contender& contender : contenders) {
    choices_.set(kind, contender.name);
    contender.plan = plan(problem, backend);
  }
  choices_.set(kind, before);  // should something fail
  measure_all(contenders, table, call);
  std::ranges::stable_sort(contenders, {}, &Contender::seconds);

  terminal_.line(fmt::format("\n  {}\n  {} by {}", terminal_.paint(Ink::kStrong, to_string(work.problem())),
                             word_of(pass), backend));
  print(contenders, table);
  const double standard = standard_of(contenders, table);
  std::string chosen;
  for (const Contender& contender : contenders) {
    if (!contender.finalist || contender.seconds > kWorthwhile * standard) continue;
    const std::string fault = fault_of(problem, backend, contender.name);
    if (fault.empty()) {
      chosen = contender.name;
      break;
    }
    terminal_.line(terminal_.paint(Ink::kBad, fmt::format("  {} is not taken: {}", contender.name, fault)));
  }
  choices_.set(kind, chosen);
  terminal_.line(chosen.empty() ? "  the table's tile stays" : fmt::format("  taken from now on: {}", chosen));
}

void Tune::tune(const Problem& problem) {
  const Workload work(problem, 0);
  const PlacedCall call(place_, work.inputs(), work.outputs(), work.allocations());
  call.upload();
  if (problem.backward()) {  // which reads out and lse
    Problem forward = work.problem();
    forward.direction = Direction::kForward;
    const Plan before = plan(forward, "");
    call.execute(before, Workspace(place_, before.workspace_bytes()));
    place_.synchronize();
  }
  for (const Direction pass : {Direction::kForward, Direction::kBackward}) {
    if (pass == Direction::kForward ? problem.forward() : problem.backward()) tune_pass(pass, work, call);
  }
}

ExitCode Tune::run() {
  if (asked_.lines.empty() && !asked_.forget) {
    tell();
    return kDone;
  }
  require_kept();
  if (asked_.forget) return forget();
  for (const Problem& problem : problems_of(asked_.lines)) {
    tune(problem);
    if (!choices_.save())
      throw Error(ErrorCode::kDevice, fmt::format("{} cannot be written", choices_.file().string()));
  }
  terminal_.write("\n" + labelled(terminal_, "kept in", printable(choices_.file().string())));
  return kDone;
}

}  // namespace

ExitCode command_tune(const TuneArguments& arguments) {
  require_duration(arguments.effort);
  if (arguments.forget && !arguments.lines.empty()) {
    refuse(fmt::format("--forget drops the tiles of all problems, not those of {} alone; leave the line out",
                       files::in_quotes(arguments.lines.front())));
  }
  return Tune(arguments).run();
}

}  // namespace fovea::tools
