#include "cuda/hopper_backward.h"

#include <algorithm>
#include <array>
#include <span>

#include "cuda/backward_plan_sm90.h"
#include "cuda/driver.h"
#include "cuda/jit/wgmma_text.h"
#include "cuda/planned_backward.h"
#include "cuda/row_copies.h"
#include "cuda/tensor_map.h"

namespace fovea::cuda {
namespace {

constexpr int kWarps = 8, kStages = 2;
constexpr std::int64_t kMostAbreast = 4;   // kv heads; more do not fit into L2
constexpr std::int64_t kMostInTurns = 32;  // where dq is added up in turns; half as many of pairs
constexpr std::int64_t kInL2 = 1 << 22;    // elements of q of those, beside which L2 has room for dout and the sums
constexpr std::int64_t kPartOfDq = 512 * 1024;  // bytes of sums that a block, or a cluster of two, turns into dq
constexpr std::int64_t kShortTask = 1 << 16;    // elements of q of a kv head, see `may_go_on`
constexpr std::int64_t kFewHeads = 3;           // times dq_lag: with fewer heads no block ends dq
constexpr int kBiasGradientTile = 128;          // rows, and keys
constexpr int kAtOnce = 128;                    // columns of dk and dv that one product makes
constexpr std::int64_t kShortRows = 512;        // up to which small tiles that hold dq beat larger ones that add to it

/// A row of `kTiles`: a tile, and the problems that it is for.
struct Tile {
  int widest;  // head dim that it serves
  int block_m, block_n;
  bool holds_dq = false;  // a block has all rows of its heads, and their dq in shared memory
  bool bare = false;      // for problems without options, a bias apart: others have no registers for it
};

/// Tiles of all rows that read a kv head.
std::int64_t tiles_of_rows(const Problem& problem, int block_m) {
  return problem.num_q_heads / problem.num_kv_heads * ceil_div(problem.seqlen_q, block_m);
}
/// Of an H100, whatever the GPU at hand: it chooses kernels, and a pack for all GPUs of the architecture has them.
std::int64_t multiprocessors() { return model_of(kSm90).multiprocessors; }
/// Whether so many blocks, one for each kv head of a sequence, keep four fifths of the GPU busy, last wave included.
bool fill_the_gpu(std::int64_t blocks) {
  const std::int64_t waves = ceil_div(blocks, multiprocessors());
  return blocks > 0 && blocks * 5 >= waves * multiprocessors() * 4;
}

/// Whether blocks go on to the next keys: where few rows see a block of keys, so that its beginning and its end are
/// much of its time, and there is room for the next one's.  With more rows all takes up to 13% longer (docs/notes).
bool may_go_on(const Problem& problem, BackwardSpec spec) {
  spec.goes_on = spec.ends_dq = true;
  const std::int64_t rows = problem.num_q_heads / problem.num_kv_heads * problem.seqlen_q;
  return rows * std::max({spec.head_dim, spec.head_dim_v, 64}) <= kShortTask && !shares_keys(spec) &&
         !spec.deterministic && !spec.bias && !spec.alibi && BackwardSm90Shared::of(spec).total <= kMostShared;
}

/// Decides whether some blocks of the main kernel turn the sums of dq into dq, and which.  They start after as many
/// others as run at once and a group of heads, so that they rarely wait; a place in dq_sum is used again soon after,
/// while L2 still has it.  Not where lengths differ, because as many heads may then be little work, nor where heads are
/// few, because the last heads' sums are converted when no other work is left.
void end_dq(const Problem& problem, BackwardShape& shape) {
  BackwardSpec& spec = shape.spec;
  const bool ragged = problem.packed() || problem.q_lengths.present || problem.kv_lengths.present;
  if (spec.holds_dq || ragged || shape.row_blocks == 0 || shape.key_blocks == 0) return;
  const std::int64_t heads = problem.batch * problem.num_kv_heads, abreast = shape.heads_abreast,
                     at_work = multiprocessors() / blocks_of_cluster(spec);
  const auto heads_of = [&](std::int64_t blocks) {
    return abreast * (ceil_div(blocks, abreast * shape.key_blocks) + 1);
  };
  // A block that goes on asks for its next task before it has ended this one.
  const std::int64_t lag_ahead = heads_of(at_work * 5 / 4);
  const bool goes_on = heads >= kFewHeads * lag_ahead && may_go_on(problem, spec);
  const std::int64_t lag = goes_on ? lag_ahead : heads_of(at_work),
                     places = lag + heads_of(goes_on ? at_work : at_work / 4);
  if (heads < kFewHeads * lag) return;
  const std::int64_t tiles = problem.num_q_heads / problem.num_kv_heads * shape.row_blocks;
  spec.ends_dq = true, spec.goes_on = goes_on;
  shape.dq_places = static_cast<int>(places);
  shape.dq_lag = static_cast<int>(lag);
  shape.dq_parts = static_cast<int>(ceil_div(tiles * spec.block_m * spec.head_dim * 4, kPartOfDq));
  shape.most_blocks =
      std::max(shape.most_blocks, (heads + lag) * (shape.key_blocks + shape.dq_parts) * blocks_of_cluster(spec));
}

// Measured on an H100 where nothing is hidden, else only run there (docs/notes).  The first that fits is taken.
constexpr auto kTiles = std::to_array<Tile>({
    {.widest = 48, .block_m = 128, .block_n = 128, .holds_dq = true, .bare = true},
    {.widest = 64, .block_m = 64, .block_n = 128, .holds_dq = true},
    {.widest = 64, .block_m = 128, .block_n = 128, .bare = true},
    {.widest = 256, .block_m = 64, .block_n = 128},
});

class BackwardSm90Plan final : public PlannedKernel {
 public:
  BackwardSm90Plan(const Problem& problem, const BackwardShape& shape, const Device& device)
      : device_(device),
        kv_heads_(static_cast<int>(problem.num_kv_heads)),
        call_(problem, shape, device, kSm90, WordOrder::kColumns),
        aligned_bias_(problem, call_.workspace_bytes(), device),
        main_(backward_sm90_request(shape), device) {
    if (const auto request = bias_gradient_sm90_request(problem, shape)) bias_gradient_.emplace(*request, device);
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return aligned_bias_.workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    const BackwardSpec& spec = call_.shape().spec;
    std::vector<std::pair<std::string, std::string>> list{
        {"kernel", main_.describe()},
        {"tile", describe_tile(call_.shape())},
        {"registers", std::to_string(kBackwardConsumers) + " warpgroups of " +
                          std::to_string(consumer_registers(spec)) + ", one of " + std::to_string(dq_registers(spec)) +
                          " for dq and one of " + std::to_string(producer_registers(spec))}};
    if (shares_keys(spec)) list.emplace_back("blocks", "in pairs, a cluster");
    std::ranges::copy(call_.details(), std::back_inserter(list));
    aligned_bias_.describe(list);
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    require_gpu(main_, device_);
    const BackwardSpec& spec = call_.shape().spec;
    BackwardSm90Params p{};
    static_cast<BackwardParams&>(p) = call_.params(inputs, outputs, workspace);
    aligned_bias_.make(p, workspace, stream);
    make_maps(p, spec.block_m, keys_of_block(spec));
    call_.before(p, workspace, stream);
    p.tasks = call_.main_blocks(p);
    launch(main_, spec.goes_on ? std::min(p.tasks, multiprocessors_) : p.tasks * blocks_of_cluster(spec), p, stream);
    call_.add_parts(p, stream);
    const bool bias_by_engine = p.dbias.data != nullptr && bias_gradient_ && p.by_engine && p.bias_by_engine;
    if (bias_by_engine) {
      make_maps(p, kBiasGradientTile, kBiasGradientTile);
      p.dbias_by_engine &= p.bias_parts == 1 && p.dbias.query != 0;
      const auto tiles = [](int of) { return ceil_div(of, kBiasGradientTile); };
      const auto count = [](std::int64_t stride, std::int64_t size) { return stride == 0 ? 1 : size; };
      p.slot_rows = spec.block_m;
      const std::int64_t all_tiles = count(p.dbias.query, tiles(p.seqlen_q)) * tiles(p.seqlen_kv) *
                                     count(p.dbias.batch, p.batch) * count(p.dbias.head, p.q_heads) * p.bias_parts;
      p.bias_tiles = static_cast<u32>(all_tiles);  // of 32 KB each: no GPU's memory holds 2^32 of them
      launch(*bias_gradient_, static_cast<int>(std::min<std::int64_t>(all_tiles, multiprocessors_)), p, stream);
    }
    const BackwardParams& common = p;
    call_.after(common, outputs, workspace, stream, bias_by_engine);
  }

