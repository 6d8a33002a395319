#include <fmt/format.h>
#include <fovea/error.h>
#include <fovea/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <new>

#include "command.h"
#include "files/tensor_data.h"
#include "terminal.h"

namespace fovea::tools {
namespace {

constexpr const char* kFooter = R"(
A problem is one line of text, as in
  fovea explain "fwd+bwd bf16 b2 hq16 hkv4 sq4096 d128 causal=bottom_right"

Environment:
  FOVEA_CPU_ISA    amx, avx512, avx512_bf16, avx2 or portable: the only CPU instruction set to use
  FOVEA_JIT        on, cache or off: compile GPU kernels; take what is cached; take what is in a pack
  FOVEA_CACHE_DIR  where compiled kernels are kept, instead of ~/.cache/fovea
  FOVEA_PACK       the pack of kernels to use, instead of fovea.pack beside the program
  FOVEA_NVRTC      the libnvrtc.so to compile with
  FOVEA_CUBLASLT   the libcublasLt.so for products of layers
  FOVEA_RACECHECK  set: GPU kernels that compute-sanitizer's racecheck can follow, somewhat slower
  NO_COLOR         set and not empty: no colours

Exit codes: 0 done, 1 a check failed, 2 the input was refused, 3 the device or the system failed.)";

constexpr int kMostThreads = 65536;

ExitCode exit_code(ErrorCode code) {
  return code == ErrorCode::kInvalidArgument || code == ErrorCode::kUnsupported ? kRefused : kFailed;
}

ExitCode complain(ExitCode code, std::string_view sentence) {
  const Terminal terminal(stderr);
  terminal.line(fmt::format("{} {}", terminal.paint(Ink::kBad, "fovea:"), printable(sentence)));
  return code;
}

/// CLI11's complaint as one sentence.
std::string sentence_of(const CLI::ParseError& error, const CLI::App& app) {
  constexpr const char* kCommands = "run, explain, check, bench, tune, ladder, precompile or doctor; see fovea --help";
  const std::vector<CLI::App*> chosen = app.get_subcommands();
  if (chosen.empty()) {
    const std::vector<std::string> words = app.remaining();
    if (words.empty()) return fmt::format("there is no command; name one of {}", kCommands);
    return fmt::format("{} is no command; name one of {}", files::in_quotes(words.front()), kCommands);
  }
  std::string text = error.what();
  std::ranges::replace(text, '\n', ' ');
  return fmt::format("{}; see fovea {} --help", text, chosen.front()->get_name());
}

// ---- what may be said to each command

/// What the words ask for; run once they are all understood.
using Action = std::function<ExitCode()>;

CLI::Validator filled(const char* complaint) {
  return {[complaint](const std::string& given) { return std::string(given.empty() ? complaint : ""); }, ""};
}

/// A whole number, in decimals as they are written: CLI11 by itself takes 010 for 8.
template <typename T>
CLI::Validator whole(T least, T most) {
  const auto normalise = [=](std::string& given) {
    T number{};
    const char* end = given.data() + given.size();
    const auto [read, error] = std::from_chars(given.data(), end, number);
    if (error != std::errc{} || read != end || number < least || number > most)
      return fmt::format("{} is no whole number from {} to {}", files::in_quotes(given), least, most);
    given = std::to_string(number);
    return std::string();
  };
  return {normalise, ""};
}

/// A command and its arguments, which live as long as the action does.
template <typename Arguments>
struct Command {
  CLI::App* app;
  std::shared_ptr<Arguments> said = std::make_shared<Arguments>();

  Command(CLI::App& fovea, const char* name, const char* help, ExitCode (*run)(const Arguments&), Action& action)
      : app(fovea.add_subcommand(name, help)) {
    app->callback([said = said, run, &action] { action = [said, run] { return run(*said); }; });
  }

