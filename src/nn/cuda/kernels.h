#pragma once

#include <fovea/tensor.h>

#include <array>
#include <atomic>

#include "cuda/jit/cache.h"
#include "nn/cuda/params.h"

namespace fovea::nn {

/// The layers' kernels, in kernels/rows.cuh and kernels/elements.cuh.
enum class KernelName : std::uint8_t {
  kFinish,
  kFinishGradient,
  kNorm,
  kNormGradient,
  kColumnSums,
  kAddUp,
  kRotate,
  kSquares,
  kEntropies,
  kAdamW,
  kPointwise,
  kPlaceRows,
  kLengths,
  kPut,
  kMoveRows
};
inline constexpr auto kKernelNames = static_cast<std::size_t>(KernelName::kMoveRows) + 1;

/// What is compiled of a kernel for rows of a dtype; needs no GPU.
[[nodiscard]] cuda::jit::KernelRequest kernel_request(KernelName name, DType dtype, int arch);

/// Those of one GPU, each compiled and loaded when it is first asked for.
class Kernels {
 public:
  explicit Kernels(int gpu);

  /// `blocks` of kLayerThreads each; where there are none, nothing.
  template <class Params>
  void launch(KernelName name, DType dtype, std::int64_t blocks, const Params& params, std::int64_t parts = 1,
              void* stream = nullptr) const {
    if (blocks == 0) return;
    of(name, dtype)
        .launch({.x = static_cast<unsigned>(blocks),
                 .y = static_cast<unsigned>(parts),
                 .z = 1,
                 .threads = cuda::kLayerThreads,
                 .shared_bytes = 0},
                params, stream);
  }

 private:
  [[nodiscard]] const cuda::jit::Kernel& of(KernelName name, DType dtype) const;

  int gpu_, arch_;
  mutable std::array<std::array<std::atomic<const cuda::jit::Kernel*>, 3>, kKernelNames> loaded_{};
};

}  // namespace fovea::nn
