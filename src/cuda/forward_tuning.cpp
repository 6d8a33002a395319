#include "cuda/forward_tuning.h"

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <string>

#include "cuda/packed_blocks.h"
#include "cuda/params.h"
#include "math/band.h"

namespace fovea::cuda {
namespace {

// Columns of O that a block's registers hold; fp32 keeps sums of tiles beside it.
constexpr std::int64_t widest_v(Type type) { return type == Type::kFloat32 ? 128 : 256; }

/// A row of the tables below: problems, and the tile that serves them.
struct Row {
  struct {
    int widest;                                  // head dim
    int least_options = 0, most_options = kAny;  // see `weight_of`
    int least_keys = 0;                          // with fewer the tile's start costs more than it saves
    int most_rows = kAny;
    std::optional<bool> band{};
  } serves;
  struct {
    int block_m, block_n, warps = 4, across = 1, slices = 1, stages = 2;  // see ForwardSpec
    int min_blocks = 1;                                                   // on a multiprocessor at once
    bool spread = false, swizzled = false, halved_q = false;              // spread: copies are
    bool in_place = false;                                                // Q is read where it lies
  } tile;
};

/// How many registers the options of a forward take, by a rough measure.
int weight_of(const ForwardSpec& s) { return s.mask + 2 * s.dropout + 4 * s.alibi + 4 * s.bias + 16 * s.softcap; }

// Few rows and many keys are bound by memory alone.  Slices of a block share out the keys and wait for nobody, so that
// copies to all of shared memory are always in flight.  With 64 rows the work of options would show.
constexpr Row sliced(Row row) {
  row.serves.most_rows = row.tile.block_m, row.serves.least_keys = 4 * row.tile.slices * row.tile.block_n;
  if (row.tile.block_m > 32) row.serves.most_options = 0;
  row.tile.swizzled = true;
  return row;
}

// Measured on an H100 (docs/notes): 32 rows a warp, so that an operand of K or V serves two pieces of rows, as long as
// O leaves room for S, or as warps share them; then two blocks a multiprocessor, whose phases overlap, or one with many
// keys at a time.  Copies to rows that are not swizzled cross lines of 128 bytes, and are 5 requests to L2 a row of
// head dim 128 instead of 2; where swizzled rows lie is more to work out.  The first that fits is taken.
constexpr auto kTiles16 = std::to_array<Row>({
    // Few rows.
    sliced({{.widest = 64}, {.block_m = 16, .block_n = 32, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 16, .block_n = 32, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 32, .block_n = 32, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 32, .block_n = 32, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 64, .block_n = 32, .warps = 2, .slices = 2, .stages = 4, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 64, .block_n = 32, .warps = 2, .slices = 2, .stages = 2, .min_blocks = 2}}),
    sliced({{.widest = 128}, {.block_m = 16, .block_n = 32, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 1}}),
    sliced({{.widest = 128}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 2}}),
    sliced({{.widest = 128}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 2}}),
    sliced({{.widest = 128}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 128}, {.block_m = 32, .block_n = 16, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 2}}),
    sliced({{.widest = 128}, {.block_m = 32, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 2}}),
    sliced({{.widest = 128}, {.block_m = 32, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 256}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 1}}),
    sliced({{.widest = 256}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 256}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 2, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 256}, {.block_m = 32, .block_n = 16, .warps = 2, .slices = 4, .stages = 3, .min_blocks = 1}}),
    sliced({{.widest = 256}, {.block_m = 32, .block_n = 16, .warps = 2, .slices = 2, .stages = 3, .min_blocks = 1}}),
    sliced({{.widest = 256}, {.block_m = 64, .block_n = 16, .warps = 4, .slices = 2, .stages = 4, .min_blocks = 1}}),
    sliced({{.widest = 512}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 512}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 2, .stages = 2, .min_blocks = 1}}),
    // Without options.
    {{.widest = 64, .most_options = 0, .least_keys = 2048, .band = false},
     {.block_m = 128, .block_n = 128, .stages = 1, .min_blocks = 2, .swizzled = true}},
    {{.widest = 64, .most_options = 0, .least_keys = 2048},
     {.block_m = 128, .block_n = 128, .stages = 1, .min_blocks = 2}},
    {{.widest = 64, .most_options = 0, .band = false}, {.block_m = 128, .block_n = 64, .min_blocks = 3}},
    {{.widest = 64, .most_options = 0, .band = true}, {.block_m = 64, .block_n = 64, .min_blocks = 4}},
    {{.widest = 80, .most_options = 0}, {.block_m = 128, .block_n = 96, .min_blocks = 2, .spread = true}},
    {{.widest = 96, .most_options = 0},
     {.block_m = 128, .block_n = 96, .stages = 1, .min_blocks = 2, .swizzled = true}},
    {{.widest = 128, .most_options = 0}, {.block_m = 128, .block_n = 64, .min_blocks = 2, .swizzled = true}},
    {{.widest = 128, .most_options = 0},
     {.block_m = 64, .block_n = 64, .stages = 1, .min_blocks = 2, .swizzled = true}},
    {{.widest = 192, .most_options = 0}, {.block_m = 128, .block_n = 96, .warps = 8, .spread = true, .swizzled = true}},
    {{.widest = 256, .most_options = 0},
     {.block_m = 128, .block_n = 64, .warps = 8, .across = 2, .spread = true, .swizzled = true}},
    {{.widest = 256, .most_options = 0},
     {.block_m = 64, .block_n = 64, .across = 2, .stages = 1, .min_blocks = 2, .swizzled = true}},
    {{.widest = 256, .most_options = 0}, {.block_m = 128, .block_n = 64, .warps = 8, .stages = 1, .swizzled = true}},
    // With options.
    {{.widest = 64, .most_options = 4}, {.block_m = 128, .block_n = 64, .min_blocks = 2}},
    {{.widest = 64, .most_options = 15}, {.block_m = 128, .block_n = 32, .min_blocks = 2}},
    {{.widest = 64, .most_options = 19}, {.block_m = 128, .block_n = 64, .min_blocks = 2}},
    {{.widest = 64}, {.block_m = 128, .block_n = 32, .min_blocks = 2}},
    {{.widest = 128, .most_options = 1}, {.block_m = 128, .block_n = 64, .min_blocks = 2}},
    {{.widest = 128, .most_options = 3}, {.block_m = 128, .block_n = 48, .min_blocks = 2}},
    {{.widest = 128, .most_options = 3}, {.block_m = 128, .block_n = 48, .stages = 1, .min_blocks = 2}},
    {{.widest = 128, .least_options = 5, .most_options = 7},
     {.block_m = 64, .block_n = 128, .stages = 1, .min_blocks = 2, .spread = true}},
    {{.widest = 128, .most_options = 18}, {.block_m = 128, .block_n = 32, .min_blocks = 2, .spread = true}},
    {{.widest = 128}, {.block_m = 64, .block_n = 32, .min_blocks = 2}},
    {{.widest = 192}, {.block_m = 128, .block_n = 96, .warps = 8, .spread = true}},
    {{.widest = 192}, {.block_m = 64, .block_n = 64, .stages = 1, .min_blocks = 2}},
    {{.widest = 256, .most_options = 3}, {.block_m = 128, .block_n = 64, .warps = 8, .across = 2, .spread = true}},
    {{.widest = 256, .most_options = 5}, {.block_m = 64, .block_n = 64, .across = 2, .stages = 1, .min_blocks = 2}},
    {{.widest = 256, .most_options = 10}, {.block_m = 128, .block_n = 64, .warps = 8, .stages = 1}},
    {{.widest = 256, .most_options = 17}, {.block_m = 64, .block_n = 64, .across = 2, .stages = 1, .min_blocks = 2}},
    {{.widest = 256}, {.block_m = 64, .block_n = 32, .min_blocks = 2}},
    {{.widest = 256}, {.block_m = 64, .block_n = 32, .stages = 1, .min_blocks = 2}},
    {{.widest = 512}, {.block_m = 64, .block_n = 32, .stages = 1}},
    {{.widest = 512}, {.block_m = 32, .block_n = 32, .warps = 2, .stages = 1}},
    {{.widest = 512}, {.block_m = 16, .block_n = 16, .warps = 1, .stages = 1}},
});
constexpr auto kTiles32 = std::to_array<Row>({
    // Few rows.
    sliced({{.widest = 64}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 2}}),
    sliced({{.widest = 64}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 128}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 3, .min_blocks = 1}}),
    sliced({{.widest = 128}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 4, .stages = 2, .min_blocks = 1}}),
    sliced({{.widest = 512}, {.block_m = 16, .block_n = 16, .warps = 1, .slices = 2, .stages = 2, .min_blocks = 1}}),
    // Others.
    {{.widest = 64, .most_options = 6}, {.block_m = 128, .block_n = 32, .min_blocks = 2, .halved_q = true}},
    {{.widest = 64, .most_options = 6}, {.block_m = 128, .block_n = 32, .min_blocks = 2}},
    {{.widest = 128, .most_options = 0, .band = false}, {.block_m = 128, .block_n = 16, .min_blocks = 2}},
    {{.widest = 128}, {.block_m = 64, .block_n = 32}},
    {{.widest = 256, .most_options = 0, .band = false}, {.block_m = 64, .block_n = 16, .stages = 1}},
    {{.widest = 256, .most_options = 0}, {.block_m = 64, .block_n = 32, .stages = 1}},
    {{.widest = 512}, {.block_m = 64, .block_n = 16, .stages = 1}},
    {{.widest = 512}, {.block_m = 32, .block_n = 16, .warps = 2, .stages = 1}},
    {{.widest = 512}, {.block_m = 16, .block_n = 16, .warps = 1, .stages = 1}},
});

