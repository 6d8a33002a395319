#pragma once

#include "cuda/backward_plan_sm90.h"
#include "cuda/kernels/backward.cuh"
#include "cuda/kernels/hopper/gradient_columns.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// dbias where neither its rows nor its keys are summed: a block takes tiles of 128 × 128 entries, whose bias lies in
// shared memory, has the heads and sequences that share them copied one after the other, and keeps the sum of their dS
// in registers.
namespace fovea::cuda {

struct BiasGradientState {
  static constexpr int kPlaces = BiasGradientSm90Shared::kPlaces;
  Ring<kPlaces> ring;  // K and q, then V and dout, of one sharer after the other
  Ring<1> bias;        // of a tile
  struct Sharer {
    Sequence sequence;
    int head;
    bool exists, first;  // first: of its tile
    TileState sight;     // kHidden: nobody sees anything of the tile
  } sharers[kPlaces];    // where K and q are
};

/// Of dbias and of the bias alike.
struct BiasTile {
  int key, row, head, batch;  // 0 where it is shared
};

template <BackwardSpec S>
struct BiasGradientSm90 {
  static constexpr BiasGradientSm90Shared kShared = BiasGradientSm90Shared::of(S);
  static constexpr int kTile = S.block_m, kStatistics = 4 * kTile;
  static constexpr u32 kMeetings = 1;  // the warpgroups' barriers, but for the first one's, from this one on
  using Columns = GradientColumns<S>;
  using Entries = typename Columns::Entries;

  const BackwardSm90Params& p;
  BiasGradientState& state;
  const u32 base;
  const int first_key;  // of the warpgroup, in the tile

  FOVEA_DEVICE u32 keys_at(u32 n) const { return base + kShared.ring + state.ring.place(n) * kShared.place; }
  FOVEA_DEVICE u32 rows_at(u32 n) const { return keys_at(n) + kShared.place / 2; }
  FOVEA_DEVICE u32 statistics_at(u32 n) const { return base + kShared.statistics + state.ring.place(n) * kStatistics; }

  /// Tiles: of keys × rows × heads × batch; 1 where dbias is broadcast.
  FOVEA_DEVICE BiasTile tile(i64 number) const {
    const auto take = [&number](int count) {
      const int part = static_cast<int>(number % count);
      number /= count;
      return part;
    };
    const auto tiles = [](int of) { return (of + kTile - 1) / kTile; };
    BiasTile at{};
    at.key = take(tiles(p.seqlen_kv)) * kTile, at.row = take(tiles(p.seqlen_q)) * kTile;
    at.head = p.dbias.head == 0 ? 0 : take(p.q_heads);
    at.batch = static_cast<int>(number);
    return at;
  }

  // ---- by one thread

