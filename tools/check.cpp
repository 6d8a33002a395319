#include "check.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>

#include "cpu/elements.h"
#include "cpu/threads.h"
#include "cuda/jit/cache.h"
#include "dispatch/backend.h"
#include "problem/refuse.h"
#include "random.h"
#include "random_problem.h"
#include "terminal.h"
#include "workload.h"

namespace fovea::tools {
namespace {

/// The bits of a tensor, gaps left out.
std::vector<std::byte> bits_of(const Tensor& t) {
  const std::int64_t size = size_bytes(t.dtype);
  std::vector<std::byte> bits(static_cast<std::size_t>(cpu::element_count(t) * size));
  cpu::for_each_element(t, [&](std::int64_t index, std::int64_t offset) {
    std::memcpy(&bits[index * size], static_cast<const std::byte*>(t.data) + offset * size,
                static_cast<std::size_t>(size));
  });
  return bits;
}

class Check {
 public:
  Check(const Problem& problem, std::uint64_t seed, const CheckOptions& options)
      : problem_(problem),
        options_(options),
        own_place_(options.place == nullptr ? std::make_unique<Place>(options.device) : nullptr),
        place_(options.place == nullptr ? *own_place_ : *options.place),
        work_(problem, seed, Data::kHostile),
        peers_(work_.operands(), work_.exact()) {
    if (options_.num_threads == 0) options_.num_threads = static_cast<int>(Draw(seed, kThreads).between(1, 3));
  }

  CheckResult run() {
    if (problem_.forward()) run_pass(true);
    if (problem_.backward()) run_pass(false);
    return std::move(result_);
  }

 private:
  static constexpr std::uint64_t kThreads = 1000;  // a stream of random numbers that no workload uses

  struct Prepared {
    Plan plan;
    PlacedCall call;
    Workspace workspace;
  };
  [[nodiscard]] Prepared prepare(bool forward) const {
    Plan plan = plan_of(forward ? Direction::kForward : Direction::kBackward);
    Workspace workspace(place_, plan.workspace_bytes());
    return {std::move(plan), PlacedCall(place_, work_.inputs(), work_.outputs(), work_.allocations()),
            std::move(workspace)};
  }

  void run_pass(bool forward) {
    const Prepared prepared = place_.prepare([&] { return prepare(forward); });
    result_.backends.push_back(prepared.plan.report().backend);

    const std::string damage = execute(prepared, 0xff);
    if (!damage.empty()) fail(forward, "has written " + damage);
    std::vector<std::vector<std::byte>> first;
    for (const ResultKind& kind : result_kinds()) {
      const Tensor& tensor = work_.outputs().*kind.tensor;
      if (kind.forward != forward || !tensor.defined()) continue;
      result_.figures.push_back(judge(kind, peers_, tensor));
      if (!result_.figures.back().failure.empty()) result_.failures.push_back(result_.figures.back().failure);
      first.push_back(bits_of(tensor));
    }

    if (!forward && !problem_.deterministic) return;
    (void)execute(prepared, 0);
    auto bits = first.begin();
    for (const ResultKind& kind : result_kinds()) {
      const Tensor& tensor = work_.outputs().*kind.tensor;
      if (kind.forward != forward || !tensor.defined()) continue;
      if (bits_of(tensor) != *bits++) fail(forward, fmt::format("gives other bits of {} on a second run", kind.name));
    }
  }

  /// Once, on poisoned outputs and a workspace full of bytes that nobody may care about.  What was written that should
  /// not have been; empty if nothing.
  std::string execute(const Prepared& prepared, int workspace_byte) {
    work_.poison_outputs();
    bool beside_output = false, past_workspace = false;
    place_.take_turn([&] {
      prepared.call.upload();
      prepared.workspace.fill(workspace_byte);
      prepared.call.execute(prepared.plan, prepared.workspace);
      prepared.call.download();
      beside_output = prepared.call.overrun();
      past_workspace = prepared.workspace.overrun();
    });
    if (beside_output) return "memory beside an output";
    return past_workspace ? "memory past its workspace" : work_.damage();
  }

  [[nodiscard]] Plan plan_of(Direction pass) const {
    if (options_.plan) return options_.plan(problem_, pass);
    return plan_pass(problem_, pass, options_.device,
                     {.backend = options_.backend, .num_threads = options_.num_threads});
  }