// Without a unit for products, short code matters more than reuse.
constexpr auto kTilesByShuffles = std::to_array<Row>({
    {{.widest = 256}, {.block_m = 64, .block_n = 16, .stages = 1}},
    {{.widest = 512}, {.block_m = 16, .block_n = 16, .warps = 1, .stages = 1}},
    {{.widest = 512}, {.block_m = 32, .block_n = 16, .warps = 2, .stages = 1, .in_place = true}},
});

std::span<const Row> table_of(const ForwardSpec& spec) {
  if (spec.mma == Mma::kShuffles) return kTilesByShuffles;
  if (spec.type == Type::kFloat32) return kTiles32;
  return kTiles16;
}

/// A large GPU of each compute capability, and of those up to the next.
constexpr int kKiB = 1024, kMiB = 1024 * kKiB;
constexpr auto kModels = std::to_array<GpuModel>({
    {.sm = 75, .multiprocessors = 72, .shared_bytes = 64 * kKiB, .l2_bytes = 4 * kMiB},
    {.sm = 80, .multiprocessors = 108, .shared_bytes = 163 * kKiB, .l2_bytes = 40 * kMiB},
    {.sm = 86, .multiprocessors = 84, .shared_bytes = 99 * kKiB, .l2_bytes = 6 * kMiB},
    {.sm = 87, .multiprocessors = 84, .shared_bytes = 163 * kKiB, .l2_bytes = 6 * kMiB},
    {.sm = 89, .multiprocessors = 142, .shared_bytes = 99 * kKiB, .l2_bytes = 72 * kMiB},
    {.sm = 90, .multiprocessors = 132, .shared_bytes = 227 * kKiB, .l2_bytes = 50 * kMiB},
    {.sm = 100, .multiprocessors = 148, .shared_bytes = 227 * kKiB, .l2_bytes = 126 * kMiB},
    {.sm = 120, .multiprocessors = 148, .shared_bytes = 99 * kKiB, .l2_bytes = 96 * kMiB},
});

