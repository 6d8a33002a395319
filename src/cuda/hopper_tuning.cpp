#include "cuda/hopper_tuning.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include "cuda/jit/wgmma_text.h"
#include "cuda/params.h"
#include "math/band.h"

namespace fovea::cuda {
namespace {

/// A row of the table below: problems, and the tile that serves them.
struct Row {
  struct {
    int narrowest = 8, widest;             // head dim
    int most_options = kAny;               // see `weight_of`
    bool mask = true, dropout = true;      // may be there: what they skip and draw takes registers, too
    int most_idle = kAny;                  // see `idle`
    int least_keys = 0, most_keys = kAny;  // see `most_keys_of_row`
    int pace = 0;                          // of those with one that serve, the one of the least `cost` is taken
  } serves;
  struct {
    int warpgroups = 2, block_n, stages = 2, q_stages = 2;  // see ForwardSm90Spec
    bool hold = false, turns = false;
    int blocks = 1;  // likewise
  } tile;
};

/// How many registers options take, by a rough measure.
int weight_of(const ForwardSm90Spec& s) { return s.mask + s.alibi + 2 * s.dropout + 3 * s.softcap + 8 * s.bias; }

constexpr int kLong = 1500, kFew = 600;  // keys

// Measured on an H100 (docs/notes).  The first that fits is taken.
constexpr auto kTiles = std::to_array<Row>({
    // Without options.  Where rows see few of many keys (`is_narrow`), warpgroups gain nothing by turns.
    {{.narrowest = 64, .widest = 64, .most_options = 0, .most_idle = 10, .least_keys = kLong, .most_keys = kFew},
     {.warpgroups = 4, .block_n = 64, .stages = 6}},
    {{.narrowest = 128, .widest = 128, .most_options = 0, .most_idle = 10, .least_keys = kLong, .most_keys = kFew},
     {.warpgroups = 3, .block_n = 64, .stages = 4, .hold = true}},
    {{.widest = 64, .most_options = 0, .most_keys = kLong, .pace = 100},
     {.warpgroups = 4, .block_n = 64, .stages = 6, .turns = true}},
    {{.widest = 64, .most_options = 0, .most_keys = kLong, .pace = 103},
     {.warpgroups = 3, .block_n = 128, .stages = 4, .turns = true}},
    {{.widest = 64, .most_options = 0, .most_keys = kLong, .pace = 110}, {.block_n = 128, .hold = true, .turns = true}},
    {{.widest = 64, .most_options = 0, .most_keys = 80, .pace = 108}, {.block_n = 80, .hold = true, .turns = true}},
    {{.widest = 64, .most_options = 0, .most_keys = 128, .pace = 109}, {.warpgroups = 1, .block_n = 64, .blocks = 3}},
    {{.widest = 64, .most_options = 0}, {.warpgroups = 3, .block_n = 128, .stages = 4, .turns = true}},
    {{.narrowest = 72, .widest = 128, .most_options = 0, .most_keys = kLong, .pace = 100},
     {.block_n = 128, .hold = true, .turns = true}},
    {{.narrowest = 128, .widest = 128, .most_options = 0, .most_keys = kLong, .pace = 106},
     {.warpgroups = 3, .block_n = 64, .stages = 4, .turns = true}},
    {{.narrowest = 72, .widest = 128, .most_options = 0, .most_keys = 64, .pace = 150},
     {.warpgroups = 1, .block_n = 64, .hold = true, .blocks = 2}},
    {{.widest = 96, .most_options = 0, .most_idle = 17, .least_keys = kLong},
     {.warpgroups = 3, .block_n = 96, .turns = true}},
    {{.narrowest = 128, .widest = 128, .most_options = 0, .most_idle = 10, .least_keys = kLong},
     {.warpgroups = 3, .block_n = 64, .stages = 4, .turns = true}},
    {{.widest = 128, .most_options = 0}, {.block_n = 128, .hold = true, .turns = true}},
    {{.widest = 192, .most_options = 0}, {.block_n = 80, .hold = true, .turns = true}},
    {{.narrowest = 200, .widest = 224, .most_options = 3, .mask = false, .dropout = false},
     {.block_n = 64, .q_stages = 1, .turns = true}},  // with 80 keys ptxas serialises products
    // With options.
    {{.widest = 64, .most_options = 3, .mask = false, .dropout = false, .least_keys = kLong},
     {.warpgroups = 3, .block_n = 128, .stages = 4, .turns = true}},
    {{.widest = 64, .most_options = 4, .mask = false, .dropout = false, .most_idle = 10},
     {.warpgroups = 4, .block_n = 64, .stages = 6, .turns = true}},
    {{.widest = 128, .most_options = 3, .dropout = false}, {.block_n = 128, .hold = true, .turns = true}},
    {{.widest = 128, .most_options = 4, .dropout = false}, {.block_n = 128, .turns = true}},
    {{.widest = 128, .most_options = 2}, {.block_n = 128}},
    {{.widest = 96, .most_options = 4}, {.block_n = 128, .turns = true}},
    {{.widest = 128, .most_options = 3}, {.block_n = 96}},
    {{.widest = 128, .most_options = 5, .mask = false}, {.block_n = 128}},
    {{.widest = 128, .most_options = 7}, {.block_n = 96}},
    {{.widest = 192, .most_options = 2, .dropout = false}, {.block_n = 96, .q_stages = 1, .turns = true}},
    {{.widest = 192, .most_options = 2}, {.block_n = 96, .q_stages = 1}},
    {{.widest = 256, .most_options = 2, .mask = false, .dropout = false},
     {.block_n = 80, .q_stages = 1, .turns = true}},
    {{.narrowest = 248, .widest = 256, .most_options = 3, .mask = false, .dropout = false},
     {.block_n = 80, .q_stages = 1, .turns = true}},
    {{.widest = 256, .most_options = 2, .dropout = false}, {.block_n = 64, .q_stages = 1, .turns = true}},
    {{.widest = 256, .most_options = 2}, {.block_n = 48, .q_stages = 1}},
    // With a bias.
    {{.widest = 64}, {.block_n = 128, .stages = 4, .turns = true}},
    {{.widest = 128, .most_options = 9}, {.block_n = 128, .hold = true, .turns = true}},
    {{.widest = 128, .most_options = 8}, {.block_n = 96, .hold = true, .turns = true}},
    {{.widest = 128, .mask = false}, {.block_n = 128}},
    {{.widest = 96}, {.block_n = 128, .turns = true}},
    {{.widest = 128}, {.block_n = 96, .turns = true}},
    {{.widest = 128}, {.block_n = 64}},
    // With one or not.
    {{.widest = 192, .mask = false}, {.block_n = 64, .turns = true}},
    {{.widest = 192, .most_options = 3}, {.block_n = 80, .q_stages = 1}},
    {{.widest = 192}, {.block_n = 64, .q_stages = 1, .turns = true}},
    {{.widest = 256, .mask = false, .dropout = false}, {.block_n = 64, .q_stages = 1, .turns = true}},
    {{.widest = 256, .most_options = 12}, {.block_n = 48, .q_stages = 1, .turns = true}},
    {{.widest = 256}, {.block_n = 32, .q_stages = 1, .turns = true}},
});

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

/// Shared memory of one of so many blocks of a multiprocessor, which keeps 1 KB for each.
int room_of_block(int blocks) { return (model_of(kSm90).shared_bytes + 1024) / blocks - 1024; }

std::int64_t group_of(const Problem& problem) { return problem.num_q_heads / problem.num_kv_heads; }

/// Tiles of rows, and the rows of warpgroups in them.
struct RowTiles {
  std::int64_t of_head, all, groups;

