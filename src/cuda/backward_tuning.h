#pragma once

#include <fovea/problem.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "cuda/forward_tuning.h"

namespace fovea::cuda {

/// How a backward is cut, what its kernels are compiled for, and how its workspace is shared out.
struct BackwardShape {
  BackwardSpec spec;
  int min_blocks = 1;                           ///< on a multiprocessor at once
  int row_blocks = 0, key_blocks = 0;           ///< of the longest sequence
  int row_slots = 0;                            ///< of blocks of rows, all sequences together
  int key_lines = 0, turns = 0;                 ///< of blocks of a kv head, and such heads: `BlockTask`
  std::int64_t most_blocks = 0;                 ///< of any launch: a grid and an int hold 2^31 − 1
  int heads_abreast = 1;                        ///< see BackwardParams
  bool batch_inside = false;                    ///< likewise
  int dq_places = 0, dq_parts = 0, dq_lag = 0;  ///< likewise
  int bias_parts = 1;                           ///< likewise
  int group_parts = 1;                          ///< likewise
  /// Offsets in bytes, in the order of BackwardParams.
  std::size_t log2_lse = 0, delta = 0, dq_sum = 0, tickets = 0, begun = 0, added = 0, sink_parts = 0, slope_parts = 0,
              bias_sums = 0, dk_parts = 0, dv_parts = 0;
  std::size_t workspace_bytes = 0;
  bool measured = false;  ///< the tile is `fovea tune`'s
};

/// All of a spec but the tile sizes.
[[nodiscard]] BackwardSpec backward_spec(const Problem& problem, int sm);
/// Has blocks share out the heads of a group where that takes less time; returns the problem as kernels then see it,
/// with a kv head for each part.  at_once: blocks, or clusters, that run at the same time.
[[nodiscard]] Problem split_groups(const Problem& problem, std::int64_t at_once, BackwardShape& shape);
/// Fills in the numbers of blocks, once the tile is chosen.
void cut_up(const Problem& problem, BackwardShape& shape);
/// Fills in the parts of each tile of the bias gradient and the layout of the workspace, once all else is known.
void share_out(const Problem& problem, const GpuModel& gpu, BackwardShape& shape);
/// Into how many parts each tile of the bias gradient is shared out, and the workspace they take, in fp32 words.
struct BiasParts {
  int parts = 1;
  std::int64_t words = 0;
};
[[nodiscard]] BiasParts bias_parts(const Problem& problem, const BackwardSpec& spec, const GpuModel& gpu);
/// What sets a tile apart from the others for the same problem.
[[nodiscard]] std::string name_of(const BackwardShape& shape);
/// The largest number of kv heads up to `most` that divides `shape.turns`.
[[nodiscard]] int kv_heads_abreast(const BackwardShape& shape, std::int64_t most);

/// Nothing where no tile fits this GPU's shared memory.
[[nodiscard]] std::optional<BackwardShape> choose_backward(const Problem& given, const GpuModel& gpu);

/// In the order in which they run; the last three only where their results are wanted.
[[nodiscard]] jit::KernelRequest backward_rows_request(const BackwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest backward_request(const BackwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest group_sums_request(const BackwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest backward_queries_request(const BackwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest backward_sums_request(const BackwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest bias_gradient_request(const BackwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest bias_sums_request(const BackwardShape& shape, int arch);

}  // namespace fovea::cuda
