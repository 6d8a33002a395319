#pragma once

#include "cuda/kernels/placed.cuh"
#include "cuda/kernels/row_end.cuh"

// FlashAttention's forward (2205.14135, algorithm 1; rows split among warps as in 2307.08691): a block owns block_m
// rows and walks the keys, last ones first.  K and V arrive in shared memory a tile ahead; S, P and O in registers.
namespace fovea::cuda {

/// A tile of keys that a mask does not hide.  Bit g of `seen`: some rows of warp group g see some of the keys; bit
/// 16 + g: all of them see all.
struct MaskStep {
  int tile;
  u32 seen;
};

template <ForwardSpec S>
struct Forward {
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

  using Rows = RowMap<S.pack_gqa>;
  using Order = KeyOrder<S.block_n / S.across, S.bias>;
  using Rules = ScoreRules<S, S.pack_gqa, Order>;
  using Scores = Accumulator[kM][kN];
  using Out = Accumulator[kM][kD];
  using Share = Accumulator[kM][kEnd];

  static constexpr bool kHidesValues = S.band || S.mask || S.bias;  // a row may not see what others of its tile see

  /// Pieces of 8 keys that pass through the exponential while the products of those before are made.
  static constexpr int kChunk = S.type == Type::kFloat32 || S.across > 1 ? kN : 2 * Order::kGroups;
  static constexpr int kChunks = kN / kChunk;

  /// The softmax state of a thread's rows, 2 in each piece of 16: the reference that exponents are taken against, in
  /// units of log2 (kUnseen until a key was seen), and this lane's part of the sum.
  struct Running {
    float reference[kM][2], sum[kM][2];
    bool settled;  // every row of the warp has a reference, and keeps it
  };

  static constexpr int kSteps = 64, kLookEvery = 8;  // of the ring of `MaskStep`s, which is filled every 8 steps

  /// Below every finite score; −infinity minus this is still −infinity, not NaN.
  static constexpr float kUnseen = -3.40282347e38F;

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