  CLI::Option* option(const char* name, auto& value, const char* type, const char* help) const {
    return app->add_option(name, value, help)->type_name(type);
  }
  CLI::Option* number(const char* name, auto& value, std::int64_t least, std::int64_t most, const char* help) const {
    return option(name, value, "N", help)->transform(whole(least, most));
  }
  /// Values with commas between them; the word after them is a positional again.
  CLI::Option* list(const char* name, auto& value, const char* type, const char* help) const {
    return option(name, value, type, help)->delimiter(',')->allow_extra_args(false);
  }
  CLI::Option* numbers(const char* name, auto& value, std::int64_t least, std::int64_t most, const char* help) const {
    return list(name, value, "LIST", help)->transform(whole(least, most));
  }
  /// An option that names a file: an empty name is a slip.
  CLI::Option* path(const char* name, std::string& value, const char* type, const char* help) const {
    return option(name, value, type, help)->check(filled("the path is empty"));
  }
  CLI::Option* seed(std::uint64_t& value, const char* type, const char* help) const {
    constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
    return option("--seed", value, type, help)->capture_default_str()->transform(whole<std::uint64_t>(0, kMost));
  }
  CLI::Option* flag(const char* name, bool& value, const char* help) const { return app->add_flag(name, value, help); }

  CLI::Option* lines() const {
    return option("problem", said->lines, "\"LINE\"|@FILE", "problem lines, or @FILE of them");
  }
  void runner(bool architectures) const {
    const char* devices = architectures ? "cpu, cuda:N, or an architecture such as sm_90" : "cpu or cuda:N";
    option("--device", said->runner.device, "DEVICE", devices)->capture_default_str();
    backend(said->runner.options.backend, "run this backend or refuse");
    number("--threads", said->runner.options.num_threads, 0, kMostThreads,
           "CPU threads; 0: as many as the process may use; never more than 256 or one a processor");
  }
  CLI::Option* backend(std::string& value, const char* help) const {
    return option("--backend", value, "NAME", help)
        ->check(filled("the name is empty; without --backend Fovea chooses"));
  }
  void effort() const {
    CLI::Option* repeat = number("--repeat", said->effort.repeats, 1, 1'000'000, "executions of each pass");
    option("--seconds", said->effort.seconds, "S", "or: time for each pass")->capture_default_str()->excludes(repeat);
  }
  void strict() const {
    flag("--strict", said->runner.options.strict, "refuse rather than pass over a backend that this device has");
  }
};

void add_run(CLI::App& fovea, Action& action) {
  const Command<RunArguments> command(fovea, "run", "Attention over the tensors of a file, or over random ones",
                                      command_run, action);
  RunArguments& said = *command.said;
  command.path("file", said.source.file, "FILE.safetensors", "q, k, v and what the call needs, by name");
  CLI::Option* problem =
      command.option("--problem", said.source.problem, "\"LINE\"", "random tensors for a problem line instead")
          ->check(filled("the line is empty; write one, as in 'fwd fp32 b1 hq8 sq1024 d64'"));
  command.seed(said.source.seed, "N", "of the random tensors")->needs(problem);  // dropout's is a token
  command.option("--options", said.source.options, "\"TOKENS\"",
                 "tokens of a problem line: \"causal=top_left dropout=0.1\"");
  command.flag("--grad", said.source.gradients, "the gradients too; the tensors must hold dout");
  command.path("--out", said.out, "OUT.safetensors", "write the results");
  CLI::Option* plot =
      command.path("--plot", said.plot, "FILE.html", "draw the attention weights as one self-contained page");
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  command.numbers("--heads", said.heads, 0, kMost, "heads to draw, as in 0,3,5; all where left out")->needs(plot);
  command.number("--sequence", said.sequence, 0, kMost, "batch element or packed sequence to draw")
      ->capture_default_str()
      ->needs(plot);
  command.runner(false);
  command.strict();
  command.flag("--check", said.check, "hold the results against the double reference; exit 1 where one is wrong");
  command.flag("--json", said.json, "one JSON object");
  for (const auto& [name, member] : kInputNames) {
    std::string flag = fmt::format("--{}", name);
    std::ranges::replace(flag, '_', '-');
    command.app
        ->add_option_function<std::string>(
            flag, [said = command.said, name = name](const std::string& path) { said->source.arrays[name] = path; },
            fmt::format("{} from a NumPy file", name))
        ->check(filled("the path is empty"))
        ->type_name("FILE.npy")
        ->group("Tensors one by one");
  }
}

void add_explain(CLI::App& fovea, Action& action) {
  const Command<ExplainArguments> command(fovea, "explain",
                                          "Who would run a problem, how, and why the others would not; needs no GPU",
                                          command_explain, action);
  command.lines()->required();
  command.runner(true);
  command.strict();
  command.flag("--json", command.said->json, "a JSON list, one report a pass");
}

void add_check(CLI::App& fovea, Action& action) {
  const Command<CheckArguments> command(fovea, "check", "Holds results against the double reference by the error rule",
                                        command_check, action);
  CheckRun& run = command.said->run;
  command.lines();
  CLI::Option* random = command.number("--random", run.random, 1, 1'000'000'000,
                                       "so many random problems, out of the whole option space");
  command.seed(run.seed, "S", "of the random problems and tensors");
  command
      .number("--kinds", run.kinds, 1, 1'000'000'000,
              "with --random: of so many kinds, so that a GPU needs few kernels; any where left out")
      ->needs(random);
  command.flag("--list", run.list, "print the problem lines, and check nothing");
  command.flag("--pairs", run.pairs, "count how often each two options came together");
  command.number("--jobs", run.jobs, 0, kMostThreads, "problems at once; 0: as many as the process may use threads");
  command.runner(false);
}

void add_bench(CLI::App& fovea, Action& action) {
  const Command<BenchArguments> command(fovea, "bench",
                                        "Times problems, and holds them against the multiply-add rate of the same run",
                                        command_bench, action);
  BenchArguments& said = *command.said;
  command.lines()->required();
  command.runner(false);
  command.strict();
  command.option("--against", said.against, "BACKEND", "time this backend too, in turns; may be repeated")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)  // the word after it is a positional again
      ->check(filled("the name is empty; name a backend"));
  command.effort();
  command.seed(said.seed, "N", "of the random tensors");
  command.path("--json", said.json, "FILE", "write the numbers; '-' prints them instead of the table");
  command.path("--html", said.html, "FILE", "write one self-contained page");
}

