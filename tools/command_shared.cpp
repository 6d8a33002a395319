#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <system_error>

#include "command.h"
#include "cuda/driver.h"
#include "files/tensor_data.h"
#include "problem/refuse.h"

namespace fovea::tools {
namespace {

/// The number after a prefix, where the text is just that.
std::optional<int> number_after(std::string_view text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return {};
  text.remove_prefix(prefix.size());
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 0) return {};
  return value;
}

constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";  // which some editors put before UTF-8

}  // namespace

std::optional<int> parsed_architecture(std::string_view text) {
  constexpr int kFirstWithOwn = 90;
  const bool own = text.ends_with('a');
  if (own) text.remove_suffix(1);
  const std::optional<int> capability = number_after(text, "sm_");
  return capability.value_or(0) >= (own ? kFirstWithOwn : 1) ? capability : std::nullopt;
}

Device Runner::parsed_device(bool architectures) const {
  if (device == "cpu") return {};
  if (const auto index = device == "cuda" ? 0 : number_after(device, "cuda:")) {
    if (!architectures) (void)cuda::gpu(*index);  // refuses the one that is not there
    return {.kind = DeviceKind::kCuda, .index = *index};
  }
  if (const auto capability = parsed_architecture(device)) {
    if (architectures) return {.kind = DeviceKind::kCuda, .compute_capability = *capability};
    refuse(fmt::format(
        "--device {} names an architecture, which only `fovea explain` takes; name what is here, as in cuda:0",
        device));
  }
  refuse(fmt::format("--device {} is unknown; use cpu or cuda:N{}", files::in_quotes(device),
                     architectures ? ", or an architecture such as sm_90" : ""));
}

void require_duration(const Effort& effort) {
  if (effort.seconds >= 0.001 && effort.seconds <= 3600) return;  // NaN is none
  refuse(fmt::format("--seconds ({}) must lie between 0.001 and 3600", effort.seconds));
}

std::vector<std::string> files_of(const std::vector<std::string>& arguments) {
  std::vector<std::string> paths;
  for (const std::string& argument : arguments) {
    if (argument.starts_with('@')) paths.push_back(argument.substr(1));
  }
  return paths;
}

void require_output(const char* option, const std::string& path, const std::vector<std::string>& inputs) {
  if (path.empty()) return;
  files::require_writable(path);
  for (const std::string& input : inputs) {
    std::error_code absent;
    if (!std::filesystem::equivalent(path, input, absent)) continue;
    refuse(fmt::format("{} {} is a file that is read; name another file", option, files::in_quotes(path)));
  }
}

std::vector<Problem> problems_of(const std::vector<std::string>& arguments) {
  std::vector<Problem> problems;
  for (const std::string& argument : arguments) {
    if (!argument.starts_with('@')) {
      problems.push_back(parse_problem(argument));
      continue;
    }
    const std::string path = argument.substr(1);
    files::InputFile file(path);
    int number = 0;
    for (std::string line; std::getline(file.stream, line);) {
      ++number;
      if (number == 1 && line.starts_with(kByteOrderMark)) line.erase(0, kByteOrderMark.size());
      line.resize(std::min(line.find('#'), line.size()));
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      problems.push_back(files::in_context(fmt::format("{}:{}", path, number), [&] { return parse_problem(line); }));
    }
  }
  if (problems.empty()) refuse("there is no problem line; give one, as in 'fwd fp32 b1 hq8 sq1024 d64'");
  return problems;
}

}  // namespace fovea::tools
