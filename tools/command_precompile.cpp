#include <fmt/format.h>
#include <fovea/error.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <utility>

#include "command.h"
#include "cpu/threads.h"
#include "cuda/jit/cache.h"
#include "cuda/requests.h"
#include "examples/ladder/ladder.h"
#include "files/tensor_data.h"
#include "problem/refuse.h"
#include "terminal.h"

namespace fovea::tools {
namespace {

using cuda::jit::Binary;
using cuda::jit::KernelRequest;

/// 80 for "sm_80", where kernels are made for it.
int parsed_arch(const std::string& text) {
  const int arch = parsed_architecture(text).value_or(0);
  if (arch == 0 || cuda::jit::arch_of(arch) != arch) {
    refuse(fmt::format("--arch {} is no architecture that kernels are made for; use one of sm_{}",
                       files::in_quotes(text), fmt::join(cuda::jit::kArchs, ", sm_")));
  }
  return arch;
}

/// A kernel of nobody's: what the limits in seconds are meant for is a machine that compiles it in kYardstickSeconds.
constexpr double kYardstickSeconds = 0.33;
constexpr const char* kYardstick = R"(
extern "C" __global__ void fovea_kernel(const float* a, const float* b, float* c, int n) {
  float sums[8][8] = {};
  for (int step = 0; step < n; step += 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float row[8], column[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        row[i] = a[(step + k) * 256 + threadIdx.x + 32 * i];
        column[i] = __shfl_xor_sync(~0u, b[(step + k) * 256 + threadIdx.x % 32 * 8 + i], k);
      }
#pragma unroll
      for (int x = 0; x < 64; ++x) {
        const float y = row[x / 8] * column[x % 8];
        sums[x / 8][x % 8] += y > 0.0f ? y : exp2f(y);
      }
    }
  }
#pragma unroll
  for (int x = 0; x < 64; ++x) c[x * 256 + threadIdx.x] = sums[x / 8][x % 8];
}
)";

/// How many times as long compiling takes here and now; at least 1, so that no machine is held to less than it is told.
double slowness() {
  KernelRequest yardstick;
  yardstick.name = "yardstick", yardstick.unit = kYardstick, yardstick.arch = 80;
  return std::max(1.0, cuda::jit::nvrtc().compile(yardstick).seconds / kYardstickSeconds);
}

/// Behind a limit that was stretched.
std::string here(double slowness) {
  return slowness > 1 ? fmt::format(" times {:.2f}, as all compiling takes longer here", slowness) : "";
}

/// What came of one request.
struct Outcome {
  std::shared_ptr<const Binary> binary;
  double slowness = 1;  // of the machine, as it was compiled; 1 too where that was in time
  std::string fault;    // of compiling, or against --check
};

/// Bytes by "kernel sm_NN", of a file in which '#' begins a comment.
std::map<std::string, int> known_spills(const std::string& file) {
  std::map<std::string, int> bytes;
  if (file.empty()) return bytes;
  files::InputFile known = files::in_context("--known-spills", [&] { return files::InputFile(file); });
  for (std::string line; std::getline(known.stream, line);) {
    std::istringstream words(line.substr(0, line.find('#')));
    std::string kernel, arch;
    int spilt = 0;
    if (!(words >> kernel)) continue;
    const std::optional<int> number = words >> arch >> spilt ? parsed_architecture(arch) : std::nullopt;
    if (!number || spilt <= 0) {
      refuse(fmt::format("{} has a line {}; write KERNEL sm_NN BYTES", file, files::in_quotes(line)));
    }
    bytes[fmt::format("{} sm_{}", kernel, *number)] = spilt;
  }
  return bytes;
}

class Precompile {
 public:
  explicit Precompile(const PrecompileArguments& asked) : asked_(asked), known_spills_(known_spills(asked.known)) {
    collect();
  }

  void compile() {
    outcomes_.resize(requests_.size());
    cpu::run_tasks(
        static_cast<std::int64_t>(requests_.size()), cpu::worker_count(asked_.jobs),
        [](void* self, std::int64_t index, int) {
          static_cast<Precompile*>(self)->compile_one(static_cast<std::size_t>(index));
        },
        this);
    bar_.clear();
  }

  ExitCode tell() const;
  void write_pack() const;