void add_tune(CLI::App& fovea, Action& action) {
  const Command<TuneArguments> command(
      fovea, "tune", "Measures which tiles are fastest on this GPU, and keeps them beside the compiled kernels",
      command_tune, action);
  TuneArguments& said = *command.said;
  command.app->add_option("problem", said.lines, "problem lines, or @FILE of them; none: say what is kept")
      ->type_name("\"LINE\"|@FILE");
  command.option("--device", said.runner.device, "DEVICE", "cuda:N")->capture_default_str();
  command.backend(said.runner.options.backend, "for this backend");
  command.option("--seconds", said.effort.seconds, "S", "for each tile that comes into question")
      ->capture_default_str();
  command.number("--jobs", said.jobs, 0, kMostThreads,
                 "kernels compiled at once; 0: as many as the process may use threads");
  command.flag("--forget", said.forget, "the tables' tiles again, for all problems on this GPU");
}

void add_ladder(CLI::App& fovea, Action& action) {
  const Command<LadderArguments> command(fovea, "ladder",
                                         "From the formula to FlashAttention and beyond, one idea a rung: checked, "
                                         "timed, counted (docs/how-it-works.md)",
                                         command_ladder, action);
  LadderArguments& said = *command.said;
  constexpr std::int64_t kMost = std::int64_t{1} << 29;
  command.option("--device", said.device, "DEVICE", "cpu or cuda:N")->capture_default_str();
  command.numbers("--seqlen", said.seqlens, 1, kMost, "sequence lengths, as in 512,1024");
  command.number("--batch", said.batch, 1, kMost, "sequences");
  command.number("--heads", said.heads, 1, kMost, "heads");
  command.numbers("--dim", said.head_dims, 1, 512, "head dims; on a GPU 64 and 128");
  command.numbers("--rungs", said.rungs, 0, 5, "some of them, as in 0,3,5");
  command.list("--dtype", said.dtypes, "LIST", "fp32 on the CPU, bf16 and fp16 on a GPU");
  command.list("--mask", said.masks, "LIST", "full, causal, or both");
  command.effort();
  CLI::Option* check =
      command.flag("--check", said.check, "hold every rung against the double reference, and measure nothing");
  command.path("--json", said.json, "FILE", "write the numbers")->excludes(check);
  command.path("--html", said.html, "FILE", "draw time and memory over sequence length, one self-contained page")
      ->excludes(check);
}

