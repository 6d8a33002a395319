// Random problems against the oracle, on another kind of processor: cross_check [count] [seed].
#include <cstdlib>

#include "check.h"

int main(int argc, char** argv) {
  fovea::tools::CheckRun run;
  run.random = argc > 1 ? std::strtoll(argv[1], nullptr, 10) : 100;
  run.seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  return fovea::tools::run_check(run);
}