/// Into how many parts, at most `most`, to split the keys of each of `blocks` blocks, of which `slots` run at a time.
/// A block's start and end take as long as two steps of keys, and combining the parts one and a half.
std::int64_t choose_splits(std::int64_t blocks, std::int64_t steps, std::int64_t slots, std::int64_t most) {
  std::int64_t best = 1, least = 0;
  for (std::int64_t splits = 1; splits <= std::clamp<std::int64_t>(most, 1, kMostSplits); ++splits) {
    const std::int64_t turns = ceil_div(blocks * splits, slots);
    const std::int64_t cost = 2 * turns * (ceil_div(steps, splits) + 2) + (splits > 1 ? 3 : 0);
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return best;
}

constexpr std::int64_t kManyRows = 1024;  // that warps combine: fewer are blocks enough for the GPU

/// Splits the keys of `blocks` blocks of rows where these are too few for the GPU.
void split_keys(const Problem& problem, const GpuModel& gpu, std::int64_t blocks, ForwardShape& shape) {
  ForwardSpec& spec = shape.spec;
  const std::int64_t step = std::int64_t{spec.block_n} * spec.slices, steps = ceil_div(problem.seqlen_kv, step);
  // A sliced block keeps enough copies in flight for a multiprocessor of its own; of others all that fit run at once.
  const std::int64_t slots = gpu.multiprocessors * (spec.slices > 1 ? 1 : shape.min_blocks);
  const std::int64_t rows = problem.batch * problem.num_q_heads * problem.seqlen_q;  // to be combined
  shape.by_warps = rows >= kManyRows;
  const std::int64_t most = std::min<std::int64_t>(
      shape.by_warps ? kWarpSplits : kMostSplits,
      spec.slices > 1 ? steps / 2 : std::min(slots / std::max<std::int64_t>(1, blocks), steps / 4));
  const std::int64_t splits =
      rows > std::numeric_limits<int>::max() - kMostSplits ? 1 : choose_splits(blocks, steps, slots, most);
  shape.keys_per_split = static_cast<int>(std::max<std::int64_t>(1, ceil_div(steps, splits)) * step);
  shape.splits = static_cast<int>(std::max<std::int64_t>(1, ceil_div(problem.seqlen_kv, shape.keys_per_split)));
  spec.split = shape.splits > 1;
  if (!spec.split) return;
  const std::int64_t floats = rows * shape.v_chunks * shape.splits * (spec.head_dim_v + kPartFacts);
  shape.partial_bytes = static_cast<std::size_t>(floats) * sizeof(float);
}

}  // namespace

