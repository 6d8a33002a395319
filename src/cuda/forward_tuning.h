#pragma once

#include <fovea/problem.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "cuda/jit/render.h"
#include "cuda/spec.h"
#include "cuda/tiles.h"
#include "math/fn.h"

namespace fovea::cuda {

/// What tuning needs to know of a GPU, whether this machine has it or not.
struct GpuModel {
  int sm = 80;  ///< compute capability
  int multiprocessors = 1;
  int shared_bytes = 0;  ///< the most that a block may have
  std::int64_t l2_bytes = 0;
  const TileChoices* choices = nullptr;       ///< what `fovea tune` measured on it, if it is there
  std::vector<std::string>* names = nullptr;  ///< see TileReader
};
[[nodiscard]] GpuModel model_of(int compute_capability);
/// Bytes of shared memory that a block may have where `blocks` of them share a multiprocessor.
[[nodiscard]] int shared_room(const GpuModel& gpu, int blocks);

/// How a forward is cut and what it is compiled for.
struct ForwardShape {
  ForwardSpec spec;
  int min_blocks = 1;                                                ///< on a multiprocessor at once
  int row_blocks = 1, v_chunks = 1, splits = 1, keys_per_split = 0;  ///< see ForwardParams
  std::int64_t heads_abreast = 1;                                    ///< likewise
  std::int64_t most_blocks = 0;                                      ///< a grid and an int hold 2^31 − 1
  bool by_warps = false;  ///< combine parts of rows, one each; else blocks do
  std::size_t partial_bytes = 0;
  bool measured = false;  ///< the tile is `fovea tune`'s
};

/// What sets a tile apart from the others for the same problem.
[[nodiscard]] std::string name_of(const ForwardShape& shape);

/// Nothing where no tile fits this GPU's shared memory.
[[nodiscard]] std::optional<ForwardShape> choose_forward(const Problem& problem, const GpuModel& gpu);

/// A problem's element type and how a GPU multiplies it.
[[nodiscard]] Type type_of(DType dtype);
[[nodiscard]] Mma mma_of(const Problem& problem, int sm);

/// Sets the options of a spec, of any family and pass.
template <class Spec>
void take_options(const Problem& problem, Spec& spec) {
  spec.mask = problem.mask.has_value();
  spec.bias = problem.bias.has_value();
  if (spec.bias) spec.bias_type = type_of(problem.bias_dtype);
  spec.alibi = problem.alibi != Alibi::kNone;
  spec.softcap = problem.softcap != 0.0F;
  spec.dropout = problem.dropout.probability > 0.0F;
}

/// Whether all rows see the same number of keys.
[[nodiscard]] bool see_alike(const Problem& problem);
/// Heads whose keys and values L2 keeps, at least 1; longer rows gain from more of them.
[[nodiscard]] std::int64_t heads_in_l2(const Problem& problem, const GpuModel& gpu);
/// Heads whose rows take turns in a forward, so that rows with many keys come first where rows differ; else 1.
[[nodiscard]] std::int64_t heads_abreast(const Problem& problem, const GpuModel& gpu);

/// Rows of a kv head up to which a problem counts as decoding: tall blocks gain nothing.
inline constexpr std::int64_t kFewRows = 64;
/// Whether heads of a group share blocks: where all of them are few rows, or one would leave most of a block empty.
[[nodiscard]] bool packs_heads(const Problem& problem);

using math::ceil_div, math::round_up;

[[nodiscard]] jit::KernelRequest forward_request(const ForwardShape& shape, int arch);
[[nodiscard]] jit::KernelRequest combine_request(Type type, bool dropout, bool by_warps, int arch);
[[nodiscard]] jit::KernelRequest mask_words_request(int arch);

}  // namespace fovea::cuda