  FOVEA_DEVICE void load_all() const {
    u32 n = 0, t = 0;
#pragma unroll 1
    for (i64 number = blockIdx.x; number < p.bias_tiles; number += gridDim.x, ++t) load_tile(tile(number), t, n);
    begin_sharer(n, {{}, 0, false, true, TileState::kHidden});
    announce(n);
  }
  FOVEA_DEVICE void load_tile(const BiasTile& at, u32 t, u32& n) const {
    const auto range = [](i64 stride, int place, int count) {
      return stride == 0 ? Interval{0, count} : Interval{place, place + 1};
    };
    const Interval batches = range(p.dbias.batch, at.batch, p.batch), heads = range(p.dbias.head, at.head, p.q_heads);
    bool first = true;
#pragma unroll 1
    for (int b = batches.begin; b < batches.end; ++b) {
      const Sequence sequence = Sequence::of(p, b);
      const TileState sight = sequence.band.tile({at.row, at.row + kTile}, {at.key, at.key + kTile});
#pragma unroll 1
      for (int h = heads.begin; h < heads.end && sight != TileState::kHidden; ++h, n += 2) {
        const i64 slot = RowSlots(p, sequence, p.slot_rows).at(h, at.row / p.slot_rows) * p.slot_rows;
        begin_sharer(n, {sequence, h, true, first, sight});
        load<S.head_dim>(n, at, sequence, h, p.k_map, p.q_map, p.log2_lse + slot);
        state.ring.await_empty(n + 1);
        load<S.head_dim_v>(n + 1, at, sequence, h, p.v_map, p.dout_map, p.delta + slot);
        if (first) load_bias(at, t);  // behind what is there sooner
        first = false;
      }
    }
    if (!first) return;
    begin_sharer(n, {{}, 0, true, true, TileState::kHidden});
    announce(n);
    state.ring.await_empty(n + 1);
    announce(n + 1);
    n += 2;
    load_bias(at, t);
  }
  FOVEA_DEVICE void begin_sharer(u32 n, const BiasGradientState::Sharer& sharer) const {
    state.ring.await_empty(n);
    state.sharers[state.ring.place(n)] = sharer;
  }
  FOVEA_DEVICE void announce(u32 n) const {
    Barrier& full = state.ring.full[state.ring.place(n)];
    full.arrive(), full.arrive();
  }
  FOVEA_DEVICE void load_bias(const BiasTile& at, u32 t) const {
    state.bias.await_empty(t);
    state.bias.full[0].arrive_with(kShared.ring);
    load_bias_panels<kTile, kTile, S.bias_type>(base, p, state.bias.full[0], at.key, {at.row, at.head, at.batch},
                                                Keep::kNo);
  }
  template <int kDim>
  FOVEA_DEVICE void load(u32 n, const BiasTile& at, const Sequence& sequence, int h, const TensorMap& keys,
                         const TensorMap& rows, const float* statistics) const {
    const int b = p.cu_seqlens_q.data != nullptr ? 0 : sequence.batch;  // packed sequences are one to the engine
    Barrier& full = state.ring.full[state.ring.place(n)];
    load_panels<kTile, kDim>(keys_at(n), keys, full, {sequence.kv_begin + at.key, h / p.group, b}, Keep::kYes);
    load_panels<kTile, kDim>(rows_at(n), rows, full, {sequence.q_begin + at.row, h, b}, Keep::kYes, kStatistics);
    load_bytes(statistics_at(n), statistics, kStatistics, full);
  }

  // ---- by a warpgroup for its 64 keys

  FOVEA_DEVICE int warp_key() const { return first_key + warp_id() % 4 * 16; }

  FOVEA_DEVICE void gather() const {
    Entries sum;
    BiasTile at{};
    bool checks = false;
    u32 t = 0;
#pragma unroll 1
    for (u32 n = 0;; n += 2) {
      state.ring.await_full(n);
      const auto& sharer = state.sharers[state.ring.place(n)];
      if (uniform(sharer.first)) {
        if (n > 0) {
          state.bias.release(t++);
          store(sum, at);
        }
        if (!uniform(sharer.exists)) break;
        at = tile(blockIdx.x + i64{t} * gridDim.x);
        Columns::each([&](int j, int e) { sum[0][j].x[e] = 0.0F; });
        state.bias.await_full(t);
        checks = uniform(
            meet_any(kMeetings + first_key / kGroupRows, 128, Columns::hides_some(base, fresh(warp_key()), false)));
      }
      if (uniform(sharer.sight == TileState::kHidden)) {
        state.ring.release(n);
        state.ring.await_full(n + 1);
        state.ring.release(n + 1);
      } else if (uniform(sharer.sight == TileState::kPartial)) {
        add<true, true>(sum, at, sharer, n);
      } else if (checks) {
        add<false, true>(sum, at, sharer, n);
      } else {
        add<false, false>(sum, at, sharer, n);
      }
    }
  }
  FOVEA_DEVICE void store(const Entries& sum, const BiasTile& at) const {
    const int row = at.row + Columns::row_of(0, 0), key = at.key + warp_key() + lane_id() / 4;
    const EntryView& view = p.dbias;
    char* to = view.data + at.batch * view.batch + at.head * view.head + row * view.query + key * view.key;
#pragma unroll
    for (int j = 0; j < Columns::kN; ++j, to += 6 * view.query) {  // from row to row, for addresses take the most
#pragma unroll
      for (int e = 0; e < 2; ++e, to += view.query) {
        const int keys = row + 8 * j + e < p.seqlen_q ? p.seqlen_kv - key : 0;
        if (keys > 0) write<S.bias_type>(to, sum[0][j].x[e]);
        if (keys > 8) write<S.bias_type>(to + 8 * view.key, sum[0][j].x[e + 2]);
      }
    }
  }

