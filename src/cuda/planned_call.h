#pragma once

#include <fovea/problem.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "cuda/forward_tuning.h"
#include "cuda/jit/cache.h"
#include "cuda/params.h"
#include "dispatch/backend.h"

// What the plans of all GPU backends are made of.
namespace fovea::cuda {

inline constexpr std::int64_t kLongest = std::int64_t{1} << 29;  // positions are 32 bits wide in kernels
inline constexpr std::int64_t kMostInGrid = 65535;

/// What does not depend on tensors.
void describe_call(const Problem& problem, CallParams& p);
void attach_inputs(CallParams& p, const Inputs& in);

/// A kernel of a plan: loaded where there is a GPU, else only known.
struct PlannedLaunch {
  jit::KernelRequest request;
  std::shared_ptr<const jit::Binary> binary{};
  const jit::Kernel* kernel = nullptr;
  std::string why_not_compiled{};

  PlannedLaunch(jit::KernelRequest wanted, const Device& device);
  [[nodiscard]] std::string describe() const;
};

/// The tile of a shape, and who chose it if not the table.
template <class Shape>
std::string describe_tile(const Shape& shape) {
  return name_of(shape) + (shape.measured ? kMeasured : "");
}

/// Throws Error where the plan's device is only a description.
void require_gpu(const PlannedLaunch& launch, const Device& device);

/// Nothing where there are no blocks.  `threads_y`: of a block's threads.
template <class Params>
void launch(const PlannedLaunch& what, int blocks, const Params& params, void* stream, int threads_y = 1) {
  if (blocks == 0) return;
  what.kernel->launch({.x = static_cast<unsigned>(blocks),
                       .threads = static_cast<unsigned>(what.request.threads / threads_y),
                       .threads_y = static_cast<unsigned>(threads_y),
                       .shared_bytes = static_cast<unsigned>(what.request.shared_bytes)},
                      params, stream);
}

/// The words that a boolean mask becomes before a pass, at the end of its workspace.
class MaskWords {
 public:
  MaskWords(const Problem& problem, std::size_t workspace_bytes, const Device& device, int arch, bool by_lanes = false);

  /// Of the workspace, with what comes before.
  [[nodiscard]] std::size_t workspace_bytes() const { return bytes_; }

  void make(CallParams& p, void* workspace, void* stream) const;

 private:
  std::size_t begin_, bytes_;
  bool by_lanes_;
  std::optional<PlannedLaunch> launch_;
};

/// Why no GPU backend runs on this device at all, or not for positions this long; nothing where one may.
void refuse_device(const Device& device, Verdict& verdict);
void refuse_long(const Problem& problem, Verdict& verdict);

/// Adds a reason where `value` is above `most`.
void limit(Verdict& verdict, const char* what, std::int64_t value, std::int64_t most);

[[nodiscard]] int capability_of(const Device& device);
[[nodiscard]] GpuModel model_of_device(const Device& device);

}  // namespace fovea::cuda
