#pragma once

#include <fovea/problem.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/forward_tuning.h"
#include "cuda/jit/cache.h"
#include "cuda/params.h"
#include "dispatch/backend.h"

// What the plans of all GPU backends are made of.
namespace fovea::cuda {

inline constexpr std::int64_t kLongest = std::int64_t{1} << 29;  // positions are 32 bits wide in kernels
inline constexpr std::int64_t kMostInGrid = 65535;

/// Fills in what a problem says, then what its tensors say.
void describe_call(const Problem& problem, CallParams& p);
void attach_inputs(CallParams& p, const Inputs& in);

/// A kernel of a plan: loaded where there is a GPU, else only compiled, for the report.
struct PlannedLaunch {
  jit::KernelRequest request;
  std::shared_ptr<const jit::Binary> binary{};
  const jit::Kernel* kernel = nullptr;
  std::string why_not_compiled{};

  PlannedLaunch(jit::KernelRequest wanted, const Device& device);
  [[nodiscard]] std::string describe() const;
};

/// The name of a shape's tile, and whether `fovea tune` chose it rather than the table.
template <class Shape>
std::string describe_tile(const Shape& shape) {
  return name_of(shape) + (shape.measured ? kMeasured : "");
}

/// Throws Error where the plan's device is only a description, such as sm_90.
void require_gpu(const PlannedLaunch& launch, const Device& device);

/// Does nothing where there are no blocks.  A block's threads are a grid of [threads_y][threads / threads_y].
template <class Params>
void launch(const PlannedLaunch& what, int blocks, const Params& params, void* stream, int threads_y = 1) {
  if (blocks == 0) return;
  what.kernel->launch({.x = static_cast<unsigned>(blocks),
                       .threads = static_cast<unsigned>(what.request.threads / threads_y),
                       .threads_y = static_cast<unsigned>(threads_y),
                       .shared_bytes = static_cast<unsigned>(what.request.shared_bytes),
                       .early = what.request.early},
                      params, stream);
}

/// Combines the parts of rows whose keys were split, where they were.  by_warps: of many rows, up to kWarpSplits parts.
class Combining {
 public:
  Combining(std::int64_t splits, Type type, bool dropout, bool by_warps, const Device& device, int arch);
  void describe(std::vector<std::pair<std::string, std::string>>& details) const;
  void run(const ForwardParams& p, void* stream) const;

 private:
  std::int64_t splits_;
  int rows_;  // of a block
  std::optional<PlannedLaunch> launch_;
};

/// The bits of a boolean mask, 32 keys a word, made by a kernel of their own at the end of a pass's workspace.
class MaskWords {
 public:
  MaskWords(const Problem& problem, std::size_t workspace_bytes, const Device& device, int arch,
            WordOrder order = WordOrder::kRows);

  /// Of the whole workspace, what comes before included.
  [[nodiscard]] std::size_t workspace_bytes() const { return bytes_; }

  void make(CallParams& p, void* workspace, void* stream) const;

 private:
  std::size_t begin_, bytes_;
  WordOrder order_;
  std::optional<PlannedLaunch> launch_;
};

// What a backend's `judge` asks; each adds its reasons to the verdict.
/// Whether the device is a GPU that the backend runs on, `made_for` in words.  Sets `available`.
void refuse_device(const Device& device, bool (*runs_on)(int capability), const char* made_for, Verdict& verdict);
/// Whether every position fits the 32 bits that kernels count in.
void refuse_long(const Problem& problem, Verdict& verdict);
/// Whether `value` is at most `most`.
void limit(Verdict& verdict, const char* what, std::int64_t value, std::int64_t most);

[[nodiscard]] GpuModel model_of_device(const Device& device);

}  // namespace fovea::cuda