  /// dS of a sharer; kHides: band and ends may hide an entry; kChecks: that, or the bias does.  Where something that is
  /// not finite was met each entry is then asked.
  template <bool kHides, bool kChecks>
  FOVEA_DEVICE void add(Entries& sum, const BiasTile& at, const BiasGradientState::Sharer& sharer, u32 n) const {
    const RowMap<false> rows{at.row, sharer.sequence.q_rows, sharer.head, 1};
    const typename Columns::Rules rules{p, sharer.sequence, rows};
    Columns columns{rules, at.key + warp_key() + lane_id() / 4, {}, {}, {}, {}};
    if constexpr (S.dropout) columns.stream = uniform(rules.stream(sharer.head));
    Entries c;
    typename Columns::Packed weights;
    multiply<S.head_dim>(c, n, 0);
    if constexpr (kHides) columns.see_all(), columns.keep_to_band();
    await_products<0>();
    pin(c[0]);
    float check = columns.template weigh<kHides, kChecks>(c, statistics_at(n),
                                                          [&] { columns.add_bias(c, base, fresh(warp_key()), false); });
    state.ring.release(n);
    columns.pack(weights, c);
    state.ring.await_full(n + 1);
    if constexpr (Columns::kDeltaFirst) Columns::begin_with_delta(c, statistics_at(n + 1));
    multiply<S.head_dim_v>(c, n + 1, Columns::kDeltaFirst ? 1 : 0);
    await_products<0>();
    pin(c[0]);
    if constexpr (kChecks) {
      check += columns.not_finite_gradients(c, statistics_at(n + 1));
      if (__any_sync(kAllLanes, !(check == 0.0F))) {
        columns.hide_by_bias(weights);
        columns.template differentiate<true>(c, weights, statistics_at(n + 1));
        Columns::each([&](int j, int e) { sum[0][j].x[e] += c[0][j].x[e]; });
        state.ring.release(n + 1);
        return;
      }
    }
    if constexpr (Columns::kDeltaFirst) {
      Columns::each([&](int j, int e) { sum[0][j].x[e] += Columns::unpacked(weights, j, e) * c[0][j].x[e]; });
    } else {
      columns.template differentiate<false>(c, weights, statistics_at(n + 1));
      Columns::each([&](int j, int e) { sum[0][j].x[e] += c[0][j].x[e]; });
    }
    state.ring.release(n + 1);
  }
  /// Keys by rows, issued and not awaited.
  template <int kDim>
  FOVEA_DEVICE void multiply(Entries& c, u32 n, int add) const {
    pin(c[0]);
    fence_products();
    multiply_by_rows<S.type, kDim, kTile, kTile>(c[0], matrix_at(keys_at(n) + first_key * kPanelRowBytes, 16),
                                                 matrix_at(rows_at(n), 16), add);
    close_products();
  }
};

/// Blocks take tiles in turns.
template <BackwardSpec S>
__device__ void bias_gradient_sm90(const BackwardSm90Params& p) {
  extern __shared__ __align__(1024) char shared[];
  using Gradient = BiasGradientSm90<S>;
  static_assert(sizeof(BiasGradientState) <= kStateBytes);
  BiasGradientState& state = *reinterpret_cast<BiasGradientState*>(shared + Gradient::kShared.state);
  if (threadIdx.x == 0) {
    state.ring.begin(S.warps, 2), state.bias.begin(S.warps);
    fence_barriers();
    fence_engine();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
  const Gradient gradient{p, state, shared_address(shared), (group - 1) * kGroupRows};
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) gradient.load_all();
  } else {
    take_registers<232>();
    gradient.gather();
  }
}

}  // namespace fovea::cuda