void add_precompile(CLI::App& fovea, Action& action) {
  const Command<PrecompileArguments> command(fovea, "precompile",
                                             "GPU kernels ahead of time, as one file; needs NVRTC and no GPU",
                                             command_precompile, action);
  PrecompileArguments& said = *command.said;
  command.lines();
  command.list("--arch", said.archs, "LIST", "architectures, as in sm_80,sm_90")->required();
  command.flag("--ladder", said.ladder, "the kernels of fovea ladder too");
  command.path("--out", said.out, "PACK", "write the pack");
  command.path("--table", said.table, "FILE", "write each kernel's registers, shared memory and compile time");
  command.number("--jobs", said.jobs, 0, kMostThreads, "kernels at once; 0: as many as the process may use threads");
  command.number("--most", said.most, 1, 1'000'000, "so many kernels at most, spread over all")->take_last();
  CLI::Option* check = command.flag("--check", said.check,
                                    "exit 1 where a kernel spills, uses local memory, warns or is slow to compile");
  command
      .path("--known-spills", said.known, "FILE", "with --check: lines of KERNEL sm_NN BYTES that may spill so much")
      ->needs(check);
  command
      .option("--median-seconds", said.median_seconds, "S",
              "with --check: what compiling may take in the median; more where the machine is slow")
      ->take_last()
      ->needs(check);
  command.option("--most-seconds", said.most_seconds, "S", "with --check: what it may take at most, likewise")
      ->take_last()
      ->needs(check);
}

void add_doctor(CLI::App& fovea, Action& action) {
  const Command<DoctorArguments> command(
      fovea, "doctor", "What this machine has, how fast it multiplies, and what each backend can do here",
      command_doctor, action);
  command.flag("--json", command.said->json, "one JSON object");
}

// ---- from words to an exit code

ExitCode run_command(int argc, char** argv) {
  CLI::App app("Exact attention and its gradients, in tiles.", "fovea");
  app.set_version_flag("--version", "fovea " FOVEA_VERSION);
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Action action;
  add_run(app, action);
  add_explain(app, action);
  add_check(app, action);
  add_bench(app, action);
  add_tune(app, action);
  add_ladder(app, action);
  add_precompile(app, action);
  add_doctor(app, action);
  app.footer(kFooter);  // last, so that the commands' own help does not repeat it
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    app.exit(help);
    return kDone;
  } catch (const CLI::ParseError& error) {
    return complain(kRefused, sentence_of(error, app));
  }
  return action();
}

}  // namespace
}  // namespace fovea::tools

int main(int argc, char** argv) {
  using namespace fovea::tools;
  ExitCode code = kFailed;
  try {
    code = run_command(argc, argv);
  } catch (const fovea::Error& error) {
    code = complain(exit_code(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    code = complain(kFailed, "memory ran out; use a smaller problem");
  } catch (const std::exception& error) {
    code = complain(kFailed, error.what());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    return complain(kFailed, "standard output can't be written");
  return code;
}