  void fail(bool forward, const std::string& what) {
    result_.failures.push_back(fmt::format("the {} pass {}", forward ? "forward" : "backward", what));
  }

  Problem problem_;
  CheckOptions options_;
  std::unique_ptr<Place> own_place_;
  Place& place_;
  Workload work_;
  Peers peers_;
  CheckResult result_;
};

/// A problem to check, and the seed of its data.
struct Case {
  Problem problem;
  std::uint64_t seed;
};

std::vector<Case> cases_of(const CheckRun& run) {
  std::vector<Case> cases;
  cases.reserve(run.problems.size());
  for (const Problem& problem : run.problems) cases.push_back({problem, run.seed});
  const Random seeds(run.seed);
  for (std::int64_t i = 0; i < run.random; ++i) {
    const std::uint64_t seed = seeds.bits(static_cast<std::uint64_t>(i));
    const std::uint64_t kind = seeds.bits(static_cast<std::uint64_t>(run.kinds > 0 ? i % run.kinds : i));
    cases.push_back({random_problem(seed, kind), seed});
  }
  return cases;
}

/// Prints results in the order of their cases, whatever order they come in.
class Printer {
 public:
  Printer(const CheckRun& run, const std::vector<Case>& cases)
      : run_(run), cases_(cases), results_(cases.size()), out_(stdout), start_(std::chrono::steady_clock::now()) {}

  void done(std::size_t index, CheckResult result) {
    const std::lock_guard lock(mutex_);
    results_[index] = std::move(result);
    for (; next_ < results_.size() && results_[next_]; ++next_) {
      bar_.clear();
      print(cases_[next_], *results_[next_]);
      results_[next_]->figures.clear();
    }
    bar_.show(static_cast<double>(next_) / static_cast<double>(cases_.size()),
              fmt::format("{} of {}, {}", next_, count_text(cases_.size(), "problem", "problems"),
                          count_text(failed_, "violation", "violations")));
  }

  /// How many problems failed or were not run.
  std::size_t finish() {
    bar_.clear();
    std::string worst;
    for (const auto& [name, ratio] : worst_)
      worst += fmt::format("{}{} {:.2f}", worst.empty() ? "" : ", ", name, ratio);
    std::string backends;
    for (const auto& [name, passes] : passes_) {
      backends += fmt::format("{}{} ran {}", backends.empty() ? "" : ", ", name, count_text(passes, "pass", "passes"));
    }
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start_;
    out_.line(fmt::format("{}, {} in {}; {}", count_text(cases_.size(), "problem", "problems"),
                          count_text(failed_, "violation", "violations"), seconds_text(time.count()),
                          backends.empty() ? "nothing ran" : backends));
    if (not_run_ > 0) {
      out_.line(out_.paint(Ink::kBad, fmt::format("{} not run: {}",
                                                  count_text(not_run_, "problem was", "problems were"), why_not_run_)));
    }
    out_.line(fmt::format("largest errors over those of their peers (at most {}): {}", kMostRatio,
                          worst.empty() ? "none" : worst));
    return failed_ + not_run_;
  }

 private:
  void print(const Case& c, const CheckResult& result) {
    if (!result.run) {
      ++not_run_;
      why_not_run_ = result.failures.front();
      return;
    }
    std::string figures;
    for (const Figure& figure : result.figures) {
      figures += fmt::format(" {} {:.2f}", figure.name, figure.ratio);
      worst_[figure.name] = std::max(worst_[figure.name], figure.ratio);
    }
    for (const std::string& backend : result.backends) ++passes_[backend];
    const std::string line = to_string(c.problem);
    const std::string verdict = result.ok() ? out_.paint(Ink::kGood, "ok  ") : out_.paint(Ink::kBad, "FAIL");
    out_.line(fmt::format("{}{} | {}", verdict, figures, line));
    if (result.ok()) return;
    ++failed_;
    for (const std::string& failure : result.failures) out_.line("     " + failure);
    out_.line(fmt::format("     fovea check \"{}\" --seed {}{}", line, c.seed, flags()));
  }

  [[nodiscard]] std::string flags() const {
    const CheckOptions& o = run_.options;
    std::string text;
    if (o.device != Device{}) text += " --device " + name(o.device);
    if (!o.backend.empty()) text += " --backend " + o.backend;
    if (o.num_threads != 0) text += fmt::format(" --threads {}", o.num_threads);
    return text;
  }

