#pragma once

#include <fovea/plan.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "params.h"

// How a rung's passes are made of kernels and memory, whoever runs them.
namespace fovea::ladder {

/// A kernel of the device text and its grid.
struct Launch {
  const char* function;  ///< "product<kSpec, Product::kOut>": what the text is instantiated as
  std::int64_t blocks;
  int threads;
  int shared_bytes;
};
[[nodiscard]] std::vector<Launch> launches(int rung, const Problem& problem, Direction pass);

/// Sizes and rules; tensors and workspace are attached later.
[[nodiscard]] Params describe_params(const Problem& problem);

/// Places what a pass keeps beside its tensors, and returns how many bytes that takes; a null base counts only.
std::size_t lay_out(Params& p, int rung, const Problem& problem, Direction pass, std::byte* base);

void attach(Params& p, Direction pass, const Inputs& inputs, const Outputs& outputs);

}  // namespace fovea::ladder
