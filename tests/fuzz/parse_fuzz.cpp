#include <fovea/error.h>
#include <fovea/problem.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace {

void require(bool holds, const char* promise, std::string_view line) {
  if (holds) return;
  std::fprintf(stderr, "%s: %.*s\n", promise, static_cast<int>(line.size()), line.data());
  std::abort();
}

}  // namespace

/// Any line is refused with a sentence, or read to a problem that prints as one line which reads back to it.
extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view line(reinterpret_cast<const char*>(data), size);
  fovea::Problem problem;
  try {
    problem = fovea::parse_problem(line);
  } catch (const fovea::Error& error) {
    require(error.code() == fovea::ErrorCode::kInvalidArgument, "a bad line is the user's error", line);
    return 0;
  }
  const std::string printed = fovea::to_string(problem);
  require(fovea::parse_problem(printed) == problem, "parsing what was printed gives the problem back", line);
  require(fovea::to_string(fovea::parse_problem(printed)) == printed, "the printed line is canonical", line);
  require(fovea::flops(problem) >= 0, "work is not negative", line);
  return 0;
}
