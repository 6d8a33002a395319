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

int round_up(std::int64_t a, int b) { return static_cast<int>(ceil_div(a, b) * b); }

/// A row of the tables below, in the order of its numbers.
struct Tile {
  int widest;  // head dim that it serves
  int block_m, block_n, warps, across, stages, min_blocks;
  bool spread = false;             // copies leave between the steps of a product
  int most_options = kAnyOptions;  // see `weight_of`
  int least_keys = 0;              // with fewer its start costs more than it saves
  enum { kAnyBand, kNoBand, kBand } band = kAnyBand;
  bool halved_q = false;  // see ForwardSpec
  int slices = 1, most_rows = kAnyRows, least_options = 0;
  bool swizzled = false;  // see `swizzled` below

  static constexpr int kAnyOptions = 99, kAnyRows = 1 << 30;
};

/// How many registers the options of a forward take, by a rough measure.
int weight_of(const ForwardSpec& s) { return s.mask + 2 * s.dropout + 4 * s.alibi + 4 * s.bias + 16 * s.softcap; }

/// Asynchronous copies to rows of an odd number of 16-byte pieces cross lines of 128 bytes, and are 5 requests to L2 a
/// row of head dim 128 instead of 2; to swizzled rows they are not, but where they lie is more to work out.
constexpr Tile swizzled(Tile tile) {
  tile.swizzled = true;
  return tile;
}

// Measured on an H100 (docs/notes): 32 rows a warp, so that an operand of K or V serves two pieces of rows, as long as
// O leaves room for S, or as warps share them; then two blocks a multiprocessor, whose phases overlap, or one with many
// keys at a time.  The first that fits is taken.
constexpr std::array kTiles16{
    // Without options.
    swizzled(Tile{64, 128, 128, 4, 1, 1, 2, false, 0, 2048, Tile::kNoBand}),
    Tile{64, 128, 128, 4, 1, 1, 2, false, 0, 2048},
    Tile{64, 128, 64, 4, 1, 2, 3, false, 0, 0, Tile::kNoBand},
    Tile{64, 64, 64, 4, 1, 2, 4, false, 0, 0, Tile::kBand},
    Tile{80, 128, 96, 4, 1, 2, 2, true, 0},
    Tile{96, 128, 96, 4, 1, 1, 2, false, 0},
    swizzled(Tile{128, 128, 64, 4, 1, 2, 2, false, 0}),
    swizzled(Tile{128, 64, 64, 4, 1, 1, 2, false, 0}),
    Tile{192, 128, 96, 8, 1, 2, 1, true, 0},
    swizzled(Tile{256, 128, 64, 8, 2, 2, 1, true, 0}),
    swizzled(Tile{256, 64, 64, 4, 2, 1, 2, false, 0}),
    swizzled(Tile{256, 128, 64, 8, 1, 1, 1, false, 0}),
    // With options.
    Tile{64, 128, 64, 4, 1, 2, 2, false, 4},
    Tile{64, 128, 32, 4, 1, 2, 2, false, 15},
    Tile{64, 128, 64, 4, 1, 2, 2, false, 19},
    Tile{64, 128, 32, 4, 1, 2, 2},
    Tile{128, 128, 64, 4, 1, 2, 2, false, 1},
    Tile{128, 128, 48, 4, 1, 2, 2, false, 3},
    Tile{128, 128, 48, 4, 1, 1, 2, false, 3},
    Tile{128, 64, 128, 4, 1, 1, 2, true, 7, 0, Tile::kAnyBand, false, 1, Tile::kAnyRows, 5},
    Tile{128, 128, 32, 4, 1, 2, 2, true, 18},
    Tile{128, 64, 32, 4, 1, 2, 2},
    Tile{192, 128, 96, 8, 1, 2, 1, true},
    Tile{192, 64, 64, 4, 1, 1, 2},
    Tile{256, 128, 64, 8, 2, 2, 1, true, 3},
    Tile{256, 64, 64, 4, 2, 1, 2, false, 5},
    Tile{256, 128, 64, 8, 1, 1, 1, false, 10},
    Tile{256, 64, 64, 4, 2, 1, 2, false, 17},
    Tile{256, 64, 32, 4, 1, 2, 2},
    Tile{256, 64, 32, 4, 1, 1, 2},
    Tile{512, 64, 32, 4, 1, 1, 1},
    Tile{512, 32, 32, 2, 1, 1, 1},
    Tile{512, 16, 16, 1, 1, 1, 1},
};
constexpr std::array kTiles32{
    Tile{64, 128, 32, 4, 1, 2, 2, false, 6, 0, Tile::kAnyBand, true},
    Tile{64, 128, 32, 4, 1, 2, 2, false, 6},
    Tile{80, 128, 16, 4, 1, 2, 2, false, 0, 0, Tile::kNoBand},
    Tile{96, 128, 16, 4, 1, 2, 2, false, 0, 0, Tile::kNoBand},
    Tile{96, 64, 32, 4, 1, 2, 1},
    Tile{128, 128, 16, 4, 1, 2, 2, false, 0, 0, Tile::kNoBand},
    Tile{128, 64, 32, 4, 1, 2, 1},
    Tile{256, 64, 16, 4, 1, 1, 1, false, 0, 0, Tile::kNoBand},
    Tile{256, 64, 32, 4, 1, 1, 1, false, 0},
    Tile{512, 64, 16, 4, 1, 1, 1},
    Tile{512, 32, 16, 2, 1, 1, 1},
    Tile{512, 16, 16, 1, 1, 1, 1},
};

