#include "cuda/hopper_tuning.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <span>
#include <string>

#include "cuda/jit/wgmma_text.h"
#include "math/band.h"

namespace fovea::cuda {
namespace {

/// A row of the table below, in the order of its numbers.
struct Tile {
  int widest;  // head dim that it serves
  int warpgroups, block_n, stages, q_stages;
  bool hold, turns;
  int most_options;                               // see `weight_of`
  bool masks = true;                              // skipping what masks hide takes registers, too
  bool draws = true;                              // so does dropout
  int most_idle = kAny;                           // see `idle`
  std::int64_t least_keys = 0, most_keys = kAny;  // see `most_keys_of_row`
  int narrowest = 8;                              // head dim

  static constexpr int kAny = std::numeric_limits<int>::max();
};

/// How many registers options take, by a rough measure.
int weight_of(const ForwardSm90Spec& s) { return s.mask + s.alibi + 2 * s.dropout + 3 * s.softcap + 8 * s.bias; }

constexpr std::int64_t kLong = 1500, kFew = 600;  // keys

// Measured on an H100 (docs/notes).  The first that fits is taken.
constexpr std::array kTiles{
    // Without options.  Where rows see few of many keys (`is_narrow`), warpgroups gain nothing by turns.
    Tile{64, 4, 64, 6, 2, false, false, 0, true, true, 10, kLong, kFew, 64},
    Tile{128, 3, 64, 4, 2, true, false, 0, true, true, 10, kLong, kFew, 128},
    Tile{64, 4, 64, 6, 2, false, true, 0, true, true, 10, 0, kLong},
    Tile{64, 3, 128, 4, 2, false, true, 0},
    Tile{96, 3, 96, 2, 2, false, true, 0, true, true, 17, kLong},
    Tile{128, 3, 64, 4, 2, false, true, 0, true, true, 10, kLong, Tile::kAny, 128},
    Tile{128, 2, 128, 2, 2, true, true, 0},
    Tile{192, 2, 80, 2, 2, true, true, 0},
    Tile{256, 2, 80, 2, 1, false, true, 0},
    // With options.
    Tile{64, 3, 128, 4, 2, false, true, 1, false, false, Tile::kAny, kLong},
    Tile{64, 4, 64, 6, 2, false, true, 4, false, false, 10},
    Tile{128, 2, 128, 2, 2, true, true, 2, true, false},
    Tile{128, 3, 80, 3, 2, false, true, 3, false, false, 10, kLong, Tile::kAny, 128},
    Tile{128, 2, 128, 2, 2, true, true, 3, true, false},
    Tile{128, 2, 128, 2, 2, false, true, 4, true, false},
    Tile{128, 2, 128, 2, 2, false, false, 2},
    Tile{96, 2, 128, 2, 2, false, true, 4},
    Tile{128, 2, 96, 2, 2, false, false, 3},
    Tile{128, 2, 128, 2, 2, false, false, 5, false},
    Tile{128, 2, 96, 2, 2, false, false, 7},
    Tile{192, 2, 96, 2, 1, false, true, 2, true, false},
    Tile{192, 2, 96, 2, 1, false, false, 2},
    Tile{256, 2, 80, 2, 1, false, true, 1, false},
    Tile{256, 2, 64, 2, 1, false, true, 2, true, false},
    Tile{256, 2, 48, 2, 1, false, false, 2},
    // With a bias.
    Tile{64, 2, 128, 4, 2, false, true, Tile::kAny},
    Tile{128, 2, 128, 2, 2, true, true, 9},
    Tile{128, 2, 96, 2, 2, true, true, 8},
    Tile{128, 2, 96, 2, 2, false, true, 9},
    Tile{128, 2, 128, 2, 2, false, false, Tile::kAny, false},
    Tile{96, 2, 128, 2, 2, false, true, Tile::kAny},
    Tile{128, 2, 96, 2, 2, false, true, Tile::kAny},
    Tile{128, 2, 64, 2, 2, false, false, Tile::kAny},
    // With one or not.
    Tile{192, 2, 64, 2, 2, false, true, Tile::kAny, false},
    Tile{192, 2, 80, 2, 1, false, false, 3},
    Tile{192, 2, 64, 2, 1, false, true, Tile::kAny},
    Tile{192, 2, 32, 2, 1, false, true, Tile::kAny},
    Tile{256, 2, 64, 2, 1, false, true, Tile::kAny, false, false},
    Tile{256, 2, 48, 2, 1, false, true, 12},
    Tile{256, 2, 32, 2, 1, false, true, Tile::kAny},
};

/// The most keys that a row sees: of the first, the middle and the last row of a longest sequence.
std::int64_t most_keys_of_row(const Problem& problem) {
  const auto band = math::Band::of(math::BandRule::of(problem), problem.seqlen_q, problem.seqlen_kv);
  std::int64_t most = 0;
  for (const std::int64_t row : {std::int64_t{0}, problem.seqlen_q / 2, problem.seqlen_q - 1}) {
    const auto keys = band.keys_of_row(row);
    most = std::max<std::int64_t>(most, keys.end - keys.begin);
  }
  return most;
}

/// The work lost to the last, incomplete wave of tiles and to rows past a sequence's end, in percent of the rows.
std::int64_t idle(const Problem& problem, int block_m) {
  const std::int64_t heads = problem.num_q_heads * problem.batch, at_once = model_of(kSm90).multiprocessors;
  const std::int64_t waves = ceil_div(ceil_div(problem.seqlen_q, block_m) * heads, at_once);
  return waves * at_once * block_m * 100 / std::max<std::int64_t>(1, problem.seqlen_q * heads) - 100;
}

/// A row sees a small part of the keys, so that small tiles compute fewer hidden entries.  The bound is measured.
bool is_narrow(const Problem& problem, std::int64_t keys_of_row) { return keys_of_row <= problem.seqlen_kv / 7; }

/// Heads that take turns; where all rows see as many keys those that share a bias, which is then read once.
std::int64_t heads_abreast_sm90(const Problem& problem, std::int64_t keys_of_row) {
  const GpuModel gpu = model_of(kSm90);
  if (is_narrow(problem, keys_of_row)) {  // by what rows near each other see, not by all keys
    constexpr std::uint64_t kRoom = 8 << 20, kMost = 64;
    const std::int64_t bytes = keys_of_row * (problem.head_dim + problem.head_dim_v) * size_bytes(problem.dtype);
    const std::uint64_t heads = std::bit_ceil(kRoom / static_cast<std::uint64_t>(std::max<std::int64_t>(1, bytes)));
    return std::clamp<std::int64_t>(problem.num_q_heads * problem.batch, 1,
                                    static_cast<std::int64_t>(std::min(heads, kMost)));
  }
  if (!problem.bias || !see_alike(problem)) return heads_abreast(problem, gpu);
  const std::int64_t sharing =
      (problem.bias->batch ? 1 : problem.batch) * (problem.bias->heads ? 1 : problem.num_q_heads);
  return std::clamp<std::int64_t>(sharing, 1, heads_in_l2(problem, gpu));
}

}  // namespace

bool has_few_rows(const Problem& problem) {
  return problem.seqlen_q * (problem.num_q_heads / problem.num_kv_heads) <= kFewRows;
}

std::string name_of(const ForwardSm90Shape& shape) {
  const ForwardSm90Spec& s = shape.spec;
  std::string name = tile_text(block_m(s), s.block_n, s.stages) + ", " + std::to_string(s.q_stages) + " of rows";
  if (s.hold) name += ", P held";
  if (s.turns) name += ", in turns";
  return name;
}

std::optional<ForwardSm90Shape> choose_forward_sm90(const Problem& problem, const GpuModel& gpu) {
  if (problem.dtype != DType::kFloat16 && problem.dtype != DType::kBFloat16) return std::nullopt;
  if (problem.head_dim % 8 != 0 || problem.head_dim_v % 8 != 0) return std::nullopt;
  ForwardSm90Shape shape;
  ForwardSm90Spec& spec = shape.spec;
  spec.type = type_of(problem.dtype);
  const std::int64_t widest = std::max(problem.head_dim, problem.head_dim_v);
  spec.head_dim = static_cast<int>(problem.head_dim);
  spec.head_dim_v = static_cast<int>(problem.head_dim_v);
  take_options(problem, spec);

  const std::int64_t keys = most_keys_of_row(problem);
  const auto take = [&](const Tile& tile) {
    spec.warpgroups = tile.warpgroups, spec.block_n = tile.block_n;
    spec.stages = tile.stages, spec.q_stages = tile.q_stages;
    spec.hold = tile.hold, spec.turns = tile.turns;
  };
  const auto fits = [&](const Tile& tile) {
    take(tile);
    return widest <= tile.widest && shared_bytes(spec) <= model_of(kSm90).shared_bytes;
  };
  const auto suits = [&](const Tile& tile) {
    return tile.narrowest <= widest && weight_of(spec) <= tile.most_options && (tile.masks || !spec.mask) &&
           (tile.draws || !spec.dropout) &&
           (tile.least_keys <= keys || (tile.block_n <= 64 && is_narrow(problem, keys))) && keys <= tile.most_keys &&
           idle(problem, block_m(spec)) <= tile.most_idle;
  };
  TileReader reader(gpu.choices, gpu.names, kHopperName, problem);
  const Tile* tile = reader.read(std::span<const Tile>(kTiles), fits, suits, [&] { return name_of(shape); });
  if (tile == nullptr) return std::nullopt;
  take(*tile);
  shape.measured = reader.measured();
  shape.row_blocks = ceil_div(problem.seqlen_q, block_m(spec));
  shape.tiles = shape.row_blocks * problem.num_q_heads * problem.batch;
  shape.batch_inside = problem.bias && !problem.bias->batch;
  shape.heads_abreast = heads_abreast_sm90(problem, keys);
  if (problem.packed()) shape.heads_abreast = std::min(shape.heads_abreast, problem.num_q_heads);  // of one sequence
  return shape;
}

jit::KernelRequest forward_sm90_request(const ForwardSm90Shape& shape) {
  const ForwardSm90Spec& spec = shape.spec;
  const std::string products = jit::wgmma_text(spec.type, {spec.block_n, short_n(spec), spec.head_dim_v});
  return jit::render({.function = "forward_sm90",
                      .header = "cuda/kernels/hopper/forward.cuh",
                      .spec = "ForwardSm90Spec",
                      .params = "ForwardSm90Params",
                      .threads = threads_of(spec),
                      .shared_bytes = shared_bytes(spec),
                      .text = products,
                      .arch_specific = true},
                     spec, kSm90);
}

}  // namespace fovea::cuda