 private:
  void collect();
  void compile_one(std::size_t index);
  [[nodiscard]] bool is_slow(const Outcome& outcome) const {
    return asked_.most_seconds > 0 && outcome.binary->seconds > asked_.most_seconds * outcome.slowness;
  }
  void compile_again(const KernelRequest& request, Outcome& outcome) const;
  [[nodiscard]] std::string fault_of(const Outcome& outcome) const;
  [[nodiscard]] double median_seconds() const;
  [[nodiscard]] std::string table() const;

  const PrecompileArguments& asked_;
  std::map<std::string, int> known_spills_;
  std::vector<KernelRequest> requests_;
  std::vector<Outcome> outcomes_;
  std::size_t wanted_ = 0;  // before --most
  std::atomic<std::size_t> done_ = 0;
  std::mutex mutex_;  // of the bar
  ProgressBar bar_;
};

void Precompile::collect() {
  std::map<std::string, KernelRequest> unique;
  std::vector<int> archs;
  archs.reserve(asked_.archs.size());
  for (const std::string& text : asked_.archs) archs.push_back(parsed_arch(text));
  const auto add = [&](std::vector<KernelRequest> requests) {
    for (KernelRequest& request : requests) {
      std::string name = fmt::format("{} {} {}", request.name, request.arch, cuda::jit::content_key(request));
      unique.try_emplace(std::move(name), std::move(request));
    }
  };
  if (asked_.ladder) std::ranges::for_each(archs, [&](int arch) { add(ladder::requests(arch)); });
  const bool no_lines = asked_.ladder && asked_.lines.empty();
  for (const Problem& problem : no_lines ? std::vector<Problem>{} : problems_of(asked_.lines)) {
    for (const Direction pass : {Direction::kForward, Direction::kBackward}) {
      if (!(pass == Direction::kForward ? problem.forward() : problem.backward())) continue;
      for (const int arch : archs) add(cuda::requests(problem, pass, arch));
    }
  }
  wanted_ = unique.size();
  if (wanted_ == 0) {
    throw Error(ErrorCode::kUnsupported,
                fmt::format("no GPU kernel runs any of these problems on {}; `fovea explain` says why",
                            fmt::join(asked_.archs, ", ")));
  }
  // Evenly spread over the names, so that a short run sees some of every kind.
  const std::size_t most = asked_.most > 0 ? std::min<std::size_t>(asked_.most, wanted_) : wanted_;
  std::size_t i = 0;
  for (auto& [name, request] : unique) {
    if (i * most / wanted_ != (i + 1) * most / wanted_) requests_.push_back(std::move(request));
    ++i;
  }
}

void Precompile::compile_one(std::size_t index) {
  Outcome& outcome = outcomes_[index];
  try {
    outcome.binary = cuda::jit::Cache::shared().binary(requests_[index]);
    if (asked_.check && is_slow(outcome)) compile_again(requests_[index], outcome);
    if (asked_.check) outcome.fault = fault_of(outcome);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kInternal) throw;  // no kernel's fault
    outcome.fault = error.what();
  }
  const std::size_t done = ++done_;
  const std::lock_guard lock(mutex_);
  bar_.show(static_cast<double>(done) / static_cast<double>(requests_.size()), requests_[index].name);
}

/// Where a kernel took too long, perhaps beside other work and perhaps long ago: once more, between two yardsticks.
void Precompile::compile_again(const KernelRequest& request, Outcome& outcome) const {
  const double before = slowness();
  outcome.binary = std::make_shared<const Binary>(cuda::jit::nvrtc().compile(request));
  outcome.slowness = (before + slowness()) / 2;
}

std::string Precompile::fault_of(const Outcome& outcome) const {
  const Binary& binary = *outcome.binary;
  std::string faults;
  const auto add = [&](const std::string& fault) { faults += (faults.empty() ? "" : ", ") + fault; };
  const auto known = known_spills_.find(fmt::format("{} sm_{}", binary.name, binary.arch));
  const int most = known == known_spills_.end() ? 0 : known->second;
  const std::string more = most > 0 ? fmt::format(", more than the {} known", most) : "";
  if (binary.spill_bytes > most) add(fmt::format("spills {} bytes{}", binary.spill_bytes, more));
  if (binary.local_bytes > most) add(fmt::format("keeps {} bytes in local memory{}", binary.local_bytes, more));
  if (most > 0 && binary.spill_bytes == 0 && binary.local_bytes == 0) {
    add(fmt::format("spills nothing any more; take its line out of {}", asked_.known));
  }
  if (is_slow(outcome)) {
    add(fmt::format("took {} to compile, more than {} s{}", seconds_text(binary.seconds), asked_.most_seconds,
                    here(outcome.slowness)));
  }
  if (!binary.warnings.empty()) add(binary.warnings);
  return faults.empty() ? "" : fmt::format("kernel {} for sm_{} {}", binary.name, binary.arch, faults);
}

