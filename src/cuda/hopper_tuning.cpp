#include "cuda/hopper_tuning.h"

#include <algorithm>
#include <array>

#include "cuda/jit/wgmma_text.h"
#include "math/band.h"

namespace fovea::cuda {
namespace {

constexpr int kMostShared = 227 * 1024;
constexpr std::int64_t kFewRows = 64;

struct Tile {
  int widest;  // head dim that it serves
  int warpgroups, block_n, q_stages;
  bool hold, turns;
  bool options = false;             // anything but a band and sinks
  std::int64_t most_band_keys = 0;  // above 0: only for a band over no more keys
};

// Measured on an H100 (docs/notes).  The first that fits is taken.
constexpr std::array kTiles{
    Tile{64, 2, 128, 2, true, false, false, 1024},
    Tile{64, 3, 128, 2, false, true},
    Tile{128, 2, 128, 2, true, false},
    Tile{192, 2, 112, 1, false, false},
    Tile{256, 2, 80, 1, false, false},
    Tile{128, 2, 128, 2, false, false, true},
    Tile{128, 2, 64, 2, false, false, true},
    Tile{192, 2, 96, 1, false, false, true},
    Tile{256, 2, 64, 1, false, false, true},
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Keys of a tile that an option leaves registers for.
bool has_room(const ForwardSm90Spec& s) {
  if (s.mask && s.block_n % 32 != 0) return false;  // whole words
  return !s.bias || s.block_n <= 64 || s.head_dim_v > 128;
}

/// Heads whose keys and values L2 keeps while their tiles take turns; longer rows gain from more of them.
std::int64_t heads_abreast(const Problem& problem, bool band) {
  if (!band && !problem.q_lengths.present && !problem.kv_lengths.present && !problem.packed()) return 1;
  const std::int64_t keys = problem.seqlen_kv, group = problem.num_q_heads / problem.num_kv_heads;
  const std::int64_t room = std::int64_t{keys <= 512 ? 8 : keys < 16384 ? 16 : 64} << 20;
  const std::int64_t head_bytes = std::max<std::int64_t>(1, keys * (problem.head_dim + problem.head_dim_v) * 2);
  return std::max<std::int64_t>(1, room / head_bytes) * group;
}

}  // namespace

bool has_few_rows(const Problem& problem) {
  return problem.seqlen_q * (problem.num_q_heads / problem.num_kv_heads) <= kFewRows;
}

std::optional<ForwardSm90Shape> choose_forward_sm90(const Problem& problem) {
  if (problem.dtype != DType::kFloat16 && problem.dtype != DType::kBFloat16) return std::nullopt;
  if (problem.head_dim % 8 != 0 || problem.head_dim_v % 8 != 0) return std::nullopt;
  ForwardSm90Shape shape;
  ForwardSm90Spec& spec = shape.spec;
  spec.type = type_of(problem.dtype);
  const std::int64_t widest = std::max(problem.head_dim, problem.head_dim_v);
  spec.head_dim = static_cast<int>(problem.head_dim);
  spec.head_dim_v = static_cast<int>(problem.head_dim_v);
  spec.mask = problem.mask.has_value();
  spec.bias = problem.bias.has_value();
  if (spec.bias) spec.bias_type = type_of(problem.bias_dtype);
  spec.alibi = problem.alibi != Alibi::kNone;
  spec.softcap = problem.softcap != 0.0F;
  spec.dropout = problem.dropout.probability > 0.0F;
  const bool options = spec.mask || spec.bias || spec.alibi || spec.softcap || spec.dropout;
  const bool band = math::BandRule::of(problem).bounded();

  const auto fits = [&](const Tile& tile) {
    spec.warpgroups = tile.warpgroups, spec.block_n = tile.block_n, spec.q_stages = tile.q_stages;
    spec.hold = tile.hold, spec.turns = tile.turns;
    const bool short_enough = tile.most_band_keys == 0 || (band && problem.seqlen_kv <= tile.most_band_keys);
    return widest <= tile.widest && (tile.options || !options) && short_enough &&
           shared_bytes(spec) <= kMostShared && has_room(spec);
  };
  if (std::ranges::none_of(kTiles, fits)) return std::nullopt;
  shape.row_blocks = ceil_div(problem.seqlen_q, block_m(spec));
  shape.tiles = shape.row_blocks * problem.num_q_heads * problem.batch;
  shape.heads_abreast =
      std::min(heads_abreast(problem, band), std::max<std::int64_t>(1, problem.num_q_heads * problem.batch));
  return shape;
}

jit::KernelRequest forward_sm90_request(const ForwardSm90Shape& shape) {
  constexpr int kSm90 = 90;
  const ForwardSm90Spec& spec = shape.spec;
  return jit::render({.function = "forward_sm90",
                      .header = "cuda/kernels/hopper/forward.cuh",
                      .spec = "ForwardSm90Spec",
                      .params = "ForwardSm90Params",
                      .threads = threads_of(spec),
                      .shared_bytes = shared_bytes(spec),
                      .text = jit::wgmma_text(spec.type, {spec.block_n, spec.head_dim_v}),
                      .own = true},
                     spec, kSm90);
}

}  // namespace fovea::cuda
