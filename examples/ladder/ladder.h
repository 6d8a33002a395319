#pragma once

#include <fovea/plan.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/jit/request.h"

// The ladder: from the formula to FlashAttention and FlashAttention-2, one idea a rung, each of them a page of code for
// GPUs and one for CPUs.  Its upper end are the library's own backends.
namespace fovea::ladder {

inline constexpr int kRungs = 4;

/// What a rung is called, and what it adds to the one below.
struct Description {
  const char* name;
  const char* idea;
};
[[nodiscard]] Description describe(int rung);

/// Makes a rung ready for one pass (kForward or kBackward); the same plan as any other.  On the CPU fp32, on GPUs fp16
/// and bf16 with head dims 64 and 128; plain or causal.  Throws Error(kUnsupported) with the reason for all else.
[[nodiscard]] Plan plan(int rung, const Problem& problem, Direction pass, const Device& device);

/// The kernels of all rungs on an architecture, none before Ampere.  Needs no GPU.
[[nodiscard]] std::vector<cuda::jit::KernelRequest> requests(int arch);

/// What a rung does beside the products, counted from its algorithm and its tiles.
struct Counts {
  double bytes = 0;            ///< to and from memory, where what leaves the chip comes back only by being asked for
  double other_per_score = 0;  ///< operations that are no product, for each visible entry of S: scaling, maxima,
                               ///< exponentials, sums, rescaling
};
[[nodiscard]] Counts counts(int rung, const Problem& problem, Direction pass);

}  // namespace fovea::ladder
