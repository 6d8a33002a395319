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
  std::int64_t tiles = 1;          ///< of rows, all heads together, times splits
  std::int64_t splits = 1;         ///< parts of the keys of each
  std::int64_t packed_heads = 1;   ///< whose rows a tile has together
  std::size_t partial_bytes = 0;   ///< of those, to be combined
  std::int64_t heads_abreast = 1;  ///< whose tiles take turns
  bool batch_inside = false;       ///< these are one head of all sequences, then the next head
  bool measured = false;           ///< the tile is `fovea tune`'s
};

/// What sets a tile apart from the others for the same problem.
[[nodiscard]] std::string name_of(const ForwardSm90Shape& shape);

/// Nothing where the family has no tile: fp32, head dims above 256 or not a multiple of 8.
[[nodiscard]] std::optional<ForwardSm90Shape> choose_forward_sm90(const Problem& problem, const GpuModel& gpu);

/// Whether a problem has so few rows that the portable family is faster, which packs all heads of a group.
[[nodiscard]] bool has_few_rows(const Problem& problem, const ForwardSm90Shape& shape);

[[nodiscard]] jit::KernelRequest forward_sm90_request(const ForwardSm90Shape& shape);

}  // namespace fovea::cuda