  /// Each slice loads a part of the rows.
  FOVEA_DEVICE void load_q() const {
    using Part = SharedTile<S.type, S.block_m / S.slices, S.head_dim>;
    const int bytes = p.head_dim * kBytes<S.type>, begin = slice() * Part::kRows;
    const Part part{q_tile().at(begin, 0)};
    if constexpr (S.pack_gqa) {
      load_scattered_rows<S.async_copy, kThreads>(part, rows.left() - begin, bytes, p.q.aligned, [&](int r) {
        return sequence.q_row(p.q, rows.query(begin + r), rows.head(begin + r));
      });
    } else {
      load_rows<S.async_copy, kThreads>(part, rows.left() - begin, bytes, p.q.aligned,
                                        sequence.q_row(p.q, rows.first + begin, rows.first_head), p.q.row);
    }
    if constexpr (S.slices > 1) close_copies<S.async_copy>();
  }
  /// Waits until all of Q is there for all slices; kOpen: groups of copies begun since.
  template <int kOpen>
  FOVEA_DEVICE void sync_q() const {
    if constexpr (S.slices > 1) {
      await_copies<S.async_copy, kOpen>();
      __syncthreads();
    }
  }
  /// Waits for Q and splits it into TF32 halves, in place and beside it; a barrier has to follow.
  FOVEA_DEVICE void halve_q() const {
    close_copies<S.async_copy>();
    await_copies<S.async_copy, 0>();
    __syncthreads();
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) * 16; at < QTile::kSize; at += kThreads * 16) {
      const uint4 x = load_shared_16(q_tile().base + at);
      const HalvedA both = halved(OperandA{x.x, x.y, x.z, x.w});
      store_shared_16(q_tile().base + at, {both.high.x[0], both.high.x[1], both.high.x[2], both.high.x[3]});
      store_shared_16(q_rests().base + at, {both.low.x[0], both.low.x[1], both.low.x[2], both.low.x[3]});
    }
  }
  template <int kParts, class Tile>
  using Copies = RowCopies<S.async_copy, kThreads, Order, kParts, Tile>;
  FOVEA_DEVICE int keys_from(int tile) const { return sequence.band.seqlen_kv - tile * S.block_n; }
  FOVEA_DEVICE int v_bytes() const {
    return math::smaller(p.head_dim_v - block.v_begin, S.head_dim_v) * kBytes<S.type>;
  }
  template <int kParts>
  FOVEA_DEVICE Copies<kParts, KTile> k_copies(int tile, int stage) const {
    const u32 stride = static_cast<u32>(p.k.row);
    return {k_tile(stage), keys_from(tile), p.head_dim * kBytes<S.type>,
            block.first_k[slice()][threadIdx.x] + u64{static_cast<u32>(tile * S.block_n)} * stride, stride};
  }
  template <int kParts>
  FOVEA_DEVICE Copies<kParts, VTile> v_copies(int tile, int stage) const {
    const u32 stride = static_cast<u32>(p.v.row);
    return {v_tile(stage), keys_from(tile), v_bytes(),
            block.first_v[slice()][threadIdx.x] + u64{static_cast<u32>(tile * S.block_n)} * stride, stride};
  }
  /// Into how many parts to cut a tile's copies so that they fit `span` places of a product, with four copies a thread
  /// in each: ptxas puts three instructions before the first of a group.
  template <class Tile>
  FOVEA_FN static constexpr int parts_of(int span) {
    return math::larger(1, math::smaller(span, Tile::kRows * Tile::kPieces / kThreads / 4));
  }
  /// Issues the part of the copies that is due at place `at`, a constant, of a product, if one is.
  template <int kSpan, int kParts, class C>
  FOVEA_DEVICE static void issue_part(const C& copies, int at) {
    constexpr int kEvery = math::larger(1, kSpan / kParts);
    if (at >= 0 && at % kEvery == 0 && at / kEvery < kParts) copies(at / kEvery);
  }
  FOVEA_DEVICE void load_k(int tile, int stage) const {
    if (p.in_pieces) return k_copies<1>(tile, stage).all();
    load_scattered_rows<S.async_copy, kThreads, Order>(
        k_tile(stage), keys_from(tile), p.head_dim * kBytes<S.type>, p.k.aligned,
        [&](int row) { return block.k + i64{tile * S.block_n + row} * p.k.row; });
  }
  FOVEA_DEVICE void load_v(int tile, int stage) const {
    if (p.in_pieces) return v_copies<1>(tile, stage).all();
    load_scattered_rows<S.async_copy, kThreads, Order>(
        v_tile(stage), keys_from(tile), v_bytes(), p.v.aligned,
        [&](int row) { return block.v + i64{tile * S.block_n + row} * p.v.row; });
  }

  /// S = Q Kᵀ.
  template <class Between>
  FOVEA_DEVICE void multiply_qk(Scores& s, const KTile& tile, const Between& between) const {
    const int lane = fresh(lane_id());
    const auto q = corner_a(q_tile(), lane, warp_row(), 0);
    const Corner<QTile> rests = corner_a(q_rests(), lane, warp_row(), 0);
    const Corner<KTile> k = corner_b_rows(tile, lane, warp_key(), 0);
    const auto load_q = [&](int i, int c) {
      if constexpr (S.halved_q) {
        return HalvedA{load_a(q, 16 * i, c), load_a(rests, 16 * i, c)};
      } else {
        return load_a(q, 16 * i, c);
      }
    };
    multiply_steps<S, S.head_dim / kK>(
        s, load_q, [&](OperandB(&pair)[2], int j, int c) { load_b_rows(pair, k, 8 * j, c); },
        [](int) { return Accumulator{}; }, between);
  }

  /// Raises each row's reference to the largest score seen, and rescales sum and O.
  FOVEA_DEVICE void raise_references(const Scores& s, Running& running, Out& o, float unit) const {
    float tops[kM][2];
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) {
      float& top = tops[x / 2][x % 2] = -infinity();
#pragma unroll
      for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[x / 2][j].x[x % 2 * 2], s[x / 2][j].x[x % 2 * 2 + 1]));
      top = quad_max(top);
    }
    share_rows(tops, [](float a, float b) { return fmaxf(a, b); });
    running.settled = !block.careful;
    float rescale[kM][2];
    bool begun = false;  // there is something to rescale
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) {
      float& reference = running.reference[x / 2][x % 2];
      const float top = fmaxf(reference, tops[x / 2][x % 2] * unit);
      running.settled &= top > kUnseen;
      begun |= reference > kUnseen;
      rescale[x / 2][x % 2] = exp2(reference - top);
      reference = top;
    }
    running.settled = __all_sync(kAllLanes, running.settled);
    if (!__any_sync(kAllLanes, begun)) return;
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) running.sum[x / 2][x % 2] *= rescale[x / 2][x % 2];
    for_each_entry<kM, kD>([&](int i, int c, int e) { o[i][c].x[e] *= rescale[i][e / 2]; });
  }

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

  /// S of one tile of keys.  False, and nothing computed, where this warp's rows see none of them.  Rows that have a
  /// reference keep it: the search for a maximum costs more than the exponentials, and any reference gives the same
  /// result as long as sums stay in range, which `run` checks.
  template <class Between>
  FOVEA_DEVICE bool score(Scores& s, Out& o, Running& running, int n, int tile, int stage, float unit,
                          const Between& between) const {
    const int key = tile * S.block_n;
    const Sight sight{block.full.contains(tile) ? TileState::kFull
                                                : block.reach[fresh(warp_id()) / S.across].tile({key, key + S.block_n}),
                      mask_of(n)};
    if (sight.hidden()) return false;
    Entries<S, kM, kN> entries;
    rules.fetch(entries, warp_row(), key + warp_key());
    multiply_qk(s, k_tile(stage), between);
    rules.finish(s, warp_row(), key + warp_key(), sight, entries);
    if (!running.settled) {
      if (block.careful) rules.hide_by_bias(s, entries);
      raise_references(s, running, o, unit);
    }
    return true;
  }

  /// S becomes P = 2^(unit·S − reference), is summed and dropped out, in units [begin, end) of a chunk.  A unit is the
  /// four entries, two rows by two keys, that share a draw of dropout.
  FOVEA_DEVICE void weigh(Scores& s, Running& running, float unit, int key, const math::DropoutStream& stream,
                          int chunk, int begin, int end) const {
    constexpr int kPair = Order::kGroups;  // pieces from a key to the one 8 on
#pragma unroll
    for (int u = begin; u < end; ++u) {
      const int i = u / kChunk, x = u % kChunk / 2, e = u % 2;
      const int j = chunk * kChunk + x / kPair * 2 * kPair + x % kPair;
#pragma unroll
      for (int entry = 0; entry < 4; ++entry) {
        const int h = entry / 2;
        float& weight = s[i][j + entry % 2 * kPair].x[2 * h + e];
        weight = exp2(weight * unit - running.reference[i][h]);
        running.sum[i][h] += weight;
      }
      if constexpr (S.dropout) {
        rules.for_each_draw(i, j, e, warp_row(), key, stream, [&](int piece, int at, bool kept) {
          if (!kept) s[i][piece].x[at] = 0.0F;
        });
      }
    }
  }
  static constexpr int kUnits = kM * kChunk;  // of a chunk

  /// P of a tile, and O += P V: while the tensor cores have one chunk of keys, the next passes through the exponential.
  template <class Between>
  FOVEA_DEVICE void add_values(Out& o, Scores& s, Running& running, int tile, int stage, float unit,
                               const Between& between) const {
    const int key = tile * S.block_n + warp_key();
    const math::DropoutStream stream = S.dropout ? uniform(block.stream) : math::DropoutStream{};
    weigh(s, running, unit, key, stream, 0, 0, kUnits);
    const Corner<VTile> v = corner_b_columns(v_tile(stage), fresh(lane_id()), 0, warp_column());
    const auto load_v = [&](OperandB(&pair)[2], int c, int k) { load_b_columns(pair, v, k, 8 * c); };
    if constexpr (S.across == 1) {
      multiply_steps<S, S.block_n / kK, true>(
          o, [&](int i, int k) { return operand_a<S.type>(s[i], k / kK); }, load_v, OnTop{},
          [&](int step, int c) {
            constexpr int kSteps = kChunk * 8 / kK, kParts = kSteps * kD / 2;  // of a chunk
            const int next = step / kSteps + 1, part = step % kSteps * (kD / 2) + c / 2;
            if (next < kChunks)
              weigh(s, running, unit, key, stream, next, part * kUnits / kParts, (part + 1) * kUnits / kParts);
            between(step, c);
          });
    } else {
      store_accumulators(corner_c<kN>(weight_tile(), lane_id(), warp_row(), warp_key()), s);
      sync_row_sharers();
      const Corner<WeightTile> weights = corner_a<true>(weight_tile(), fresh(lane_id()), warp_row(), 0);
      multiply_steps<S, S.block_n / kK>(
          o, [&](int i, int k) { return load_a<true>(weights, 16 * i, k); }, load_v, OnTop{}, between);
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
            mask_tile<S.block_n>(p, sequence, {rows.first_head, rows.first_head + rows.group},
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

  /// A slice's tiles of keys arrive stages − 1 ahead, last ones first.
  FOVEA_DEVICE void walk_ahead(Out& o, Running& running, int first, int last, float unit) const {
    // Copies of K, then of V, are issued during the first half of the product for S, if it has halves.
    constexpr bool kSpread = S.spread_copies && S.head_dim / kK >= 2;
    constexpr int kSpan = math::larger(1, S.head_dim / kK / 4), kKParts = parts_of<KTile>(kSpan),
                  kVParts = parts_of<VTile>(kSpan);
    const auto load = [&](int tile, int stage) { load_k(tile, stage), load_v(tile, stage); };
#pragma unroll
    for (int ahead = 0; ahead < S.stages - 1; ++ahead) {
      const int tile = tile_of(ahead, last - ahead * S.slices);
      if (tile >= first) load(tile, ahead);
      close_copies<S.async_copy>();
    }
    sync_q<S.stages - 1>();
    int stage = 0, n = 0;
#pragma unroll 1
    for (int tile = tile_of(0, last); tile >= first; tile = tile_of(++n, tile - S.slices)) {
      await_copies<S.async_copy, math::larger(S.stages - 2, 0)>();
      sync_slice();  // this tile is there for all, and all are done with the one whose place comes next
      const int ahead = tile_of(n + S.stages - 1, tile - (S.stages - 1) * S.slices);
      const int free = stage == 0 ? S.stages - 1 : stage - 1;
      bool copy = ahead >= first;
      if (copy && !(kSpread && p.in_pieces)) {
        load(ahead, free);
        copy = false;
      }
      find_later_steps(n, first);
      Scores s;
      bool seen;
      if constexpr (kSpread) {
        const auto k = k_copies<kKParts>(ahead, free);
        const auto v = v_copies<kVParts>(ahead, free);
        seen = score(s, o, running, n, tile, stage, unit, [&](int step, int j) {
          if (j == 0 && copy) issue_part<kSpan, kKParts>(k, step), issue_part<kSpan, kVParts>(v, step - kSpan);
        });
        if (!seen && copy) k.all(), v.all();
      } else {
        seen = score(s, o, running, n, tile, stage, unit, Nothing{});
      }
      close_copies<S.async_copy>();
      if (seen) add_values(o, s, running, tile, stage, unit, Nothing{});
      stage = stage + 1 == S.stages ? 0 : stage + 1;
    }
  }

  /// With one place for K and one for V: V arrives during the product for S, the next K during P V.  Copies are issued
  /// in the first quarter of either product.
  FOVEA_DEVICE void walk_in_turns(Out& o, Running& running, int first, int last, float unit) const {
    constexpr int kVSpan = S.head_dim / kK * kN / 2 / 4, kVParts = parts_of<VTile>(kVSpan);
    constexpr int kKSpan = S.block_n / kK * kD / 2 / 4, kKParts = parts_of<KTile>(kKSpan);
    const int begin = tile_of(0, last);
    if (begin >= first) load_k(begin, 0);
    close_copies<S.async_copy>();
    if (begin >= first) load_v(begin, 0);
    close_copies<S.async_copy>();
    sync_q<2>();
    int n = 0;
#pragma unroll 1
    for (int tile = begin; tile >= first; tile = tile_of(++n, tile - S.slices)) {
      if (tile == begin) {
        await_copies<S.async_copy, 1>();
      } else {
        await_copies<S.async_copy, 0>();
      }
      sync_slice();  // K is there for all, and all are done with V
      if (tile < begin && !p.in_pieces) load_v(tile, 0);
      const auto v = v_copies<kVParts>(tile, 0);
      const bool copy_v = tile < begin && p.in_pieces;
      find_later_steps(n, first);
      Scores s;
      const bool seen = score(s, o, running, n, tile, 0, unit, [&](int step, int j) {
        if (copy_v) issue_part<kVSpan, kVParts>(v, (step * kN + j) / 2);
      });
      if (!seen && copy_v) v.all();
      close_copies<S.async_copy>();
      await_copies<S.async_copy, 0>();
      sync_slice();  // V is there for all, and all are done with K
      const int next = tile_of(n + 1, tile - S.slices);
      if (next >= first && !p.in_pieces) load_k(next, 0);
      const auto k = k_copies<kKParts>(next, 0);
      const bool copy_k = next >= first && p.in_pieces;
      if (seen) {
        add_values(o, s, running, tile, 0, unit, [&](int step, int c) {
          if (copy_k) issue_part<kKSpan, kKParts>(k, (step * kD + c) / 2);
        });
      } else if (copy_k) {
        k.all();
      }
      close_copies<S.async_copy>();
    }
  }

  FOVEA_DEVICE void run() const {
    const int first = block.keys.begin / S.block_n;
    const int last = block.keys.empty() ? first - 1 : (block.keys.end - 1) / S.block_n;
    const float unit = score_unit<S>(p);
    if constexpr (!S.in_place) {
      if (first <= last) load_q();
    }
    if constexpr (S.halved_q) halve_q();
    Out o;
    Running running;
    // A second time, with references that follow the maximum, where a sum left its range or something is not finite.
#pragma unroll 1
    for (;;) {
      clear(o);
#pragma unroll
      for (int x = 0; x < 2 * kM; ++x) running.reference[x / 2][x % 2] = kUnseen, running.sum[x / 2][x % 2] = 0.0F;
      running.settled = false;
      if (first <= last) {
        if constexpr (S.mask) find_first_steps(first, last - slice());
        if constexpr (S.stages == 1) {
          walk_in_turns(o, running, first, last - slice(), unit);
        } else {
          walk_ahead(o, running, first, last - slice(), unit);
        }
      }
      await_copies<S.async_copy, 0>();
      if (!__syncthreads_or(!block.careful && !in_range(o, running))) break;
      block.careful = true;
      __syncthreads();
    }
    each_row([&](int i, int h, int) { running.sum[i][h] = quad_sum(running.sum[i][h]); });
    share_rows(running.sum, [](float a, float b) { return a + b; });
    if constexpr (S.slices == 1) {
      finish(o, running);
    } else {
      Share share;
      join_slices(share, o, running);
      finish(share, running);
    }
  }

  /// Combines references, sums and O of all slices; of O each slice gets a share of the columns.
  FOVEA_DEVICE void join_slices(Share& share, const Out& o, Running& running) const {
    constexpr int kFacts = 4 * S.head_dim_v;  // behind a row
    const auto left_by = [&](int slice, int r) { return ring_of(slice) + r * left_pitch(S); };
    const u32 lane_column = lane_id() % 4 * 2;
    each_row([&](int i, int h, int r) {
      const u32 mine = left_by(slice(), r);
#pragma unroll
      for (int c = 0; c < kD; ++c)
        store_shared_8(mine + 4 * (8 * c + lane_column), o[i][c].x[2 * h], o[i][c].x[2 * h + 1]);
      if (lane_column == 0) store_shared_8(mine + kFacts, running.reference[i][h], running.sum[i][h]);
    });
    clear(share);
    __syncthreads();
    each_row([&](int i, int h, int r) {
      float &top = running.reference[i][h], &sum = running.sum[i][h];
      top = kUnseen, sum = 0.0F;
#pragma unroll
      for (int s = 0; s < S.slices; ++s) top = fmaxf(top, __uint_as_float(load_shared(left_by(s, r) + kFacts)));
#pragma unroll
      for (int s = 0; s < S.slices; ++s) {
        const u32 row = left_by(s, r);
        const float2 facts = load_shared_8(row + kFacts);
        const float weight = exp2(facts.x - top);
        sum += weight * facts.y;
#pragma unroll
        for (int c = 0; c < kEnd; ++c) {
          const float2 x = load_shared_8(row + 4 * (8 * (slice() * kEnd + c) + lane_column));
          share[i][c].x[2 * h] += weight * x.x;
          share[i][c].x[2 * h + 1] += weight * x.y;
        }
      }
    });
    __syncthreads();  // rings may be written again
  }

  /// Whether no weight is so large that the distance to its reference cost digits: below 2^32 an exponent is accurate
  /// to 2^-20, and fp32 needs more than 16-bit results do.
  FOVEA_DEVICE bool in_range(const Out& o, const Running& running) const {
    constexpr float kMost = S.type == Type::kFloat32 ? 0x1p7F : 0x1p14F;  // of a sum, a key
    const float most = kMost * static_cast<float>(block.keys.end - block.keys.begin + 64);
    bool fits = true;
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) fits &= running.sum[x / 2][x % 2] < most;
    float check[4] = {};
    for_each_entry<kM, kD>([&](int i, int c, int e) { check[e] += o[i][c].x[e] * 0.0F; });
    return fits && check[0] + check[1] + check[2] + check[3] == 0.0F;
  }

  /// Divides by the sums and writes O and lse, or this split's part of them.
  FOVEA_DEVICE void finish(Share& o, Running& running) const {
    float factors[kM][2];
    bool empty = false;
    if constexpr (S.split) {
      each_row([&](int i, int h, int r) {
        if (r < rows.left()) store_part(o[i], h, r, running.reference[i][h], running.sum[i][h]);
        factors[i][h] = 1.0F;
      });
    } else {
      empty = end_rows(running, factors);
    }
    if (kHidesValues && block.careful)
      each_row([&](int i, int h, int r) { keep_row_facts(o[i], h, r, running.reference[i][h], factors[i][h]); });
    if constexpr (!S.split) {
      for_each_entry<kM, kEnd>([&](int i, int c, int e) { o[i][c].x[e] *= factors[i][e / 2]; });
      if (empty) {  // O of such a row is 0, whatever was added to it
        for_each_entry<kM, kEnd>([&](int i, int c, int e) {
          if (factors[i][e / 2] == 0.0F) o[i][c].x[e] = 0.0F;
        });
      }
      store_out(o);
    }
    __syncwarp();
    if (kHidesValues && block.careful) mend_rows();
  }

  /// Adds sinks and writes lse; `factors` is what rows of O are to be multiplied by, 0 for an empty one.  Each lane of
  /// a quad does this for one of the quad's rows.  Returns whether some row of the warp is empty.
  FOVEA_DEVICE bool end_rows(const Running& running, float (&factors)[kM][2]) const {
    const int lane = lane_id();
    bool empty = false;
#pragma unroll
    for (int first = 0; first < 2 * kM; first += 4) {
      float reference = running.reference[first / 2][0], sum = running.sum[first / 2][0];
#pragma unroll
      for (int x = first + 1; x < math::smaller(first + 4, 2 * kM); ++x) {
        const int i = x / 2, h = x % 2;  // fresh: else the choice is one of addresses in local memory
        reference = lane % 4 == x - first ? fresh(running.reference[i][h]) : reference;
        sum = lane % 4 == x - first ? fresh(running.sum[i][h]) : sum;
      }
      const int x = first + lane % 4, r = warp_row() + entry_row(x / 2, x % 2 * 2);
      float factor = 0.0F;
      if (x < 2 * kM && r < rows.left()) {
        const RowEnd end = end_of_row<S>(p, rows.head(r), reference, sum);
        empty |= end.empty;
        factor = end.empty ? 0.0F : end.factor;
        if (p.lse.data != nullptr && first_column() == 0)
          *sequence.statistic(p.lse, rows.query(r), rows.head(r)) = end.lse;
      }
#pragma unroll
      for (int y = first; y < math::smaller(first + 4, 2 * kM); ++y)
        factors[y / 2][y % 2] = __shfl_sync(kAllLanes, factor, lane / 4 * 4 + y - first);
    }
    return __any_sync(kAllLanes, empty);
  }

  // ---- rows that are not finite (a hidden entry has weight 0, but 0 · NaN is NaN) are recomputed from visible keys
  // alone

  /// {reference, factor, not finite} of a row, as a warp sees it.
  FOVEA_DEVICE u32 facts_at(int r) const {
    return k_tile(0).base + static_cast<u32>(r * S.across + warp_id() % S.across) * 16;
  }

  FOVEA_DEVICE void keep_row_facts(const Accumulator (&o)[kEnd], int h, int r, float reference, float factor) const {
    float check = 0.0F;
#pragma unroll
    for (int c = 0; c < kEnd; ++c) check += o[c].x[2 * h] * 0.0F + o[c].x[2 * h + 1] * 0.0F;
    const bool finite = quad_sum(check) == 0.0F;
    if (lane_id() % 4 == 0)
      store_shared_16(facts_at(r), {__float_as_uint(reference), __float_as_uint(factor), finite ? 0U : 1U, 0U});
  }

  FOVEA_DEVICE void mend_rows() const {
#pragma unroll 1
    for (int r = warp_row(); r < math::smaller(warp_row() + 16 * kM, rows.left()); ++r) {
      const uint4 facts = load_shared_16(facts_at(r));
      if (facts.z != 0) mend_row(r, __uint_as_float(facts.x), __uint_as_float(facts.y));
    }
  }

  FOVEA_DEVICE void mend_row(int r, float reference, float factor) const {
    const int head = rows.head(r), query = rows.query(r), begin = first_column();
    cuda::mend_row<S, 8 * kEnd>(rules, block.keys, block.kv_head, r, reference, factor, begin,
                                math::smaller(begin + 8 * kEnd, p.head_dim_v), [&](int column, float x) {
                                  if constexpr (S.split) {
                                    part_of(query, head)[column - block.v_begin] = x;
                                  } else {
                                    write<S.type>(sequence.q_row(p.out, query, head) + column * kBytes<S.type>, x);
                                  }
                                });
  }

  FOVEA_DEVICE static int end_column() { return warp_column() + slice() * kEnd * 8; }  // of O, of this warp's share
  FOVEA_DEVICE int first_column() const { return block.v_begin + end_column(); }       // of v
  /// Calls f(i, h, r) for each of a lane's rows, r of the block.
  template <class F>
  FOVEA_DEVICE static void each_row(const F& f) {
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) f(x / 2, x % 2, warp_row() + entry_row(x / 2, x % 2 * 2));
  }
  FOVEA_DEVICE static int entry_row(int i, int e) { return 16 * i + lane_id() / 4 + e / 2 * 8; }

  FOVEA_DEVICE float* part_of(int query, int head) const {
    const i64 row = (i64{sequence.batch} * p.q_heads + head) * p.seqlen_q + query;
    const int chunk = block.v_begin / S.head_dim_v;
    return p.partials + ((row * p.v_chunks + chunk) * p.splits + block.split) * (S.head_dim_v + kPartFacts);
  }
  FOVEA_DEVICE void store_part(const Accumulator (&o)[kEnd], int h, int r, float reference, float sum) const {
    float* part = part_of(rows.query(r), rows.head(r));
#pragma unroll
    for (int c = 0; c < kEnd; ++c) {
      const int column = end_column() + 8 * c + lane_id() % 4 * 2;
      *reinterpret_cast<float2*>(part + column) = {o[c].x[2 * h], o[c].x[2 * h + 1]};
    }
    if (end_column() == 0 && lane_id() % 4 == 0) *reinterpret_cast<float2*>(part + S.head_dim_v) = {reference, sum};
  }

  /// Through shared memory, so that rows are written in whole pieces of 16 bytes.
  FOVEA_DEVICE void store_out(const Share& o) const {
    const OutTile tile = out_tile();
    store_accumulators(corner_c<kEnd>(tile, lane_id(), warp_row(), 0), o, end_column());
    __syncwarp();  // a warp stores what it has put there
    constexpr int kPieces = OutTile::kPieces / S.across / S.slices, kLanes = kPieces >= 8 ? 8 : kPieces >= 4 ? 4 : 2;
    const int bytes = math::smaller(p.head_dim_v - first_column(), 8 * kEnd) * kBytes<S.type>;
    const int lane = lane_id() % kLanes, begin = warp_row() + lane_id() / kLanes;
    const auto row_at = [&](int r) {
      return sequence.q_row(p.out, rows.query(r), rows.head(r)) + first_column() * kBytes<S.type> + lane * 16;
    };
    char* to = row_at(begin);
#pragma unroll 4
    for (int r = begin; r < math::smaller(warp_row() + 16 * kM, rows.left()); r += kWarp / kLanes) {
      if (S.pack_gqa && r > begin) to = row_at(r);
#pragma unroll
      for (int at = 0; at < kPieces; at += kLanes) {
        if (bytes > (at + lane) * 16) {
          write_piece(to + at * 16, load_shared_16(tile.at(r, end_column()) + (at + lane) * 16),
                      bytes - (at + lane) * 16, p.out.aligned);
        }
      }
      if (!S.pack_gqa) to += kWarp / kLanes * p.out.row;
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
};

/// Blocks: `describe_block`.
template <ForwardSpec S>
__device__ void forward(const ForwardParams& p) {
  using Kernel = Forward<S>;
  extern __shared__ __align__(128) char shared[];
  if constexpr (S.split) let_next_kernel_begin();
  static_assert(sizeof(typename Kernel::Block) <= block_bytes(S));
  typename Kernel::Block& block = *reinterpret_cast<typename Kernel::Block*>(shared + shared_bytes(S) - block_bytes(S));
  Kernel::describe_block(p, block);
  __syncthreads();
  block.first_k[Kernel::slice()][threadIdx.x] =
      block.k + Kernel::template Copies<1, typename Kernel::KTile>::first_byte(static_cast<u32>(p.k.row));
  block.first_v[Kernel::slice()][threadIdx.x] =
      block.v + Kernel::template Copies<1, typename Kernel::VTile>::first_byte(static_cast<u32>(p.v.row));
  if (block.rows.left() > 0) Kernel{p, block, shared_address(shared)}.run();
}

}  // namespace fovea::cuda