// Few rows and many keys are bound by memory alone.  Slices of a block share out the keys and wait for nobody, so that
// copies to all of shared memory are always in flight.  With 64 rows the work of options would show.
constexpr Tile sliced(int widest, int block_m, int block_n, int warps, int slices, int stages, int min_blocks) {
  Tile tile{widest, block_m, block_n, warps, 1, stages, min_blocks};
  tile.slices = slices, tile.most_rows = block_m, tile.least_keys = 4 * slices * block_n;
  if (block_m > 32) tile.most_options = 0;
  return swizzled(tile);
}
constexpr std::array kSlicedTiles16{
    sliced(64, 16, 32, 1, 4, 3, 2),  sliced(64, 16, 32, 1, 4, 2, 2),  sliced(64, 32, 32, 1, 4, 3, 2),
    sliced(64, 32, 32, 1, 4, 2, 2),  sliced(64, 64, 32, 2, 2, 4, 2),  sliced(64, 64, 32, 2, 2, 2, 2),
    sliced(128, 16, 32, 1, 4, 3, 1), sliced(128, 16, 16, 1, 4, 3, 2), sliced(128, 16, 16, 1, 4, 2, 2),
    sliced(128, 16, 16, 1, 4, 2, 1), sliced(128, 32, 16, 1, 4, 3, 2), sliced(128, 32, 16, 1, 4, 2, 2),
    sliced(128, 32, 16, 1, 4, 2, 1), sliced(256, 16, 16, 1, 4, 3, 1), sliced(256, 16, 16, 1, 4, 2, 1),
    sliced(256, 16, 16, 1, 2, 2, 1), sliced(256, 32, 16, 2, 4, 3, 1), sliced(256, 32, 16, 2, 2, 3, 1),
    sliced(256, 64, 16, 4, 2, 4, 1), sliced(512, 16, 16, 1, 4, 2, 1), sliced(512, 16, 16, 1, 2, 2, 1),
};
constexpr std::array kSlicedTiles32{
    sliced(64, 16, 16, 1, 4, 3, 2),  sliced(64, 16, 16, 1, 4, 2, 2),  sliced(64, 16, 16, 1, 4, 2, 1),
    sliced(128, 16, 16, 1, 4, 3, 1), sliced(128, 16, 16, 1, 4, 2, 1), sliced(128, 16, 16, 1, 2, 2, 1),
    sliced(512, 16, 16, 1, 2, 2, 1),
};

// Without a unit for products, short code matters more than reuse.
constexpr std::array kTilesByShuffles{Tile{256, 64, 16, 4, 1, 1, 1}, Tile{512, 16, 16, 1, 1, 1, 1}};

template <std::size_t A, std::size_t B>
constexpr std::array<Tile, A + B> joined(const std::array<Tile, A>& first, const std::array<Tile, B>& second) {
  std::array<Tile, A + B> all{};
  std::ranges::copy(second, std::ranges::copy(first, all.begin()).out);
  return all;
}
constexpr auto kAllTiles16 = joined(kSlicedTiles16, kTiles16);
constexpr auto kAllTiles32 = joined(kSlicedTiles32, kTiles32);

std::span<const Tile> table_of(const ForwardSpec& spec) {
  if (spec.mma == Mma::kShuffles) return kTilesByShuffles;
  if (spec.type == Type::kFloat32) return kAllTiles32;
  return kAllTiles16;
}

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

/// Splits the keys of `blocks` blocks of rows where these are too few for the GPU.
void split_keys(const Problem& problem, const GpuModel& gpu, std::int64_t blocks, ForwardShape& shape) {
  ForwardSpec& spec = shape.spec;
  const std::int64_t step = std::int64_t{spec.block_n} * spec.slices, steps = ceil_div(problem.seqlen_kv, step);
  // A sliced block keeps enough copies in flight for a multiprocessor of its own; of others all that fit run at once.
  const std::int64_t slots = gpu.multiprocessors * (spec.slices > 1 ? 1 : shape.min_blocks);
  const std::int64_t most =
      spec.slices > 1 ? steps / 2 : std::min(slots / std::max<std::int64_t>(1, blocks), steps / 4);
  const std::int64_t rows = problem.batch * problem.num_q_heads * problem.seqlen_q;  // combined, each by a block
  const std::int64_t splits = rows > std::numeric_limits<int>::max() ? 1 : choose_splits(blocks, steps, slots, most);
  shape.keys_per_split = static_cast<int>(std::max<std::int64_t>(1, ceil_div(steps, splits)) * step);
  shape.splits = static_cast<int>(std::max<std::int64_t>(1, ceil_div(problem.seqlen_kv, shape.keys_per_split)));
  spec.split = shape.splits > 1;
  if (!spec.split) return;
  const std::int64_t floats = rows * shape.v_chunks * shape.splits * (spec.head_dim_v + kPartFacts);
  shape.partial_bytes = static_cast<std::size_t>(floats) * sizeof(float);
}

}  // namespace