  [[nodiscard]] std::int64_t waves() const { return ceil_div(all, model_of(kSm90).multiprocessors); }
  /// In the time that a warpgroup's rows take a multiprocessor.  Few tiles have their keys shared out, and uneven ones
  /// end together.
  [[nodiscard]] double cost(bool even) const {
    const std::int64_t at_once = model_of(kSm90).multiprocessors;
    const std::int64_t filled = all < at_once || !even ? all : waves() * at_once;
    return static_cast<double>(groups) * static_cast<double>(filled) / static_cast<double>(at_once * all);
  }
};
RowTiles row_tiles(const Problem& problem, int block_m, std::int64_t packed_heads) {
  const auto packed = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(packed_heads)));
  const std::int64_t rows = problem.seqlen_q * packed, heads = problem.num_q_heads / packed_heads * problem.batch;
  return {ceil_div(rows, block_m), ceil_div(rows, block_m) * heads, ceil_div(rows, kGroupRows) * heads};
}

/// The work lost to the last, incomplete wave of tiles and to rows past a sequence's end, in percent of the rows.
std::int64_t idle(const Problem& problem, const ForwardSm90Shape& shape) {
  const std::int64_t rows = problem.seqlen_q * problem.num_q_heads * problem.batch, block = block_m(shape.spec);
  const std::int64_t waves = row_tiles(problem, block_m(shape.spec), shape.packed_heads).waves();
  return waves * model_of(kSm90).multiprocessors * block * 100 / std::max<std::int64_t>(1, rows) - 100;
}

