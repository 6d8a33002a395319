#include "cuda/backward_tuning.h"

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <string>

#include "cuda/backward_plan.h"
#include "cuda/packed_blocks.h"
#include "math/band.h"

namespace fovea::cuda {
namespace {

/// A row of the tables below: problems, and the tile that serves them.
struct Row {
  struct {
    int widest;                                  // head dim
    bool in_turns = true;                        // dq may be added up in turns
    int least_options = 0, most_options = kAny;  // see `weight_of`
    int most_keys = kAny;                        // with more others are faster
  } serves;
  struct {
    int block_m, block_n, warps = 8, stages = 1;  // see BackwardSpec
    int min_blocks = 1;                           // on a multiprocessor at once
    bool in_place = false;                        // operands are read where they lie
  } tile;
};

/// How many registers the options of a backward take, by a rough measure.
constexpr int kBias = 8, kSoftcap = 16;
int weight_of(const BackwardSpec& s) {
  return s.mask + 2 * s.dropout + 2 * s.alibi + kBias * s.bias + kSoftcap * s.softcap;
}

// Where shared memory has no room for four tiles of the widest rows.
constexpr Row kInPlace{{.widest = 512}, {.block_m = 32, .block_n = 16, .in_place = true}};

// Measured on an H100 (docs/notes).  dk and dv of a block fill half of its registers, P and dS a quarter; the first
// that fits the shared memory is taken.
constexpr auto kTiles16 = std::to_array<Row>({
    {{.widest = 64, .most_options = 0, .most_keys = 1024},
     {.block_m = 64, .block_n = 64, .warps = 4, .stages = 2, .min_blocks = 3}},
    {{.widest = 64, .most_options = 1}, {.block_m = 128, .block_n = 128, .stages = 2}},
    {{.widest = 64, .most_options = 2}, {.block_m = 64, .block_n = 64, .warps = 4, .stages = 2}},
    {{.widest = 64, .least_options = kBias, .most_options = 13}, {.block_m = 64, .block_n = 64, .warps = 4}},
    {{.widest = 64}, {.block_m = 64, .block_n = 128, .stages = 3}},
    {{.widest = 64}, {.block_m = 64, .block_n = 64, .stages = 2}},
    {{.widest = 64}, {.block_m = 64, .block_n = 64}},
    {{.widest = 80, .most_options = 4}, {.block_m = 64, .block_n = 128, .stages = 3}},
    {{.widest = 80, .most_options = 4}, {.block_m = 64, .block_n = 128, .stages = 2}},
    {{.widest = 96, .most_options = 0}, {.block_m = 64, .block_n = 64, .warps = 4, .stages = 2}},
    {{.widest = 128, .most_options = 4}, {.block_m = 64, .block_n = 128, .stages = 3}},
    {{.widest = 128, .most_options = 5}, {.block_m = 64, .block_n = 128, .stages = 2}},
    {{.widest = 128, .most_options = 1}, {.block_m = 64, .block_n = 64, .warps = 4}},
    {{.widest = 128, .least_options = kBias, .most_options = 13}, {.block_m = 64, .block_n = 128, .stages = 2}},
    {{.widest = 128, .least_options = kBias, .most_options = 13}, {.block_m = 64, .block_n = 64, .warps = 4}},
    {{.widest = 96, .least_options = kSoftcap, .most_options = kSoftcap}, {.block_m = 64, .block_n = 64, .warps = 4}},
    {{.widest = 128, .least_options = kSoftcap, .most_options = kSoftcap},
     {.block_m = 64, .block_n = 128, .stages = 3}},
    {{.widest = 128}, {.block_m = 32, .block_n = 128, .stages = 3}},
    {{.widest = 128}, {.block_m = 32, .block_n = 128, .stages = 2}},
    {{.widest = 128}, {.block_m = 32, .block_n = 64, .warps = 4, .stages = 2}},
    {{.widest = 128}, {.block_m = 32, .block_n = 64, .warps = 4}},
    {{.widest = 160, .most_options = 0}, {.block_m = 64, .block_n = 128, .stages = 2}},
    {{.widest = 160}, {.block_m = 64, .block_n = 64, .stages = 2}},
    {{.widest = 192}, {.block_m = 64, .block_n = 96, .stages = 2}},
    {{.widest = 224, .in_turns = false, .most_options = 1}, {.block_m = 96, .block_n = 64}},
    {{.widest = 256, .in_turns = false, .most_options = 1}, {.block_m = 128, .block_n = 64}},
    {{.widest = 256}, {.block_m = 64, .block_n = 64}},
    {{.widest = 256}, {.block_m = 32, .block_n = 64, .stages = 2}},
    {{.widest = 256}, {.block_m = 32, .block_n = 64}},
    {{.widest = 256}, {.block_m = 32, .block_n = 32}},
    {{.widest = 256}, {.block_m = 16, .block_n = 32, .warps = 4}},
    {{.widest = 512, .most_options = 0}, {.block_m = 32, .block_n = 32}},
    {{.widest = 512}, {.block_m = 16, .block_n = 32}},
    {{.widest = 512}, {.block_m = 16, .block_n = 16}},
    kInPlace,
});
constexpr auto kTiles32 = std::to_array<Row>({
    {{.widest = 64, .most_options = 3}, {.block_m = 64, .block_n = 64, .warps = 4}},
    {{.widest = 64}, {.block_m = 64, .block_n = 64, .stages = 2}},
    {{.widest = 64}, {.block_m = 64, .block_n = 64}},
    {{.widest = 64}, {.block_m = 32, .block_n = 64}},
    {{.widest = 96, .most_options = 0}, {.block_m = 32, .block_n = 64, .warps = 4}},
    {{.widest = 128}, {.block_m = 32, .block_n = 32, .warps = 4}},
    {{.widest = 128}, {.block_m = 32, .block_n = 64}},
    {{.widest = 128}, {.block_m = 16, .block_n = 32, .warps = 4}},
    {{.widest = 256}, {.block_m = 32, .block_n = 32}},
    {{.widest = 256}, {.block_m = 16, .block_n = 16}},
    {{.widest = 512, .most_options = 0}, {.block_m = 16, .block_n = 32}},
    {{.widest = 512}, {.block_m = 16, .block_n = 16}},
    {{.widest = 384}, {.block_m = 16, .block_n = 16, .warps = 2}},  // 352 columns, which more warps cannot share
    kInPlace,
});
// Without a unit for products, short code matters more than reuse.
constexpr auto kTilesByShuffles = std::to_array<Row>({
    {{.widest = 512}, {.block_m = 32, .block_n = 32, .warps = 4}},
    {{.widest = 512}, {.block_m = 16, .block_n = 32}},
    {{.widest = 512}, {.block_m = 16, .block_n = 16}},
    kInPlace,
});

std::span<const Row> table_of(const BackwardSpec& spec) {
  if (spec.mma == Mma::kShuffles) return kTilesByShuffles;
  if (spec.type == Type::kFloat32) return kTiles32;
  return kTiles16;
}

constexpr std::int64_t kTurnsOfParts = 2;  // times the blocks that run at once, so that unequal parts even out
constexpr std::int64_t kLeastSteps = 2;    // of a part, which costs about one step itself
constexpr std::int64_t kMostSteps = std::int64_t{1} << 31;

/// Columns rounded up to whole products, above 128 to pairs of them, which warps can share out in more ways; further so
/// that half of the warps have a share of 16 rows, or all where columns take no shared memory.
int whole_products(std::int64_t dim, int warps, bool in_place = false) {
  auto columns = static_cast<int>(round_up(dim, dim <= 128 ? 16 : in_place ? 128 : 32));
  while (columns > 256 && WarpGrid::of(16, columns, warps).used < warps / 2) columns += 32;
  return columns;
}

/// The largest divisor of `of` up to `most`; 1 where `most` is less.
int largest_divisor(std::int64_t of, std::int64_t most) {
  std::int64_t divisor = std::max<std::int64_t>(std::min(of, most), 1);
  while (of % divisor != 0) --divisor;
  return static_cast<int>(divisor);
}

/// Blocks of the bias gradient that a GPU runs at once.  Threads with up to 16 entries of a tile need 128 registers.
std::int64_t bias_blocks_at_once(const BackwardSpec& s, const GpuModel& gpu) {
  constexpr int kRegisters = 65536, kFewEntries = 16;
  const int threads = s.warps * 32, registers = s.block_m * s.block_n / threads <= kFewEntries ? 128 : 256;
  const int by_shared = (gpu.shared_bytes + 1024) / (bias_gradient_shared_bytes(s) + 1024);
  return std::int64_t{gpu.multiprocessors} * std::max(std::min(kRegisters / (threads * registers), by_shared), 1);
}

jit::KernelRequest side_request(std::string_view function, std::string_view header, const BackwardSpec& spec,
                                int arch) {
  return jit::render({.function = function,
                      .header = header,
                      .spec = "BackwardSpec",
                      .params = "BackwardParams",
                      .threads = kSideThreads,
                      .min_blocks = kSideBlocks,
                      .early = true},
                     spec, arch);
}

/// A spec without options: the kernels around the main one do not depend on them, so that one serves many specs.
BackwardSpec plain(BackwardSpec spec) {
  spec.band = spec.mask = spec.bias = spec.alibi = spec.softcap = spec.dropout = spec.split_gqa = spec.goes_on = false;
  spec.bias_type = BackwardSpec{}.bias_type;
  return spec;
}

}  // namespace

BackwardSpec backward_spec(const Problem& problem, int sm) {
  BackwardSpec spec;
  spec.type = type_of(problem.dtype);
  spec.mma = mma_of(problem, sm);
  spec.async_copy = sm >= 80;
  spec.head_dim = whole_products(problem.head_dim, spec.warps);
  spec.head_dim_v = whole_products(problem.head_dim_v, spec.warps);
  spec.deterministic = problem.deterministic;
  spec.band = math::BandRule::of(problem).bounded();
  take_options(problem, spec);
  return spec;
}

std::optional<BackwardShape> choose_backward(const Problem& given, const GpuModel& gpu) {
  BackwardShape shape;
  BackwardSpec& spec = shape.spec;
  spec = backward_spec(given, gpu.sm);
  const Problem problem = split_groups(given, gpu.multiprocessors, shape);
  const int widest = std::max(spec.head_dim, spec.head_dim_v);
  const auto take = [&](const Row& row) {
    const auto& tile = row.tile;
    spec.block_m = tile.block_m, spec.block_n = tile.block_n, spec.warps = tile.warps, spec.stages = tile.stages;
    spec.in_place = tile.in_place;
    spec.head_dim = whole_products(problem.head_dim, tile.warps, tile.in_place);
    spec.head_dim_v = whole_products(problem.head_dim_v, tile.warps, tile.in_place);
    shape.min_blocks = tile.min_blocks;
  };
  bool has_tile = false;  // with operands in shared memory; the others are for where there is none
  const auto fits = [&](const Row& row) {
    take(row);
    const bool it_fits = row.serves.widest >= widest && shared_bytes(spec) <= shared_room(gpu, shape.min_blocks) &&
                         (row.serves.in_turns || !spec.deterministic) && (spec.async_copy || spec.stages == 1) &&
                         !(spec.in_place && has_tile);
    has_tile |= it_fits;
    return it_fits;
  };
  const auto suits = [&](const Row& row) {
    const int weight = weight_of(spec);
    return row.serves.least_options <= weight && weight <= row.serves.most_options &&
           problem.seqlen_kv <= row.serves.most_keys;
  };
  TileReader reader(gpu.choices, gpu.names, kPortableName, given);
  const Row* row = reader.read(table_of(spec), fits, suits, [&] { return name_of(shape); });
  if (row == nullptr) return std::nullopt;
  take(*row);
  shape.measured = reader.measured();

  cut_up(problem, shape);
  if (spec.band && !spec.deterministic && shape.key_blocks > 0)
    shape.heads_abreast = kv_heads_abreast(shape, std::int64_t{2} * gpu.multiprocessors / shape.key_blocks);
  share_out(problem, gpu, shape);
  return shape;
}

std::string name_of(const BackwardShape& shape) {
  const BackwardSpec& s = shape.spec;
  std::string name = tile_text(s.block_m, s.block_n, s.stages) + ", " + std::to_string(s.warps) + " warps";
  if (shape.min_blocks > 1) name += ", " + std::to_string(shape.min_blocks) + " blocks";
  if (s.holds_dq) name += ", dq held";
  if (s.in_place) name += ", operands in place";
  return name;
}

int kv_heads_abreast(const BackwardShape& shape, std::int64_t most) { return largest_divisor(shape.turns, most); }

Problem split_groups(const Problem& problem, std::int64_t at_once, BackwardShape& shape) {
  // Microseconds of a tile of 64 rows and 128 keys, of a block's begin and end, of adding parts up, and a rate of that,
  // measured on an H200 (docs/notes).
  constexpr double kTile = 1.5, kEnds = 4.0, kAdding = 5.0, kRate = 3e6, kWorthwhile = 0.95;
  constexpr std::int64_t kRows = 64, kKeys = 128, kSamples = 64;
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads,
                     columns = problem.head_dim + problem.head_dim_v;
  const std::int64_t keys = problem.packed() ? problem.total_kv : problem.batch * problem.seqlen_kv,
                     key_blocks = ceil_div(problem.seqlen_kv, kKeys);
  if (group == 1 || key_blocks == 0) return problem;
  const auto band = math::Band::of(math::BandRule::of(problem), problem.seqlen_q, problem.seqlen_kv);
  std::int64_t longest = 0, all = 0, samples = 0;  // tiles of rows that see a block of keys
  for (std::int64_t block = 0; block < key_blocks; block += ceil_div(key_blocks, kSamples), ++samples) {
    const auto rows = band.rows_of_keys({block * kKeys, (block + 1) * kKeys});
    const std::int64_t tiles = rows.empty() ? 0 : ceil_div(rows.end - rows.begin, kRows);
    longest = std::max(longest, tiles), all += tiles;
  }
  const double tile = kTile * std::max<double>(static_cast<double>(columns) / 256.0, 0.5);
  const auto cost = [&](std::int64_t parts) {
    const auto heads = static_cast<double>(group) / static_cast<double>(parts);
    const double most = static_cast<double>(longest) * heads * tile + kEnds,
                 mean = static_cast<double>(all) / static_cast<double>(samples) * heads * tile + kEnds;
    const std::int64_t blocks = ceil_div(keys, kKeys) * problem.num_kv_heads * parts;
    const double bytes = 8.0 * static_cast<double>(keys * problem.num_kv_heads) * static_cast<double>(parts * columns),
                 added = parts == 1 ? 0.0 : kAdding + bytes / kRate;  // written and read as fp32
    if (see_alike(problem)) return static_cast<double>(ceil_div(blocks, at_once)) * most + added;
    return std::max(most, static_cast<double>(blocks) / static_cast<double>(at_once) * mean + mean / 2) + added;
  };
  std::int64_t best = 1;
  for (std::int64_t parts = 2; parts <= group; ++parts) {
    if (group % parts == 0 && cost(parts) < (best == 1 ? kWorthwhile : 1.0) * cost(best)) best = parts;
  }
  shape.group_parts = static_cast<int>(best);
  shape.spec.split_gqa = best > 1;
  Problem split = problem;
  split.num_kv_heads *= best;
  return split;
}

void cut_up(const Problem& problem, BackwardShape& shape) {
  const BackwardSpec& spec = shape.spec;
  const std::int64_t batch = problem.batch, heads = problem.num_q_heads;
  shape.row_blocks = static_cast<int>(ceil_div(problem.seqlen_q, spec.block_m));
  shape.key_blocks = static_cast<int>(ceil_div(problem.seqlen_kv, spec.block_n));
  const std::int64_t slots =
      problem.packed() ? packed_slots<std::int64_t>(problem.total_q, spec.block_m, batch) : batch * shape.row_blocks;
  const bool share_lines = problem.packed() && !spec.holds_dq;
  const std::int64_t key_lines = spec.holds_dq ? 1
                                 : share_lines ? packed_slots<std::int64_t>(problem.total_kv, spec.block_n, batch)
                                               : shape.key_blocks,
                     turns = problem.num_kv_heads * (share_lines ? 1 : batch);
  shape.most_blocks = std::max(slots * heads, key_lines * turns);
  shape.row_slots = static_cast<int>(slots);
  shape.key_lines = static_cast<int>(key_lines), shape.turns = static_cast<int>(turns);
}

BiasParts bias_parts(const Problem& problem, const BackwardSpec& spec, const GpuModel& gpu) {
  if (!problem.bias) return {};
  const auto& own = *problem.bias;
  const BackwardSpec cut = bias_gradient_spec(spec);
  std::int64_t tiles = 1, steps = 1;
  const auto count = [&](bool is_own, std::int64_t many) {
    std::int64_t& all = is_own ? tiles : steps;
    all = std::min(all * many, kMostSteps);
  };
  count(own.batch, problem.batch), count(own.heads, problem.num_q_heads);
  count(own.queries, ceil_div(problem.seqlen_q, cut.block_m));
  count(own.keys, ceil_div(problem.seqlen_kv, cut.block_n));
  const std::int64_t at_once = bias_blocks_at_once(cut, gpu);
  if (tiles == 0 || tiles >= at_once) return {};
  const std::int64_t parts = std::min(steps / kLeastSteps, kTurnsOfParts * at_once / tiles);
  if (parts <= 1) return {};
  return {static_cast<int>(parts), parts * tiles * bias_entries(cut, own.queries, own.keys)};
}

void share_out(const Problem& problem, const GpuModel& gpu, BackwardShape& shape) {
  // Backends refuse so many blocks, whose workspace 64 bits need not count.
  if (shape.most_blocks > std::numeric_limits<int>::max()) return;
  const BackwardSpec& spec = shape.spec;
  const std::int64_t batch = problem.batch, heads = problem.num_q_heads, slots = shape.row_slots,
                     tiles = spec.ends_dq    ? shape.dq_places * heads / problem.num_kv_heads * shape.row_blocks
                             : spec.holds_dq ? 0
                                             : heads * slots;
  const auto take = [&shape](std::int64_t words) {
    const std::size_t at = shape.workspace_bytes;
    shape.workspace_bytes += static_cast<std::size_t>(round_up(words * 4, 128));
    return at;
  };
  shape.log2_lse = take(heads * slots * spec.block_m);
  shape.delta = take(heads * slots * spec.block_m);
  shape.dq_sum = take(tiles * spec.block_m * spec.head_dim);
  shape.tickets = take(spec.deterministic ? heads * slots : 0);
  shape.begun = take(spec.deterministic || spec.ends_dq ? 1 : 0);
  shape.added = take(spec.ends_dq ? batch * problem.num_kv_heads : 0);
  shape.sink_parts = take(problem.sink ? heads * slots : 0);
  shape.slope_parts = take(spec.alibi ? batch * heads * shape.key_blocks * spec.warps : 0);
  const BiasParts bias = bias_parts(problem, spec, gpu);
  shape.bias_parts = bias.parts;
  shape.bias_sums = take(bias.words);
  const std::int64_t keys = problem.packed() ? problem.total_kv : batch * problem.seqlen_kv;
  const auto part = [&](std::int64_t dim) {
    return take(spec.split_gqa ? keys * problem.num_kv_heads * round_up(dim, kPartColumns) : 0);
  };
  shape.dk_parts = part(problem.head_dim), shape.dv_parts = part(problem.head_dim_v);
}

jit::KernelRequest backward_rows_request(const BackwardShape& shape, int arch) {
  return side_request("backward_rows", "cuda/kernels/backward_rows.cuh", plain(shape.spec), arch);
}
jit::KernelRequest backward_queries_request(const BackwardShape& shape, int arch) {
  return side_request("backward_queries", "cuda/kernels/backward_queries.cuh", plain(shape.spec), arch);
}
jit::KernelRequest group_sums_request(const BackwardShape& shape, int arch) {
  return side_request("group_sums", "cuda/kernels/group_sums.cuh", BackwardSpec{.type = shape.spec.type}, arch);
}
jit::KernelRequest backward_sums_request(const BackwardShape& shape, int arch) {
  return side_request("backward_sums", "cuda/kernels/sums.cuh", plain(shape.spec), arch);
}
jit::KernelRequest backward_request(const BackwardShape& shape, int arch) {
  return jit::render({.function = "backward",
                      .header = "cuda/kernels/backward.cuh",
                      .spec = "BackwardSpec",
                      .params = "BackwardParams",
                      .threads = shape.spec.warps * 32,
                      .min_blocks = shape.min_blocks,
                      .shared_bytes = shared_bytes(shape.spec)},
                     shape.spec, arch);
}
jit::KernelRequest bias_gradient_request(const BackwardShape& shape, int arch) {
  const BackwardSpec spec = bias_gradient_spec(shape.spec);
  return jit::render({.function = "bias_gradient",
                      .header = "cuda/kernels/bias_gradient.cuh",
                      .spec = "BackwardSpec",
                      .params = "BackwardParams",
                      .threads = spec.warps * 32,
                      .shared_bytes = bias_gradient_shared_bytes(spec)},
                     spec, arch);
}
jit::KernelRequest bias_sums_request(const BackwardShape& shape, int arch) {
  BackwardSpec spec = plain(bias_gradient_spec(shape.spec));
  spec.bias_type = shape.spec.bias_type;
  return side_request("bias_sums", "cuda/kernels/bias_gradient.cuh", spec, arch);
}

}  // namespace fovea::cuda