GpuModel model_of(int compute_capability) {
  const auto above = std::ranges::upper_bound(kModels, compute_capability, {}, &GpuModel::sm);
  GpuModel model = above == kModels.begin() ? kModels.front() : above[-1];
  model.sm = compute_capability;
  return model;
}

int shared_room(const GpuModel& gpu, int blocks) {
  // Each takes 1 KiB more than it asks for, which is in what one may have at most.
  return (gpu.shared_bytes + 1024) / blocks - 1024;
}

bool see_alike(const Problem& problem) {
  return !math::BandRule::of(problem).bounded() && !problem.q_lengths.present && !problem.kv_lengths.present &&
         !problem.packed();
}

std::int64_t heads_in_l2(const Problem& problem, const GpuModel& gpu) {
  const std::int64_t keys = problem.seqlen_kv, group = problem.num_q_heads / problem.num_kv_heads;
  // Measured on an H100, whose L2 has 50 MiB.
  const std::int64_t room = gpu.l2_bytes / 50 * (keys <= 512 ? 8 : keys < 16384 ? 16 : 64);
  const std::int64_t head_bytes = keys * (problem.head_dim + problem.head_dim_v) * size_bytes(problem.dtype);
  const std::int64_t heads = std::max<std::int64_t>(1, room / std::max<std::int64_t>(1, head_bytes)) * group;
  return std::clamp<std::int64_t>(heads, 1, std::max<std::int64_t>(1, problem.num_q_heads * problem.batch));
}

std::int64_t heads_abreast(const Problem& problem, const GpuModel& gpu) {
  return see_alike(problem) ? 1 : heads_in_l2(problem, gpu);
}

bool packs_heads(const Problem& problem) {
  constexpr std::int64_t kShort = 32;  // rows, a quarter of a block
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  return group > 1 && (problem.seqlen_q * group <= kFewRows || problem.seqlen_q <= kShort);
}

Type type_of(DType dtype) {
  if (dtype == DType::kFloat16) return Type::kFloat16;
  return dtype == DType::kBFloat16 ? Type::kBFloat16 : Type::kFloat32;
}

Mma mma_of(const Problem& problem, int sm) {
  if (sm < 80) return problem.dtype == DType::kFloat16 ? Mma::kHalf8 : Mma::kShuffles;
  if (problem.dtype != DType::kFloat32) return Mma::kHalf16;
  return std::min(problem.head_dim, problem.head_dim_v) <= 8 ? Mma::kTf32x6 : Mma::kTf32x3;
}

std::string name_of(const ForwardShape& shape) {
  const ForwardSpec& s = shape.spec;
  std::string name =
      tile_text(s.block_m, s.block_n, s.stages) + ", " + std::to_string(s.warps) + (s.warps == 1 ? " warp" : " warps");
  if (s.across > 1) name += ", " + std::to_string(s.across) + " across";
  if (s.slices > 1) name += ", " + std::to_string(s.slices) + " slices";
  if (shape.min_blocks > 1) name += ", " + std::to_string(shape.min_blocks) + " blocks";
  if (s.spread_copies) name += ", copies spread";
  if (s.swizzled) name += ", swizzled";
  if (s.halved_q) name += ", Q halved";
  if (s.in_place) name += ", operands in place";
  return name;
}