  const CheckRun& run_;
  const std::vector<Case>& cases_;
  std::vector<std::optional<CheckResult>> results_;
  std::map<std::string, double> worst_;
  std::map<std::string, std::size_t> passes_;
  std::size_t next_ = 0, failed_ = 0, not_run_ = 0;
  std::string why_not_run_;
  Terminal out_;
  ProgressBar bar_;
  std::chrono::steady_clock::time_point start_;
  std::mutex mutex_;
};

/// Counts of problems that have both of two options, a row and a column each.
void print_pairs(const std::vector<Case>& cases) {
  const std::span<const Option> options = all_options();
  std::vector<std::vector<std::size_t>> counts(options.size(), std::vector<std::size_t>(options.size()));
  for (const Case& c : cases) {
    std::vector<std::size_t> held;
    for (std::size_t i = 0; i < options.size(); ++i) {
      if (options[i].holds(c.problem)) held.push_back(i);
    }
    for (const std::size_t i : held) {
      for (const std::size_t j : held) ++counts[i][j];
    }
  }

  const Terminal out(stdout);
  std::string heading = fmt::format("{:24}", "problems that have both");
  for (std::size_t j = 0; j < options.size(); ++j) heading += fmt::format("{:>7}", fmt::format("({})", j + 1));
  out.line(heading);
  std::size_t least = cases.size(), first = 0, second = 0;
  for (std::size_t i = 0; i < options.size(); ++i) {
    std::string row = fmt::format("{:24}", fmt::format("({}) {}", i + 1, options[i].name));
    for (std::size_t j = 0; j <= i; ++j) {
      const bool excluded = exclude_each_other(options[i], options[j]);
      row += excluded ? fmt::format("{:>7}", "-") : fmt::format("{:7}", counts[i][j]);
      if (!excluded && counts[i][j] < least) least = counts[i][j], first = i, second = j;
    }
    out.line(row);
  }
  const std::string what =
      first == second ? options[first].name : fmt::format("both {} and {}", options[first].name, options[second].name);
  out.line(fmt::format("least: {} with {}; - marks what the contract excludes",
                       count_text(least, "problem", "problems"), what));
}

}  // namespace

CheckResult check_problem(const Problem& problem, std::uint64_t seed, const CheckOptions& options) {
  try {
    return or_out_of_memory([&] { return Check(problem, seed, options).run(); });
  } catch (const GpuLost& lost) {
    return {{}, {}, {lost.what()}, false};
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kOutOfMemory) throw Error(error.code(), to_string(problem) + ": " + error.what());
    return {{}, {}, {error.what()}, true};
  } catch (const std::exception& error) {
    return {{}, {}, {error.what()}, true};
  }
}

int run_check(const CheckRun& run) {
  const std::vector<Case> cases = cases_of(run);
  if (run.list) {
    const Terminal out(stdout);
    for (const Case& c : cases) out.line(to_string(c.problem));
    return 0;
  }
  // A name that nobody knows, of a backend or in a variable, is refused before anything is checked.
  (void)dispatch::choose(cases.front().problem, run.options.device, {.backend = run.options.backend});
  if (run.options.device.kind == DeviceKind::kCuda) (void)cuda::jit::Cache::shared();
  Printer printer(run, cases);
  Place place(run.options.device);  // a GPU takes the problems in turns; data and oracle are made by all threads
  CheckOptions options = run.options;
  options.place = &place;
  std::atomic<std::size_t> next{0};
  std::exception_ptr ended;  // the check, before its end
  std::once_flag first;
  const auto work = [&] {
    try {
      for (std::size_t i = next++; i < cases.size(); i = next++) {
        printer.done(i, check_problem(cases[i].problem, cases[i].seed, options));
      }
    } catch (...) {
      next = cases.size();
      std::call_once(first, [&] { ended = std::current_exception(); });
    }
  };
  std::vector<std::jthread> helpers;
  try {
    for (int i = 1; i < cpu::worker_count(run.jobs); ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // the system gives no more threads: those that there are do it all
  }
  work();
  helpers.clear();
  if (ended) std::rethrow_exception(ended);
  const std::size_t failed = printer.finish();
  if (run.pairs) print_pairs(cases);
  return failed == 0 ? 0 : 1;
}

}  // namespace fovea::tools
