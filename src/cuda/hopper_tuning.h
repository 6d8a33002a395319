#pragma once

#include <fovea/problem.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/forward_tuning.h"
#include "cuda/jit/render.h"
#include "cuda/spec_sm90.h"

namespace fovea::cuda {

/// How a forward of the Hopper family is cut and what it is compiled for.
struct ForwardSm90Shape {
  ForwardSm90Spec spec;
  std::int64_t row_blocks = 1;     ///< of the longest sequence
  std::int64_t tiles = 1;          ///< of rows, of all heads
  std::int64_t heads_abreast = 1;  ///< whose tiles take turns
  bool batch_inside = false;       ///< they are one head's of all sequences, then the next one's
  bool measured = false;           ///< the tile is `fovea tune`'s
};

/// Says of a tile all that sets it apart from others of the same problem.
[[nodiscard]] std::string name_of(const ForwardSm90Shape& shape);

/// Nothing where the family has no tile for the problem: other types, head dims above 256 or in no steps of 8.
[[nodiscard]] std::optional<ForwardSm90Shape> choose_forward_sm90(const Problem& problem, const GpuModel& gpu);

/// Where rows are few, keys have to be shared out to the multiprocessors.
[[nodiscard]] bool has_few_rows(const Problem& problem);

[[nodiscard]] jit::KernelRequest forward_sm90_request(const ForwardSm90Shape& shape);

}  // namespace fovea::cuda
