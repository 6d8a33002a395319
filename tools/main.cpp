#include <fmt/format.h>
#include <fovea/error.h>
#include <fovea/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>

#include "command.h"
#include "tensor_data.h"
#include "terminal.h"

namespace fovea::tools {
namespace {

constexpr const char* kFooter = R"(
A problem is one line of text, as in
  fovea explain "fwd+bwd bf16 b2 hq16 hkv4 sq4096 d128 causal=bottom_right"

Environment:
  FOVEA_CPU_ISA   avx512, avx2 or portable: the only CPU instruction set to use
  NO_COLOR        set and not empty: no colours

Exit codes: 0 done, 1 a check failed, 2 the input was refused, 3 the device or the system failed.)";

ExitCode exit_code(ErrorCode code) {
  return code == ErrorCode::kInvalidArgument || code == ErrorCode::kUnsupported ? kRefused : kFailed;
}

ExitCode complain(ExitCode code, std::string_view sentence) {
  const Terminal terminal(stderr);
  terminal.line(fmt::format("{} {}", terminal.paint(Ink::kBad, "fovea:"), sentence));
  return code;
}

/// CLI11's complaint as one sentence.
std::string sentence_of(const CLI::ParseError& error, const CLI::App& app) {
  constexpr const char* kCommands = "run, explain, check, bench or doctor; see fovea --help";
  const std::vector<CLI::App*> chosen = app.get_subcommands();
  if (chosen.empty()) {
    const std::vector<std::string> words = app.remaining();
    if (words.empty()) return fmt::format("there is no command; name one of {}", kCommands);
    return fmt::format("{} is no command; name one of {}", in_quotes(words.front()), kCommands);
  }
  std::string text = error.what();
  std::ranges::replace(text, '\n', ' ');
  return fmt::format("{}; see fovea {} --help", text, chosen.front()->get_name());
}

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