std::optional<ForwardShape> choose_forward(const Problem& problem, const GpuModel& gpu) {
  ForwardShape shape;
  ForwardSpec& spec = shape.spec;
  spec.type = type_of(problem.dtype);
  spec.mma = mma_of(problem, gpu.sm);
  spec.async_copy = gpu.sm >= 80;
  shape.v_chunks = static_cast<int>(std::max<std::int64_t>(1, ceil_div(problem.head_dim_v, widest_v(spec.type))));
  spec.head_dim = static_cast<int>(round_up(problem.head_dim, 16));
  const std::int64_t columns = ceil_div(problem.head_dim_v, shape.v_chunks);
  spec.band = math::BandRule::of(problem).bounded();
  take_options(problem, spec);

  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  spec.pack_gqa = packs_heads(problem);
  const std::int64_t of_a_query = spec.pack_gqa ? group : 1, rows = problem.seqlen_q * of_a_query;

  const int widest = std::max(spec.head_dim, static_cast<int>(round_up(columns, 16)));
  const auto take = [&](const Row& row) {
    const auto& tile = row.tile;
    spec.block_m = tile.block_m, spec.block_n = tile.block_n, spec.warps = tile.warps, spec.across = tile.across,
    spec.slices = tile.slices, spec.stages = tile.stages;
    spec.head_dim_v = static_cast<int>(round_up(columns, std::max(16 * tile.across, 8 * tile.slices)));
    const auto may_be = [&](int dim) { return swizzled(spec.type, dim) && swizzles(spec, dim); };
    spec.swizzled = tile.swizzled;
    spec.swizzled = may_be(spec.head_dim) || may_be(spec.head_dim_v);
    spec.spread_copies = tile.spread, spec.halved_q = tile.halved_q && spec.mma == Mma::kTf32x3;
    spec.in_place = tile.in_place;
    shape.min_blocks = tile.min_blocks;
    if (!spec.async_copy) spec.stages = 1, spec.spread_copies = spec.swizzled = false;
  };
  bool has_tile = false;  // with Q in shared memory; the others are for where there is none
  const auto fits = [&](const Row& row) {
    take(row);
    const bool it_fits = row.serves.widest >= widest && shared_bytes(spec) <= shared_room(gpu, shape.min_blocks) &&
                         !(spec.block_m > kFewRows && rows <= kFewRows) && rows <= row.serves.most_rows &&
                         !(spec.in_place && has_tile);
    has_tile |= it_fits;
    return it_fits;
  };
  const auto suits = [&](const Row& row) {
    const int weight = weight_of(spec);
    return problem.seqlen_kv >= row.serves.least_keys && row.serves.least_options <= weight &&
           weight <= row.serves.most_options && row.serves.band.value_or(spec.band) == spec.band;
  };
  TileReader reader(gpu.choices, gpu.names, kPortableName, problem);
  const Row* row = reader.read(table_of(spec), fits, suits, [&] { return name_of(shape); });
  if (row == nullptr) return std::nullopt;
  take(*row);
  shape.measured = reader.measured();

  // Packed sequences are one line of blocks, a few of them empty.
  const std::int64_t lines = problem.num_q_heads / of_a_query * (problem.packed() ? 1 : problem.batch);
  const std::int64_t longest = ceil_div(rows, spec.block_m);
  const std::int64_t row_blocks =
      problem.packed() ? packed_slots<std::int64_t>(problem.total_q * of_a_query, spec.block_m, problem.batch)
                       : longest;
  const std::int64_t blocks = lines * std::min(row_blocks, longest * problem.batch) * shape.v_chunks;
  shape.row_blocks = static_cast<int>(row_blocks);
  shape.heads_abreast = std::max<std::int64_t>(1, std::min(heads_abreast(problem, gpu) / of_a_query, lines));
  split_keys(problem, gpu, blocks, shape);
  shape.most_blocks = lines * row_blocks * shape.v_chunks * shape.splits;
  return shape;
}

jit::KernelRequest forward_request(const ForwardShape& shape, int arch) {
  return jit::render({.function = "forward",
                      .header = "cuda/kernels/forward.cuh",
                      .spec = "ForwardSpec",
                      .params = "ForwardParams",
                      .threads = shape.spec.warps * shape.spec.slices * 32,
                      .min_blocks = shape.min_blocks,
                      .shared_bytes = shared_bytes(shape.spec)},
                     shape.spec, arch);
}

jit::KernelRequest combine_request(Type type, bool dropout, bool by_warps, int arch) {
  // All that combining depends on, so that one kernel serves every forward of a type.
  const ForwardSpec spec{.type = type, .dropout = dropout};
  return jit::render({.function = by_warps ? "combine_by_warps" : "combine",
                      .header = "cuda/kernels/combine.cuh",
                      .spec = "ForwardSpec",
                      .params = "ForwardParams",
                      .threads = kMostSplits,
                      .early = true},
                     spec, arch);
}

jit::KernelRequest mask_words_request(int arch) {
  return jit::render({.function = "mask_words",
                      .header = "cuda/kernels/mask_words.cuh",
                      .spec = "ForwardSpec",
                      .params = "CallParams",
                      .threads = kMaskThreads,
                      .min_blocks = 4,
                      .early = true},
                     ForwardSpec{}, arch);
}

}  // namespace fovea::cuda