GpuModel model_of(int compute_capability) {
  const int sm = compute_capability;
  const int kib = sm < 80 ? 64 : sm == 80 || sm == 87 ? 163 : sm < 90 || sm / 10 == 12 ? 99 : 227;
  const int multiprocessors = sm < 80 ? 72 : sm == 80 ? 108 : sm < 89 ? 84 : sm < 90 ? 142 : sm < 100 ? 132 : 148;
  const int l2_mib = sm < 80 ? 4 : sm == 80 ? 40 : sm < 89 ? 6 : sm < 90 ? 72 : sm < 100 ? 50 : sm == 120 ? 96 : 126;
  return {sm, multiprocessors, kib * 1024, std::int64_t{l2_mib} << 20};
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
  return name;
}

std::optional<ForwardShape> choose_forward(const Problem& problem, const GpuModel& gpu) {
  ForwardShape shape;
  ForwardSpec& spec = shape.spec;
  spec.type = type_of(problem.dtype);
  spec.mma = mma_of(problem, gpu.sm);
  spec.async_copy = gpu.sm >= 80;
  shape.v_chunks = static_cast<int>(std::max<std::int64_t>(1, ceil_div(problem.head_dim_v, widest_v(spec.type))));
  spec.head_dim = round_up(problem.head_dim, 16);
  const std::int64_t columns = ceil_div(problem.head_dim_v, shape.v_chunks);
  spec.band = math::BandRule::of(problem).bounded();
  take_options(problem, spec);

  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  spec.pack_gqa = group > 1 && problem.seqlen_q * group <= kFewRows;
  const std::int64_t of_a_query = spec.pack_gqa ? group : 1, rows = problem.seqlen_q * of_a_query;

  const int widest = std::max(spec.head_dim, round_up(columns, 16));
  const auto take = [&](const Tile& tile) {
    spec.block_m = tile.block_m, spec.block_n = tile.block_n, spec.warps = tile.warps, spec.across = tile.across,
    spec.slices = tile.slices, spec.stages = tile.stages;
    spec.head_dim_v = round_up(columns, std::max(16 * tile.across, 8 * tile.slices));
    spec.swizzled =
        tile.swizzled && (cuda::swizzled(spec.type, spec.head_dim) || cuda::swizzled(spec.type, spec.head_dim_v));
    spec.spread_copies = tile.spread, spec.halved_q = tile.halved_q && spec.mma == Mma::kTf32x3,
    shape.min_blocks = tile.min_blocks;
    if (!spec.async_copy) spec.stages = 1, spec.spread_copies = spec.swizzled = false;
  };
  const auto fits = [&](const Tile& tile) {
    take(tile);
    return tile.widest >= widest && shared_bytes(spec) <= shared_room(gpu, tile.min_blocks) &&
           !(tile.block_m > kFewRows && rows <= kFewRows) && rows <= tile.most_rows;
  };
  const auto suits = [&](const Tile& tile) {
    const int weight = weight_of(spec);
    return problem.seqlen_kv >= tile.least_keys && tile.least_options <= weight && weight <= tile.most_options &&
           (tile.band == Tile::kAnyBand || (tile.band == Tile::kBand) == spec.band);
  };
  TileReader reader(gpu.choices, gpu.names, kPortableName, problem);
  const Tile* tile = reader.read(table_of(spec), fits, suits, [&] { return name_of(shape); });
  if (tile == nullptr) return std::nullopt;
  take(*tile);
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

jit::KernelRequest combine_request(const ForwardShape& shape, int arch) {
  // All that combining depends on, so that one kernel serves every forward of a type.
  ForwardSpec spec;
  spec.type = shape.spec.type;
  spec.dropout = shape.spec.dropout;
  return jit::render({.function = "combine",
                      .header = "cuda/kernels/combine.cuh",
                      .spec = "ForwardSpec",
                      .params = "ForwardParams",
                      .threads = kMostSplits},
                     spec, arch);
}

jit::KernelRequest mask_words_request(int arch) {
  return jit::render({.function = "mask_words",
                      .header = "cuda/kernels/mask_words.cuh",
                      .spec = "ForwardSpec",
                      .params = "CallParams",
                      .threads = kMaskThreads,
                      .min_blocks = 4},
                     ForwardSpec{}, arch);
}

}  // namespace fovea::cuda
