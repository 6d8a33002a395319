#pragma once

#include "cuda/kernels/placed.cuh"
#include "cuda/kernels/row_end.cuh"

// A block of the forward: which part of the problem is its own, where things lie in its shared memory, and which tiles
// of keys it walks.
namespace fovea::cuda {

/// A tile of keys that a mask does not hide.  Bit g of `seen`: some rows of warp group g see some of the keys; bit
/// 16 + g: all of them see all.
struct MaskStep {
  int tile;
  u32 seen;
};

template <ForwardSpec S>
struct ForwardBlock {
  static constexpr int kThreads = S.warps * kWarp;        // of a slice
  static constexpr int kDown = S.warps / S.across;        // groups of warps, each with rows of its own
  static constexpr int kM = S.block_m / kDown / 16;       // pieces of 16 rows of a warp
  static constexpr int kN = S.block_n / S.across / 8;     // pieces of 8 keys of its scores
  static constexpr int kD = S.head_dim_v / S.across / 8;  // pieces of 8 columns of its out
  static constexpr int kEnd = kD / S.slices;              // of these that it writes, after slices were joined
  static constexpr int kK = kStep<S.type>;
  static_assert(kN % 2 == 0 && kD % 2 == 0);  // operands come two pieces at a time
  static_assert(S.slices == 1 || (S.across == 1 && !S.halved_q && kD % S.slices == 0));
  static_assert(!S.in_place || (S.slices == 1 && !S.halved_q));

  using QTile = SharedTile<S.type, S.block_m, S.head_dim>;
  using KTile = Tile<S.type, S.block_n, S.head_dim, swizzles(S, S.head_dim)>;
  using VTile = Tile<S.type, S.block_n, S.head_dim_v, swizzles(S, S.head_dim_v)>;
  using WeightTile = SharedTile<S.type, S.block_m, S.block_n>;  // P, where warps share rows
  using OutTile = SharedTile<S.type, S.block_m, S.head_dim_v>;  // in the place of Q

  static constexpr Packing kPacking = S.pack_gqa ? Packing::kHeads : Packing::kNone;
  using Rows = RowMap<kPacking>;
  using Order = KeyOrder<S.block_n / S.across, S.bias>;
  using Rules = ScoreRules<S, kPacking, Order>;
  using Scores = Accumulator[kM][kN];
  using Out = Accumulator[kM][kD];
  using Share = Accumulator[kM][kEnd];

  static constexpr int kSteps = 64, kLookEvery = 8;  // of the ring of `MaskStep`s, which is filled every 8 steps

  /// What all threads of a block share, in shared memory: registers are for S and O.
  struct Block {
    Sequence sequence;
    Rows rows;
    int kv_head, v_begin, split;  // v_begin: the block's first column of v
    const char *k, *v;            // the sequence's, of the block's head and columns
    const char *first_k[S.slices][kThreads], *first_v[S.slices][kThreads];  // what a thread copies first, of tile 0
    Interval keys;                                                          // that the block walks
    Interval full;                                                          // tiles of keys that all rows see whole
    bool careful;                                                           // references follow the maximum: see `run`
    math::DropoutStream stream;
    Band::Reach reach[kDown];
    MaskStep steps[S.slices][S.mask ? kSteps : 1];           // a ring
    int steps_found[S.slices], next_tile[S.slices];          // next_tile: the first that the mask was not asked about
    float exchange[S.across > 1 ? S.block_m : 1][S.across];  // between the warps that share rows
  };

  const ForwardParams& p;
  Block& block;
  const u32 shared;
  const Sequence& sequence = block.sequence;
  const Rows& rows = block.rows;
  const Rules rules{p, block.sequence, block.rows};

