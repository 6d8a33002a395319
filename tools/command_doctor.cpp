#include <fmt/format.h>
#include <fovea/version.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "command.h"
#include "cpu/flash_backend.h"
#include "cpu/threads.h"
#include "cuda/driver.h"
#include "cuda/jit/cache.h"
#include "cuda/jit/device_text.h"
#include "dispatch/backend.h"
#include "machine.h"
#include "report.h"
#include "terminal.h"

namespace fovea::tools {
namespace {

using nlohmann::ordered_json;

constexpr double kRateSeconds = 0.2;

struct FmaRate {
  std::string isa;
  double one = 0.0;  // FLOP/s of one thread
  double all = 0.0;
};

std::vector<FmaRate> fma_rates(int threads) {
  ProgressBar bar;
  std::vector<FmaRate> rates;
  const std::vector<std::string> isas = cpu::available_isas();
  for (const std::string& isa : isas) {
    for (const bool pairs : {false, true}) {
      if (pairs && !multiplies_pairs(isa)) continue;
      bar.show(static_cast<double>(rates.size()) / static_cast<double>(2 * isas.size()), "multiply-add rate of " + isa);
      FmaRate rate{isa + (pairs ? " bf16" : ""), fma_rate(isa, pairs, 1, kRateSeconds)};
      rate.all = threads > 1 ? fma_rate(isa, pairs, threads, kRateSeconds) : rate.one;
      rates.push_back(std::move(rate));
    }
  }
  return rates;
}

/// What a backend says to a plain problem of each pass and dtype on the CPU.
struct Ability {
  std::string backend;
  std::vector<std::pair<std::string, std::vector<std::string>>> answers;  // "forward fp32" → reasons against, none: yes
};

std::vector<Ability> abilities() {
  std::vector<Ability> all;
  for (const auto& backend : dispatch::backends()) {
    Ability ability{backend->name(), {}};
    for (const char* direction : {"fwd", "bwd"}) {
      for (const char* dtype : {"fp32", "fp16", "bf16"}) {
        const Problem problem = parse_problem(fmt::format("{} {} b1 hq1 sq128 d64", direction, dtype));
        std::vector<std::string> reasons;
        try {
          reasons = backend->judge(problem, Device{}).reasons;
        } catch (const Error& error) {  // a variable of the environment is wrong
          reasons = {error.what()};
        }
        ability.answers.emplace_back(fmt::format("{} {}", direction, dtype), std::move(reasons));
      }
    }
    all.push_back(std::move(ability));
  }
  return all;
}

/// What there is for GPU kernels.
struct CudaFound {
  int driver = cuda::driver_version();
  const std::string& driver_why = cuda::why_no_driver();
  const cuda::Nvrtc* nvrtc = cuda::Nvrtc::find();
  cuda::jit::Cache* cache = nullptr;
  std::string cache_why;  // there is none: a variable or the pack is wrong
  cuda::jit::Disk::Usage usage;

