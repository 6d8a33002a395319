#pragma once

#include <fovea/plan.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attention_call.h"
#include "check.h"
#include "timing.h"

namespace fovea::tools {

enum ExitCode : int {
  kDone = 0,
  kCheckFailed = 1,
  kRefused = 2,  ///< the user's input
  kFailed = 3,   ///< the device or the system
};

/// Who shall compute.
struct Runner {
  std::string device = "cpu";
  PlanOptions options;

  /// The device named, which is there; `architectures` allows "sm_90" and GPUs that need not be there.
  [[nodiscard]] Device parsed_device(bool architectures) const;
};

/// 90 for "sm_90", and for "sm_90a", as NVIDIA calls what no later architecture runs; nothing where it is neither.
[[nodiscard]] std::optional<int> parsed_architecture(std::string_view text);

/// The problems of lines as given, those of a file for each "@FILE": blank lines and what follows a '#' are left out.
[[nodiscard]] std::vector<Problem> problems_of(const std::vector<std::string>& arguments);

/// The files among them.
[[nodiscard]] std::vector<std::string> files_of(const std::vector<std::string>& arguments);

/// Before any work: throws Error(kInvalidArgument) where a file to write can't be written, or is one of those that are
/// read.  An empty path is none.
void require_output(const char* option, const std::string& path, const std::vector<std::string>& inputs);

/// Throws Error(kInvalidArgument) where --seconds is no time that anybody waits.
void require_duration(const Effort& effort);

// The commands, and what the user may say to each (main.cpp).

struct RunArguments {
  CallSource source;
  Runner runner;
  std::string out;
  std::string plot;
  std::vector<std::int64_t> heads;  ///< to draw; empty: all
  std::int64_t sequence = 0;        ///< to draw
  bool check = false;
  bool json = false;
};
ExitCode command_run(const RunArguments& arguments);

struct ExplainArguments {
  std::vector<std::string> lines;
  Runner runner;
  bool json = false;
};
ExitCode command_explain(const ExplainArguments& arguments);

struct CheckArguments {
  std::vector<std::string> lines;
  Runner runner;
  CheckRun run;  ///< but for its lines and options
};
ExitCode command_check(const CheckArguments& arguments);

struct BenchArguments {
  std::vector<std::string> lines;
  std::vector<std::string> against;
  Runner runner;
  Effort effort;
  std::uint64_t seed = 0;
  std::string json;  ///< a file, or "-" for standard output
  std::string html;
};
ExitCode command_bench(const BenchArguments& arguments);

/// Kernels for GPUs that need not be there.
struct PrecompileArguments {
  std::vector<std::string> lines;
  std::vector<std::string> archs;  ///< "sm_80"
  bool ladder = false;             ///< the kernels of examples/ladder too
  std::string out;                 ///< the pack; empty: none
  std::string table;               ///< a file for registers, shared memory, seconds
  int jobs = 0;
  std::size_t most = 0;       ///< so many kernels, evenly spread; 0: all
  bool check = false;         ///< exit 1 where one spills, warns or is slow to compile
  std::string known;          ///< a file of what --check knows to spill: lines of kernel, architecture, bytes
  double median_seconds = 0;  ///< what --check allows; 0: any
  double most_seconds = 0;
};
ExitCode command_precompile(const PrecompileArguments& arguments);

/// Tiles for a GPU, measured there.
struct TuneArguments {
  std::vector<std::string> lines;  ///< empty: say what is kept
  Runner runner{.device = "cuda:0", .options = {}};
  Effort effort{.repeats = 0, .seconds = 0.3};  ///< for each tile that comes into question
  int jobs = 0;
  bool forget = false;  ///< all that is kept for this GPU
};
ExitCode command_tune(const TuneArguments& arguments);

/// The rungs of examples/ladder, and the library's own kernels above them.
struct LadderArguments {
  std::string device = "cpu";
  std::vector<std::string> dtypes;    ///< empty: fp32 on the CPU, bf16 on a GPU
  std::vector<std::int64_t> seqlens;  ///< empty: what suits the device; likewise 0:
  std::int64_t batch = 0, heads = 0;
  std::vector<std::int64_t> head_dims{64};
  std::vector<std::int64_t> rungs{0, 1, 2, 3, 4, 5};
  std::vector<std::string> masks{"full"};  ///< of "full", "causal"
  Effort effort{.repeats = 0, .seconds = 0.1};
  bool check = false;  ///< against the oracle, and no more
  std::string json, html;
};
ExitCode command_ladder(const LadderArguments& arguments);

struct DoctorArguments {
  bool json = false;
};
ExitCode command_doctor(const DoctorArguments& arguments);

}  // namespace fovea::tools