  FOVEA_DEVICE auto q_tile() const {
    if constexpr (S.in_place) {
      const auto row_at = [this](int r) -> const char* { return sequence.q_row(p.q, rows.query(r), rows.head(r)); };
      return PlacedTile<S.type, S.head_dim, AsTheyAre, decltype(row_at)>{row_at, rows.left(), p.head_dim};
    } else {
      return QTile{shared};
    }
  }
  FOVEA_DEVICE QTile q_rests() const { return {shared + QTile::kSize}; }  // where Q is halved
  FOVEA_DEVICE OutTile out_tile() const { return {shared}; }
  FOVEA_DEVICE KTile k_tile(int stage) const { return {ring_of(slice()) + stage * stage_bytes(S)}; }
  FOVEA_DEVICE VTile v_tile(int stage) const { return {k_tile(stage).base + KTile::kSize}; }
  FOVEA_DEVICE WeightTile weight_tile() const { return {ring_of(S.slices)}; }
  FOVEA_DEVICE u32 ring_of(int slice) const { return shared + q_bytes(S) + slice * slice_bytes(S); }
  FOVEA_DEVICE static int slice() { return S.slices == 1 ? 0 : static_cast<int>(threadIdx.y); }
  /// A barrier of the warps of a slice, which share a ring.
  FOVEA_DEVICE static void sync_slice() {
    if constexpr (S.slices == 1) {
      __syncthreads();
    } else if constexpr (S.warps == 1) {
      __syncwarp();
    } else {
      asm volatile("barrier.sync %0, %1;" ::"r"(1 + slice()), "n"(kThreads) : "memory");
    }
  }
  FOVEA_DEVICE static int warp_row() { return warp_id() / S.across * kM * 16; }
  FOVEA_DEVICE static int warp_key() { return warp_id() % S.across * kN * 8; }
  FOVEA_DEVICE static int warp_column() { return warp_id() % S.across * kD * 8; }

  /// Calls f(i, h, r) for each of a lane's rows, r of the block.
  template <class F>
  FOVEA_DEVICE static void each_row(const F& f) {
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) f(x / 2, x % 2, warp_row() + entry_row(x / 2, x % 2 * 2));
  }
  FOVEA_DEVICE static int entry_row(int i, int e) { return 16 * i + lane_id() / 4 + e / 2 * 8; }

  /// Reduces one number a row, the same in all lanes of a quad, by f over the warps that share the row.
  template <class F>
  FOVEA_DEVICE void share_rows(float (&values)[kM][2], const F& f) const {
    if constexpr (S.across > 1) {
#pragma unroll
      for (int x = 0; x < 2 * kM; ++x) {
        if (lane_id() % 4 == 0)
          block.exchange[warp_row() + entry_row(x / 2, x % 2 * 2)][warp_id() % S.across] = values[x / 2][x % 2];
      }
      sync_row_sharers();
#pragma unroll
      for (int x = 0; x < 2 * kM; ++x) {
        const float(&all)[S.across] = block.exchange[warp_row() + entry_row(x / 2, x % 2 * 2)];
        float& result = values[x / 2][x % 2] = all[0];
#pragma unroll
        for (int w = 1; w < S.across; ++w) result = f(result, all[w]);
      }
      sync_row_sharers();
    }
  }
  /// A barrier of the warps that share rows.
  FOVEA_DEVICE static void sync_row_sharers() {
    if constexpr (S.across > 1) {
      asm volatile("barrier.sync %0, %1;" ::"r"(1 + warp_id() / S.across), "n"(S.across * kWarp) : "memory");
    }
  }

  /// Fills in `Block`, whose parts the first lanes of the warps share out.  Blocks: `HeadTurn`s, row blocks (late ones,
  /// which see the most under a causal rule, first; of packed sequences all together) × columns of v × key splits.
  FOVEA_DEVICE static void describe_block(const ForwardParams& p, Block& block) {
    if (lane_id() != 0) return;
    const bool packed = p.cu_seqlens_q.data != nullptr;
    const auto [outer, head, turn] =
        HeadTurn::of(static_cast<int>(blockIdx.x), p.heads_abreast, p.row_blocks * p.v_chunks * p.splits,
                     S.pack_gqa ? p.kv_heads : p.q_heads, packed ? 1 : p.batch);
    const int part = turn / p.row_blocks, late = p.row_blocks - 1 - (turn - part * p.row_blocks);
    const int group = S.pack_gqa ? p.group : 1;
    const auto [batch, row_block] =
        packed ? packed_block(p, p.cu_seqlens_q, p.total_q, S.block_m, late, group) : PackedBlock{outer, late};
    const Sequence sequence = Sequence::of(p, batch);
    const Rows rows{row_block * S.block_m, sequence.q_rows * group, head * group, group};
    constexpr int kRows = 16 * kM, kWarps = S.slices * S.warps;
    const int warp = slice() * S.warps + warp_id();
    if (warp < kDown) block.reach[warp] = sequence.band.reach(rows.queries(warp * kRows, (warp + 1) * kRows));
    if (warp == 0) {
      block.sequence = sequence;
      block.rows = rows;
      block.careful = false;
      if constexpr (S.dropout)
        block.stream = math::dropout_stream(p.seed, p.offset, static_cast<u32>(sequence.batch * p.q_heads + head));
    }
    int v_begin = 0, split = part;
    if (p.v_chunks > 1) {
      v_begin = part % p.v_chunks * S.head_dim_v;
      split = part / p.v_chunks;
    }
    if (warp == kWarps - 1) {
      const int kv_head = S.pack_gqa || p.group == 1 ? head : head / p.group;
      block.kv_head = kv_head, block.v_begin = v_begin, block.split = split;
      block.k = sequence.kv_row(p.k, 0, kv_head);
      block.v = sequence.kv_row(p.v, 0, kv_head) + v_begin * kBytes<S.type>;
    }
    if (warp == kWarps / 2) {
      const Interval queries = rows.queries(0, S.block_m);
      const Band::Reach reach = sequence.band.reach(queries);
      block.full = {(reach.all_begin + S.block_n - 1) / S.block_n, reach.all_end / S.block_n};
      block.keys = sequence.band.keys_of_rows(queries);
      if constexpr (S.split) {
        const int begin = split * p.keys_per_split;
        block.keys = {math::larger(block.keys.begin, begin), math::smaller(block.keys.end, begin + p.keys_per_split)};
      }
    }
  }