  CudaFound() {
    try {
      cache = &cuda::jit::Cache::shared();
      usage = cache->disk().usage();
    } catch (const Error& error) {
      cache_why = error.what();
    }
  }
  [[nodiscard]] std::size_t tuned_kinds(const cuda::Gpu& gpu) const {
    return cache == nullptr ? 0 : cache->tiles(gpu.name).all().size();
  }
};

struct Diagnosis {
  Processor cpu = processor();
  CudaFound cuda;
  int threads = cpu::worker_count(0);
  const char* pinned = std::getenv("FOVEA_CPU_ISA");
  std::vector<FmaRate> rates = fma_rates(threads);
  std::vector<Ability> backends = abilities();
};

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

const char* name(cuda::jit::Mode mode) {
  if (mode == cuda::jit::Mode::kOn) return "on";
  return mode == cuda::jit::Mode::kCache ? "cache" : "off";
}

ordered_json json_of(const CudaFound& found) {
  const auto or_null = [](const std::string& text) { return text.empty() ? ordered_json() : ordered_json(text); };
  ordered_json json{{"driver", found.driver == 0 ? ordered_json() : ordered_json(version_text(found.driver))},
                    {"driver_problem", or_null(found.driver_why)},
                    {"nvrtc", or_null(found.nvrtc == nullptr ? "" : found.nvrtc->version())},
                    {"nvrtc_path", or_null(found.nvrtc == nullptr ? "" : found.nvrtc->path())},
                    {"nvrtc_problem", or_null(cuda::Nvrtc::why_none())},
                    {"nvrtc_archs", ordered_json::array()},
                    {"gpus", ordered_json::array()},
                    {"build_id", std::string(cuda::jit::build_id)},
                    {"FOVEA_JIT", nullptr},
                    {"cache", nullptr},
                    {"cache_problem", or_null(found.cache_why)},
                    {"packs", ordered_json::array()}};
  for (int i = 0; i < cuda::gpu_count(); ++i) {
    const cuda::Gpu& gpu = cuda::gpu(i);
    json["gpus"].push_back({{"name", gpu.name},
                            {"compute_capability", gpu.compute_capability},
                            {"memory_bytes", gpu.memory_bytes},
                            {"tuned_kinds", found.tuned_kinds(gpu)}});
  }
  for (const int arch : cuda::jit::kArchs) {
    if (found.nvrtc != nullptr && found.nvrtc->knows(arch)) json["nvrtc_archs"].push_back(fmt::format("sm_{}", arch));
  }
  if (found.cache == nullptr) return json;
  json["FOVEA_JIT"] = name(found.cache->mode());
  json["cache"] = {{"folder", or_null(found.cache->disk().folder())},
                   {"writable", found.usage.writable},
                   {"kernels", found.usage.kernels},
                   {"bytes", found.usage.bytes}};
  for (const cuda::jit::Pack& pack : found.cache->packs()) {
    json["packs"].push_back({{"file", pack.file().string()}, {"kernels", pack.size()}, {"build_id", pack.build()}});
  }
  return json;
}

ordered_json json_of(const Diagnosis& found) {
  ordered_json json;
  json["version"] = FOVEA_VERSION;
  json["cpu"] = {{"model", found.cpu.model},
                 {"architecture", found.cpu.architecture},
                 {"extensions", found.cpu.extensions},
                 {"processors", found.cpu.online},
                 {"threads", found.threads},
                 {"l1_bytes", found.cpu.l1_bytes},
                 {"l2_bytes", found.cpu.l2_bytes},
                 {"l3_bytes", found.cpu.l3_bytes},
                 {"memory_bytes", found.cpu.memory_bytes}};
  json["FOVEA_CPU_ISA"] = found.pinned == nullptr ? ordered_json() : ordered_json(found.pinned);
  json["fma_gflops"] = ordered_json::object();
  for (const FmaRate& rate : found.rates) {
    json["fma_gflops"][rate.isa] = {{"one_thread", rate.one / 1e9}, {"all_threads", rate.all / 1e9}};
  }
  json["cuda"] = json_of(found.cuda);
  json["backends"] = ordered_json::object();
  for (const Ability& ability : found.backends) {
    for (const auto& [question, reasons] : ability.answers) json["backends"][ability.backend][question] = reasons;
  }
  return json;
}

void print_cpu(const Terminal& terminal, const Diagnosis& found) {
  terminal.line("\n  " + terminal.paint(Ink::kStrong, "Fovea " FOVEA_VERSION) + "\n");
  terminal.write(labelled(terminal, "processor", fmt::format("{}, {}", found.cpu.model, found.cpu.architecture)));
  terminal.write(labelled(terminal, "", fmt::format("{}", fmt::join(found.cpu.extensions, " "))));
  terminal.write(labelled(terminal, "threads", fmt::format("{} of {} processors", found.threads, found.cpu.online)));
  const auto size = [](std::int64_t bytes) { return bytes > 0 ? bytes_text(static_cast<double>(bytes)) : "unknown"; };
  terminal.write(labelled(terminal, "caches",
                          fmt::format("L1 {}, L2 {}, L3 {}", size(found.cpu.l1_bytes), size(found.cpu.l2_bytes),
                                      size(found.cpu.l3_bytes))));
  terminal.write(labelled(terminal, "memory", size(found.cpu.memory_bytes)));
  if (found.pinned != nullptr)
    terminal.write(labelled(terminal, "pinned to", printable(fmt::format("{} (FOVEA_CPU_ISA)", found.pinned))));

  Table rates({{"multiply-add, GFLOP/s"}, {"1 thread", true}, {fmt::format("{} threads", found.threads), true}});
  for (const FmaRate& rate : found.rates) {
    rates.add({{rate.isa, Ink::kAccent}, {number_text(rate.one / 1e9)}, {number_text(rate.all / 1e9)}});
  }
  terminal.write("\n" + rates.text(terminal));
}

void print_cuda(const Terminal& terminal, const CudaFound& found) {
  std::string driver = found.driver_why;
  if (found.driver != 0) driver = version_text(found.driver) + (driver.empty() ? "" : ": " + driver);
  terminal.write("\n" + labelled(terminal, "CUDA driver", driver));
  for (int i = 0; i < cuda::gpu_count(); ++i) {
    const cuda::Gpu& gpu = cuda::gpu(i);
    terminal.write(labelled(terminal, "GPU",
                            fmt::format("{}, sm_{}, {}", gpu.name, gpu.compute_capability,
                                        bytes_text(static_cast<double>(gpu.memory_bytes)))));
    if (const std::size_t kinds = found.tuned_kinds(gpu); kinds > 0)
      terminal.write(labelled(terminal, "", fmt::format("tiles by fovea tune for {} kinds of problems", kinds)));
  }
  terminal.write(labelled(terminal, "NVRTC",
                          found.nvrtc == nullptr ? printable(cuda::Nvrtc::why_none())
                                                 : fmt::format("{}, {}", found.nvrtc->version(), found.nvrtc->path())));
  if (found.cache == nullptr) {
    terminal.write(labelled(terminal, "GPU kernels", printable(found.cache_why)));
    return;
  }
  const cuda::jit::Disk& disk = found.cache->disk();
  terminal.write(labelled(
      terminal, "GPU kernels",
      disk.folder().empty()
          ? "not kept: there is no home folder; name one in FOVEA_CACHE_DIR"
          : fmt::format("{}, {} in {}{}", found.usage.kernels, bytes_text(static_cast<double>(found.usage.bytes)),
                        printable(disk.folder().string()), found.usage.writable ? "" : ", which cannot be written")));
  for (const cuda::jit::Pack& pack : found.cache->packs()) {
    const bool ours = pack.build() == cuda::jit::build_id;
    terminal.write(labelled(terminal, "pack",
                            fmt::format("{} in {}{}", pack.size(), printable(pack.file().string()),
                                        ours ? "" : ", made by another version and of no use to this one")));
  }
  if (found.cache->mode() != cuda::jit::Mode::kOn) {
    terminal.write(
        labelled(terminal, "FOVEA_JIT", fmt::format("{}: no kernel is compiled", name(found.cache->mode()))));
  }
}

void print_backends(const Terminal& terminal, const std::vector<Ability>& backends) {
  std::vector<Table::Column> columns{{"backend"}};
  if (!backends.empty()) {
    for (const auto& [question, reasons] : backends.front().answers) columns.push_back({question});
  }
  Table table(columns);
  std::string why;
  for (const Ability& ability : backends) {
    std::vector<Table::Cell> cells{{ability.backend, Ink::kAccent}};
    std::vector<std::string> told;
    for (const auto& [question, reasons] : ability.answers) {
      cells.push_back(reasons.empty() ? Table::Cell{"yes", Ink::kGood} : Table::Cell{"no", Ink::kBad});
      const std::string text = fmt::format("{}", fmt::join(reasons, ", "));
      if (text.empty() || std::ranges::find(told, text) != told.end()) continue;
      why += labelled(terminal, why.empty() ? "not" : "", ability.backend + ": " + printable(text));
      told.push_back(text);
    }
    table.add(std::move(cells));
  }
  terminal.write("\n" + table.text(terminal) + (why.empty() ? "" : "\n" + why) + "\n");
}

}  // namespace

ExitCode command_doctor(const DoctorArguments& arguments) {
  const Terminal terminal(stdout);
  const Diagnosis found;
  if (arguments.json) {
    terminal.line(json_text(json_of(found)));
    return kDone;
  }
  print_cpu(terminal, found);
  print_cuda(terminal, found.cuda);
  print_backends(terminal, found.backends);
  return kDone;
}

}  // namespace fovea::tools