/// The time that the busiest multiprocessor takes, of which a row takes `pace`: it runs `blocks` tiles at once, but of
/// those left over in the end no more than its share.
std::int64_t cost(const Problem& problem, const ForwardSm90Shape& shape, int pace) {
  const ForwardSm90Spec& spec = shape.spec;
  const std::int64_t tiles = row_tiles(problem, block_m(spec), shape.packed_heads).all,
                     at_once = model_of(kSm90).multiprocessors, full = tiles / (at_once * spec.blocks);
  return (full * spec.blocks + ceil_div(tiles - full * spec.blocks * at_once, at_once)) * block_m(spec) * pace;
}

/// Chooses how many heads share tiles of rows.  Slopes, biases and draws are made for rows of one head.
std::int64_t heads_to_pack(const Problem& problem, const ForwardSm90Spec& spec) {
  constexpr std::int64_t kMost = kWarpRows, kMostRows = std::int64_t{1} << 30;
  if (spec.bias || spec.alibi || spec.dropout || problem.seqlen_q > kMostRows / kMost) return 1;
  if (spec.softcap && std::max(spec.head_dim, spec.head_dim_v) > 192) return 1;  // for want of registers
  const bool even = see_alike(problem) || problem.seqlen_q * 4 <= problem.seqlen_kv;
  // Where nothing else tells: long rows gain, and those whose tiles of few keys then end nearer to the diagonal.
  constexpr std::int64_t kLongRows = 4096;
  const bool gains = problem.seqlen_kv >= kLongRows || (spec.block_n < 128 && !spec.mask && !see_alike(problem));
  const auto better = [&](const RowTiles& a, const RowTiles& b) {
    constexpr double kAlike = 1.01;
    const double cost = a.cost(even) / b.cost(even);
    if (cost > kAlike || cost * kAlike < 1) return cost < 1;
    if (a.groups != b.groups) return a.groups < b.groups;
    return a.all != b.all ? a.all < b.all : gains;
  };
  // Where tiles of one head keep most of the GPU busy, fewer ones would have their keys shared out.
  constexpr std::int64_t kFewRowsOfHead = 32;
  const std::int64_t alone = row_tiles(problem, block_m(spec), 1).all, at_once = model_of(kSm90).multiprocessors;
  if (alone < at_once && 2 * alone > at_once && problem.seqlen_q > kFewRowsOfHead) return 1;
  std::int64_t best = 1;
  for (std::int64_t heads = 2; heads <= std::min(kMost, group_of(problem)); ++heads) {
    if (group_of(problem) % heads != 0) continue;
    if (better(row_tiles(problem, block_m(spec), heads), row_tiles(problem, block_m(spec), best))) best = heads;
  }
  return best;
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

/// Into how many parts the keys of each tile of rows are cut, where these leave much of the GPU idle: as many as take
/// the least time, in microseconds measured on an H200 (docs/notes).
std::int64_t splits_of(const ForwardSm90Shape& shape, std::int64_t keys_of_row, std::int64_t row_floats) {
  constexpr double kEntries = 3.3e6, kFloats = 4e5, kOfBlock = 4.0, kOfCombining = 5.0;  // two rates, two times
  const ForwardSm90Spec& spec = shape.spec;
  const std::int64_t at_once = model_of(kSm90).multiprocessors, key_tiles = ceil_div(keys_of_row, spec.block_n);
  const double tile = block_m(spec) * spec.block_n * std::max(spec.head_dim + spec.head_dim_v, 160) / kEntries;
  const auto cost = [&](std::int64_t splits) {
    const auto waves = static_cast<double>(ceil_div(shape.tiles * splits, at_once));
    const double once = waves * (static_cast<double>(ceil_div(key_tiles, splits)) * tile + kOfBlock);
    return splits == 1 ? 0.95 * once : once + kOfCombining + static_cast<double>(row_floats * splits) / kFloats;
  };
  std::int64_t best = 1;
  for (std::int64_t splits = 2; splits <= std::min<std::int64_t>(kWarpSplits, key_tiles) && shape.tiles < at_once;
       ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return best;
}

/// Shares out the keys, unless rows are too many to be combined one by one.
void split_keys(const Problem& problem, std::int64_t keys_of_row, ForwardSm90Shape& shape) {
  ForwardSm90Spec& spec = shape.spec;
  const std::int64_t rows = problem.batch * problem.num_q_heads * problem.seqlen_q, part = spec.head_dim_v + kPartFacts;
  if (rows > std::numeric_limits<int>::max() - kMostSplits) return;
  shape.splits = splits_of(shape, keys_of_row, rows * part);
  spec.split = shape.splits > 1;
  if (spec.split) shape.partial_bytes = static_cast<std::size_t>(rows * shape.splits * part) * sizeof(float);
  shape.tiles *= shape.splits;
}

}  // namespace

bool has_few_rows(const Problem& problem, const ForwardSm90Shape& shape) {
  // Measured on an H200 (docs/notes).
  constexpr std::int64_t kDrawn = 16, kWithOptions = 32, kBare = 16, kMostTilesOfGroup = 4;
  const ForwardSm90Spec& spec = shape.spec;
  const std::int64_t group = group_of(problem), packed = shape.packed_heads;
  if (packed == 1 ? group > 1 : group > kMostTilesOfGroup * packed)
    return packs_heads(problem) && !(spec.dropout && problem.seqlen_q >= kDrawn);
  if (spec.bias || spec.alibi || spec.dropout) return problem.seqlen_q <= kWithOptions;
  const int widest = std::max(spec.head_dim, spec.head_dim_v);
  return problem.seqlen_q * group <= kBare && (group == 1 || widest <= 64 || widest > 128);
}

std::string name_of(const ForwardSm90Shape& shape) {
  const ForwardSm90Spec& s = shape.spec;
  std::string name = tile_text(block_m(s), s.block_n, s.stages) + ", " + std::to_string(s.q_stages) + " of rows";
  if (s.hold) name += ", P held";
  if (s.turns) name += ", in turns";
  if (s.blocks > 1) name += ", " + std::to_string(s.blocks) + " blocks";
  return name;
}

std::optional<ForwardSm90Shape> choose_forward_sm90(const Problem& problem, const GpuModel& gpu) {
  if (problem.dtype == DType::kFloat32 || problem.head_dim % 8 != 0 || problem.head_dim_v % 8 != 0) return std::nullopt;
  ForwardSm90Shape shape;
  ForwardSm90Spec& spec = shape.spec;
  spec.type = type_of(problem.dtype);
  const std::int64_t widest = std::max(problem.head_dim, problem.head_dim_v);
  spec.head_dim = static_cast<int>(problem.head_dim);
  spec.head_dim_v = static_cast<int>(problem.head_dim_v);
  take_options(problem, spec);

  const std::int64_t keys = most_keys_of_row(problem);
  const auto take = [&](const Row& row) {
    const auto& tile = row.tile;
    spec.warpgroups = tile.warpgroups, spec.block_n = tile.block_n;
    spec.stages = tile.stages, spec.q_stages = tile.q_stages, spec.blocks = tile.blocks;
    spec.hold = tile.hold, spec.turns = tile.turns;
    shape.packed_heads = heads_to_pack(problem, spec);
    spec.pack_gqa = shape.packed_heads > 1;
  };
  const auto fits = [&](const Row& row) {
    take(row);
    return widest <= row.serves.widest && shared_bytes(spec) <= room_of_block(spec.blocks);
  };
  const auto serves = [&](const Row& row) {
    const auto& serves = row.serves;
    return serves.narrowest <= widest && weight_of(spec) <= serves.most_options && (serves.mask || !spec.mask) &&
           (serves.dropout || !spec.dropout) &&
           (serves.least_keys <= keys || (spec.block_n <= 64 && is_narrow(problem, keys))) &&
           keys <= serves.most_keys && idle(problem, shape) <= serves.most_idle;
  };
  const Row* quickest = nullptr;
  std::int64_t least = 0;
  for (const Row& row : kTiles) {
    if (row.serves.pace == 0 || !fits(row) || !serves(row)) continue;
    const std::int64_t time = cost(problem, shape, row.serves.pace);
    if (quickest == nullptr || time < least) quickest = &row, least = time;
  }
  const auto suits = [&](const Row& row) { return serves(row) && (row.serves.pace == 0 || &row == quickest); };
  TileReader reader(gpu.choices, gpu.names, kHopperName, problem);
  const Row* row = reader.read(std::span<const Row>(kTiles), fits, suits, [&] { return name_of(shape); });
  if (row == nullptr) return std::nullopt;
  take(*row);
  shape.measured = reader.measured();
  const RowTiles tiles = row_tiles(problem, block_m(spec), shape.packed_heads);
  shape.row_blocks = tiles.of_head, shape.tiles = tiles.all;
  shape.batch_inside = problem.bias && !problem.bias->batch;
  shape.heads_abreast = heads_abreast_sm90(problem, keys);
  if (problem.packed()) shape.heads_abreast = std::min(shape.heads_abreast, problem.num_q_heads);  // of one sequence
  shape.heads_abreast = std::max<std::int64_t>(1, shape.heads_abreast / shape.packed_heads);
  split_keys(problem, keys, shape);
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
                      .min_blocks = spec.blocks,
                      .shared_bytes = shared_bytes(spec),
                      .text = products,
                      .arch_specific = true,
                      .early = true},
                     spec, kSm90);
}

}  // namespace fovea::cuda