double Precompile::median_seconds() const {
  std::vector<double> seconds;
  for (const Outcome& outcome : outcomes_) {
    if (outcome.binary) seconds.push_back(outcome.binary->seconds);
  }
  if (seconds.empty()) return 0;
  std::ranges::nth_element(seconds, seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2));
  return seconds[seconds.size() / 2];
}

std::string Precompile::table() const {
  constexpr const char* kRow = "{:<64} {:>6} {:>7} {:>9} {:>6} {:>6} {:>7} {:>7}  {}\n";
  std::string text =
      fmt::format(kRow, "kernel", "arch", "threads", "registers", "spilt", "local", "shared", "seconds", "from");
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    const KernelRequest& request = requests_[i];
    const std::string arch = fmt::format("sm_{}", request.arch);
    const Binary* binary = outcomes_[i].binary.get();
    text += binary == nullptr
                ? fmt::format(kRow, request.name, arch, request.threads, "", "", "", "", "", "failed")
                : fmt::format(kRow, request.name, arch, request.threads, binary->registers, binary->spill_bytes,
                              binary->local_bytes, binary->shared_bytes + request.shared_bytes,
                              fmt::format("{:.2f}", binary->seconds), name(binary->source));
  }
  return text;
}

ExitCode Precompile::tell() const {
  const Terminal terminal(stdout);
  if (!asked_.table.empty()) files::write_atomically(asked_.table, [&](std::ostream& stream) { stream << table(); });
  std::size_t faults = 0;
  double seconds = 0, slowest = 0;
  for (const Outcome& outcome : outcomes_) {
    if (outcome.binary) seconds += outcome.binary->seconds, slowest = std::max(slowest, outcome.binary->seconds);
    if (outcome.fault.empty()) continue;
    ++faults;
    terminal.line(terminal.paint(Ink::kBad, outcome.fault));
  }
  const double median = median_seconds();
  double allowed = asked_.check ? asked_.median_seconds : 0, stretch = 1;
  if (allowed > 0 && median > allowed) allowed *= stretch = slowness();
  const bool slow = allowed > 0 && median > allowed;
  const std::string some = requests_.size() == wanted_ ? "" : fmt::format("{} of ", requests_.size());
  const std::string judged = asked_.check || faults > 0 ? fmt::format("{} at fault; ", faults) : "";
  terminal.line(fmt::format("{}{} for {}: {}compiling took {} in all, {} in the median, {} at most", some,
                            count_text(wanted_, "kernel", "kernels"), fmt::join(asked_.archs, ", "), judged,
                            seconds_text(seconds), seconds_text(median), seconds_text(slowest)));
  if (slow) {
    terminal.line(
        terminal.paint(Ink::kBad, fmt::format("the median is more than {} s{}", asked_.median_seconds, here(stretch))));
  }
  if (!asked_.check) return faults > 0 ? kFailed : kDone;
  return faults > 0 || slow ? kCheckFailed : kDone;
}

void Precompile::write_pack() const {
  std::vector<Binary> binaries;
  for (const Outcome& outcome : outcomes_) {
    if (outcome.binary) binaries.push_back(*outcome.binary);
  }
  cuda::jit::Pack::write(asked_.out, binaries);
}

}  // namespace

ExitCode command_precompile(const PrecompileArguments& arguments) {
  if (arguments.out.empty() && !arguments.check) {
    refuse("there is nothing to do: name a pack with --out, or ask for --check");
  }
  for (const auto& [option, seconds] :
       {std::pair("--median-seconds", arguments.median_seconds), std::pair("--most-seconds", arguments.most_seconds)}) {
    if (!(seconds >= 0)) refuse(fmt::format("{} ({}) must be at least 0 (0: any)", option, seconds));
  }
  std::vector<std::string> inputs = files_of(arguments.lines);
  inputs.push_back(arguments.known);
  require_output("--out", arguments.out, inputs);
  require_output("--table", arguments.table, inputs);
  files::require_apart("--out", arguments.out, "--table", arguments.table);
  Precompile work(arguments);
  work.compile();
  const ExitCode code = work.tell();
  if (code == kDone && !arguments.out.empty()) work.write_pack();
  return code;
}

}  // namespace fovea::tools