 private:
  void make_maps(BackwardSm90Params& p, int box_rows, int box_keys) const {
    const auto& s = call_.shape().spec;
    CallMaps maps{p, CurrentGpu(device_.index), s.type, box_rows, box_keys};
    maps.kv_heads = kv_heads_;
    p.by_engine = maps.of_rows(p.q, p.head_dim, p.q_map) && maps.of_rows(p.dout, p.head_dim_v, p.dout_map) &&
                  maps.of_keys(p.k, p.head_dim, p.k_map) && maps.of_keys(p.v, p.head_dim_v, p.v_map);
    p.bias_by_engine = s.bias && maps.of_entries(p.bias, s.bias_type, box_rows, p.bias_map);
    p.dbias_by_engine = p.bias_by_engine && maps.of_entries(p.dbias, s.bias_type, box_rows, p.dbias_map);
  }

  Device device_;
  int multiprocessors_ = model_of_device(device_).multiprocessors, kv_heads_;
  BackwardCall call_;
  AlignedBias aligned_bias_;
  PlannedLaunch main_;
  std::optional<PlannedLaunch> bias_gradient_;
};

/// How many kv heads take turns in the grid.
void order_heads(const Problem& problem, BackwardShape& shape) {
  const BackwardSpec& spec = shape.spec;
  if (spec.deterministic && shape.key_blocks > 0) {  // blocks that start together are then of one turn
    const std::int64_t cluster = blocks_of_cluster(spec), at_once = multiprocessors() / cluster;
    const std::int64_t of_a_head = problem.seqlen_q * (problem.num_q_heads / problem.num_kv_heads) *
                                   std::max(spec.head_dim, spec.head_dim_v),
                       together = kInL2 / std::max<std::int64_t>(of_a_head, 1);
    shape.heads_abreast =
        kv_heads_abreast(shape, std::max(std::min(together, kMostInTurns / cluster), at_once / shape.key_blocks));
  } else if (spec.band) {
    shape.heads_abreast = kv_heads_abreast(shape, kMostAbreast);
  } else if (spec.bias) {
    const std::int64_t sharing =
        (problem.bias->batch ? 1 : problem.batch) * (problem.bias->heads ? 1 : problem.num_kv_heads);
    shape.heads_abreast = kv_heads_abreast(shape, std::min(sharing, kMostAbreast));
  }
  shape.batch_inside = problem.bias && !problem.bias->batch;  // sequences that share a bias read it at the same time
}

}  // namespace

std::optional<BackwardShape> choose_backward_sm90(const Problem& given, const GpuModel& gpu) {
  if (given.dtype == DType::kFloat32 || given.head_dim % 8 != 0 || given.head_dim_v % 8 != 0) return std::nullopt;
  BackwardShape shape;
  BackwardSpec& spec = shape.spec;
  spec = backward_spec(given, kSm90);
  const Problem problem = split_groups(given, multiprocessors() / blocks_of_cluster(spec), shape);
  spec.warps = kWarps, spec.stages = kStages;
  const std::int64_t widest = std::max(problem.head_dim, problem.head_dim_v);
  const bool in_turns = spec.deterministic;
  const auto take = [&](const Tile& tile) {
    spec.block_m = tile.block_m, spec.block_n = tile.block_n;
    spec.holds_dq = tile.holds_dq, spec.deterministic = in_turns && !tile.holds_dq;  // held, it has one order
  };
  const auto fits = [&](const Tile& tile) {
    take(tile);
    const auto shared = BackwardSm90Shared::of(spec);
    return widest <= tile.widest && shared.total <= kMostShared &&
           (!tile.holds_dq || tiles_of_rows(problem, spec.block_m) <= shared.held_tiles);
  };
  // Who makes dS there does not know softcap's tanh, and the gradient of slopes is one of dS before it.
  if (shares_keys(spec) && spec.alibi && spec.softcap) return std::nullopt;
  const auto has_registers = [&](const Tile& tile) { return is_bare(spec) || !tile.bare; };
  const auto adds = std::ranges::find_if(
      kTiles, [&](const Tile& tile) { return !tile.holds_dq && fits(tile) && has_registers(tile); });
  if (adds == kTiles.end()) return std::nullopt;
  const bool full = fill_the_gpu(problem.batch * problem.num_kv_heads),
             short_rows = std::max(problem.seqlen_q, problem.seqlen_kv) <= kShortRows;
  const auto suits = [&](const Tile& tile) {
    return has_registers(tile) && (!tile.holds_dq || (full && (short_rows || spec.block_m == adds->block_m)));
  };
  TileReader reader(gpu.choices, gpu.names, kHopperName, given);
  take(*reader.read(std::span<const Tile>(kTiles), fits, suits, [&] { return name_of(shape); }));
  shape.measured = reader.measured();
  cut_up(problem, shape);
  shape.most_blocks *= blocks_of_cluster(spec);
  order_heads(problem, shape);
  end_dq(problem, shape);
  share_out(problem, gpu, shape);
  return shape;
}

jit::KernelRequest backward_sm90_request(const BackwardShape& shape) {
  const BackwardSpec& spec = shape.spec;
  const auto whole = [](int dim) { return std::min(dim, kAtOnce); };
  const auto rest = [](int dim) { return dim > kAtOnce ? dim - kAtOnce : dim; };
  const std::string products =
      jit::wgmma_text(spec.type, {spec.block_m, whole(spec.head_dim), rest(spec.head_dim), whole(spec.head_dim_v),
                                  rest(spec.head_dim_v), dq_columns(spec)});
  return jit::render({.function = "backward_sm90",
                      .header = "cuda/kernels/hopper/backward.cuh",
                      .spec = "BackwardSpec",
                      .params = "BackwardSm90Params",
                      .threads = kBackwardThreads,
                      .cluster = blocks_of_cluster(spec),
                      .shared_bytes = BackwardSm90Shared::of(spec).total,
                      .text = products,
                      .arch_specific = true,
                      .early = true},
                     spec, kSm90);
}

std::optional<jit::KernelRequest> bias_gradient_sm90_request(const Problem& problem, const BackwardShape& shape) {
  BackwardSpec spec = shape.spec;
  spec.block_m = spec.block_n = kBiasGradientTile;
  spec.deterministic = spec.holds_dq = spec.ends_dq = spec.goes_on = spec.split_gqa = false;
  const auto shared = BiasGradientSm90Shared::of(spec);
  if (!problem.bias || !problem.bias->keys || shared.total > kMostShared) return std::nullopt;
  return jit::render({.function = "bias_gradient_sm90",
                      .header = "cuda/kernels/hopper/bias_gradient.cuh",
                      .spec = "BackwardSpec",
                      .params = "BackwardSm90Params",
                      .threads = (kBackwardConsumers + 1) * 128,
                      .shared_bytes = shared.total,
                      .text = jit::wgmma_text(spec.type, {kBiasGradientTile}),
                      .arch_specific = true},
                     spec, kSm90);
}

std::shared_ptr<const PlannedKernel> plan_backward_sm90(const Problem& problem, const Device& device) {
  return std::make_shared<BackwardSm90Plan>(problem, *choose_backward_sm90(problem, model_of_device(device)), device);
}

}  // namespace fovea::cuda
