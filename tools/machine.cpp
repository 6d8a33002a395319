#include "machine.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include "cpu/flash_backend.h"
#include "cpu/threads.h"

namespace fovea::tools {
namespace {

constexpr std::array kExtensions{"sse4_2",   "avx",      "f16c",     "fma",      "avx2",        "avx512f",
                                 "avx512bw", "avx512dq", "avx512vl", "avx_vnni", "avx512_bf16", "avx512_fp16",
                                 "amx_tile", "amx_bf16", "amx_int8", "asimd",    "asimdhp",     "asimddp",
                                 "bf16",     "i8mm",     "sve",      "sve2"};

void read_cpuinfo(Processor& processor) {
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line) && (processor.model.empty() || processor.extensions.empty());) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    std::istringstream value(line.substr(colon + 1));
    if (key == "model name" && processor.model.empty()) {
      std::getline(value >> std::ws, processor.model);
    } else if (key == "flags" || key == "Features") {
      const std::set<std::string> words{std::istream_iterator<std::string>(value), {}};
      std::ranges::copy_if(kExtensions, std::back_inserter(processor.extensions),
                           [&](const char* extension) { return words.contains(extension); });
    }
  }
  if (processor.model.empty()) processor.model = "unknown";
}

}  // namespace

Processor processor() {
  Processor found;
  read_cpuinfo(found);
  utsname system{};
  if (::uname(&system) == 0) found.architecture = system.machine;
  const auto ask = [](int name) { return std::max(::sysconf(name), 0L); };
  found.online = ask(_SC_NPROCESSORS_ONLN);
  found.l1_bytes = ask(_SC_LEVEL1_DCACHE_SIZE);
  found.l2_bytes = ask(_SC_LEVEL2_CACHE_SIZE);
  found.l3_bytes = ask(_SC_LEVEL3_CACHE_SIZE);
  found.memory_bytes = ask(_SC_PHYS_PAGES) * ask(_SC_PAGESIZE);
  return found;
}

bool multiplies_pairs(const std::string& isa) { return cpu::flash_kernels(isa).pairs; }

double fma_rate(const std::string& isa, bool pairs, int threads, double seconds) {
  const cpu::FlashKernels& kernels = cpu::flash_kernels(isa);
  struct Run {
    double (*multiply_add)(std::int64_t rounds);
    std::vector<double> flops;
    std::int64_t rounds;
  } run{pairs ? kernels.multiply_add_pairs : kernels.multiply_add,
        std::vector<double>(static_cast<std::size_t>(threads)), 20000};
  double best = 0.0, spent = 0.0;
  while (spent < seconds) {
    const auto start = std::chrono::steady_clock::now();
    cpu::run_tasks(
        threads, threads,
        [](void* context, std::int64_t index, int /*worker*/) {
          auto& my = *static_cast<Run*>(context);
          my.flops[static_cast<std::size_t>(index)] = my.multiply_add(my.rounds);
        },
        &run);
    const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, run.flops[0] * threads / took);
    spent += took;
    if (took < 0.01) run.rounds *= 2;
  }
  return best;
}

}  // namespace fovea::tools