  // ---- the walk under a mask skips hidden tiles: a slice's first warp looks for the next visible ones, many at a time

  /// Finds the first steps of a walk from tile `last` down to `first`, and ends with a barrier.
  FOVEA_DEVICE void find_first_steps(int first, int last) const {
    if (warp_id() == 0) {
      if (lane_id() == 0) block.steps_found[slice()] = 0, block.next_tile[slice()] = last;
      __syncwarp();
      find_steps(S.stages, first);
    }
    sync_slice();
  }
  /// Before step n is walked.
  FOVEA_DEVICE void find_later_steps(int n, int first) const {
    if (S.mask && n % kLookEvery == 0 && warp_id() == 0) find_steps(n + kLookEvery + S.stages, first);
  }
  /// Looks up the mask until step n is known; a tile below `first` means that there is none.
  FOVEA_DEVICE void find_steps(int n, int first) const {
    static_assert(!S.mask || (S.stages <= 4 && kDown <= 16 && kWarp % kDown == 0));
    constexpr u32 kGroup = (1U << kDown) - 1;
    constexpr int kTiles = kWarp / kDown, kAtOnce = math::larger(16 / kTiles, 1);  // of a look; looks
    const int lane = lane_id(), rows_at = lane % kDown * 16 * kM;
    int found = block.steps_found[slice()], tile = block.next_tile[slice()];
#pragma unroll 1
    while (found <= n) {
      TileState states[kAtOnce];
#pragma unroll
      for (int look = 0; look < kAtOnce; ++look) {
        const int mine = tile - (look * kTiles + lane / kDown) * S.slices;
        states[look] =
            mask_tile<S.block_n>(p, sequence, {rows.first_head, rows.first_head + rows.group.heads},
                                 rows.queries(rows_at, rows_at + 16 * kM), math::larger(mine, 0) * S.block_n);
        if (mine < first) states[look] = TileState::kHidden;
      }
#pragma unroll
      for (int look = 0; look < kAtOnce; ++look) {
        const u32 some = __ballot_sync(kAllLanes, states[look] != TileState::kHidden) >> lane / kDown * kDown & kGroup;
        const u32 full = __ballot_sync(kAllLanes, states[look] == TileState::kFull) >> lane / kDown * kDown & kGroup;
        const bool told = lane % kDown == 0 && (some != 0 || tile < first);
        const u32 all_told = __ballot_sync(kAllLanes, told);
        if (told)
          block.steps[slice()][(found + __popc(all_told & ((1U << lane) - 1))) % kSteps] = {
              tile - lane / kDown * S.slices, some | full << 16};
        found += __popc(all_told);
        tile = math::larger(tile - kTiles * S.slices, first - 1);
      }
    }
    __syncwarp();
    if (lane == 0) block.steps_found[slice()] = found, block.next_tile[slice()] = tile;
    __syncwarp();
  }

  FOVEA_DEVICE int tile_of(int step, int without_mask) const {
    return S.mask ? block.steps[slice()][step % kSteps].tile : without_mask;
  }
  /// Whether the mask hides or keeps all of a step's tile for the warp's rows.
  FOVEA_DEVICE TileState mask_of(int n) const {
    if constexpr (!S.mask) return TileState::kFull;
    const u32 seen = block.steps[slice()][n % kSteps].seen >> warp_id() / S.across;
    return (seen & 1) == 0 ? TileState::kHidden : (seen >> 16 & 1) != 0 ? TileState::kFull : TileState::kPartial;
  }
};

}  // namespace fovea::cuda
