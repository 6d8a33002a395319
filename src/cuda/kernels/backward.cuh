#pragma once

#include "cuda/kernels/backward_walk.cuh"

// FlashAttention's backward (2205.14135, algorithm 4; 2307.08691, algorithm 2): a block owns block_n keys of a kv head
// and walks the rows of all heads that read them.  P and dS reach the other products through shared memory; dk and dv
// stay in registers; dq is added to dq_sum, which `backward_queries` turns into dq.
namespace fovea::cuda {

// dq_sum holds, tile by tile of rows, the 16 × 8 pieces of the warps' shares, each as accumulators: lane by lane where
// four floats are added at once, else entry by entry, so that each addition of a warp covers contiguous memory.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kVectorReduction = true;
#else
inline constexpr bool kVectorReduction = false;
#endif

/// Adds a warp's accumulators to a piece of dq_sum.  kKeep: L2 is to keep it rather than other data.
template <bool kKeep = false>
FOVEA_DEVICE void reduce(float* piece, const Accumulator& c) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kKeep) {
    asm volatile(
        "red.relaxed.gpu.global.add.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(piece + 4 * lane_id()),
        "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]), "f"(c.x[3]), "l"(static_cast<u64>(Keep::kYes))
        : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(piece + 4 * lane_id()), "f"(c.x[0]),
                 "f"(c.x[1]), "f"(c.x[2]), "f"(c.x[3])
                 : "memory");
  }
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(piece + 32 * e + lane_id(), c.x[e]);
#endif
}

template <BackwardSpec S>
struct Backward {
  static constexpr int kThreads = S.warps * kWarp;
  static constexpr BackwardShared kShared = BackwardShared::of(S);
  /// Half of the warps make the scores of a tile while the others make the products of the one before.
  static constexpr bool kLeapfrog = S.stages == 3;

  using Order = typename GradientTile<S>::Order;
  using KTile = Tile<S.type, S.block_n, S.head_dim, swizzles(S, S.head_dim)>;
  using VTile = Tile<S.type, S.block_n, S.head_dim_v, swizzles(S, S.head_dim_v)>;
  using QTile = Tile<S.type, S.block_m, S.head_dim, swizzles(S, S.head_dim)>;
  using DoutTile = Tile<S.type, S.block_m, S.head_dim_v, swizzles(S, S.head_dim_v)>;
  using EntryTile = Tile<S.type, S.block_m, S.block_n>;  // P, dS
  static_assert(EntryTile::kSize == entry_bytes(S));

  /// A warp's piece of a product that all warps share.  Its columns are side by side, or every `across`th 16 of them
  /// where steps among others would carry.
  template <int kRows, int kColumns>
  struct Share {
    static constexpr WarpGrid kGrid = WarpGrid::of(kRows, kColumns, S.warps);
    static constexpr int kM = kGrid.rows / 16, kN = kGrid.columns / 8;
    static constexpr bool kDealt = !is_power_of_2(kColumns) && swizzled(S.type, kColumns) && !S.in_place;
    Accumulator c[kM][kN];

    FOVEA_DEVICE static bool works() { return kGrid.used == S.warps || warp_id() < kGrid.used; }
    FOVEA_DEVICE static int row() { return fresh(warp_id()) / kGrid.across * kGrid.rows; }
    FOVEA_DEVICE static int column() { return fresh(warp_id()) % kGrid.across * (kDealt ? 16 : kGrid.columns); }
    /// From there to the j-th 8 columns.
    FOVEA_DEVICE static constexpr int offset(int j) { return kDealt ? j / 2 * kGrid.across * 16 + j % 2 * 8 : 8 * j; }
  };
  using Dk = Share<S.block_n, S.head_dim>;
  using Dv = Share<S.block_n, S.head_dim_v>;
  struct Dq : Share<S.block_m, S.head_dim> {
    using Share<S.block_m, S.head_dim>::kM, Share<S.block_m, S.head_dim>::kN;
    static constexpr int kFloats = kM * kN * 128;  // of a warp
    static constexpr int kOfRow = S.head_dim / 8;  // pieces
    /// The place in dq_sum, in floats, of a tile's piece in row `i` and column `j` of pieces: warp by warp, or, where
    /// columns are dealt, row by row.
    FOVEA_DEVICE static int piece(int i, int j) {
      if constexpr (Dq::kDealt) return (i * kOfRow + j) * 128;
      return (((i / kM * Dq::kGrid.across + j / kN) * kM + i % kM) * kN + j % kN) * 128;
    }
    /// Of the n-th piece there.
    FOVEA_DEVICE static int row_of(int n) {
      return Dq::kDealt ? n / kOfRow : n / (kM * kN * Dq::kGrid.across) * kM + n / kN % kM;
    }
    FOVEA_DEVICE static int column_of(int n) {
      return Dq::kDealt ? n % kOfRow : n / (kM * kN) % Dq::kGrid.across * kN + n % kN;
    }
    /// Where this warp's pieces begin there, and from there each of them.
    FOVEA_DEVICE static int first_piece() {
      return Dq::kDealt ? piece(Dq::row() / 16, Dq::column() / 8) : warp_id() * kFloats;
    }
    FOVEA_DEVICE static constexpr int own_piece(int i, int j) {
      return (Dq::kDealt ? i * kOfRow + Dq::offset(j) / 8 : i * kN + j) * 128;
    }
  };

  /// What a block sums over its tiles of rows.
  struct Sums {
    Dk dk;
    Dv dv;
    float slope = 0.0F;  // a thread's part, of the head at hand
  };

  const BackwardParams& p;
  Walk<S>& walk;
  const Sequence& sequence;
  const u32 shared;

  FOVEA_DEVICE int key() const { return walk.key_block * S.block_n; }
  FOVEA_DEVICE const Step& step(int n) const { return walk.steps[n & 3]; }
  FOVEA_DEVICE bool full(int n) const { return step(n).template full<S.mask>(); }
  template <class T>
  FOVEA_DEVICE T tile_at(int offset) const {
    return {fresh(shared) + offset};
  }
  template <int kDim>
  FOVEA_DEVICE auto place_keys(const RowView& view, int keys, int columns) const {
    return place_tile<S.type, kDim, Order>(sequence.kv_row(view, key(), walk.head_of_keys(p)), view.row, keys - key(),
                                           columns);
  }
  template <int kDim>
  FOVEA_DEVICE auto place_rows(const char* first, i64 stride, int tile, int columns) const {
    return place_tile<S.type, kDim>(first, stride, sequence.band.seqlen_q - tile * S.block_m, columns);
  }
  FOVEA_DEVICE auto k_tile() const {
    if constexpr (S.in_place) return place_keys<S.head_dim>(p.k, sequence.band.seqlen_kv, p.head_dim);
    if constexpr (!S.in_place) return tile_at<KTile>(kShared.k);
  }
  FOVEA_DEVICE auto v_tile() const {
    if constexpr (S.in_place) return place_keys<S.head_dim_v>(p.v, sequence.band.seqlen_kv, p.head_dim_v);
    if constexpr (!S.in_place) return tile_at<VTile>(kShared.v);
  }
  FOVEA_DEVICE auto q_tile(const Step& at, int stage) const {
    if constexpr (S.in_place) return place_rows<S.head_dim>(at.q, p.q.row, at.tile, p.head_dim);
    if constexpr (!S.in_place) return tile_at<QTile>(kShared.ring + stage * kShared.stage);
  }
  FOVEA_DEVICE auto dout_tile(const Step& at, int stage) const {
    if constexpr (S.in_place) return place_rows<S.head_dim_v>(at.dout, p.dout.row, at.tile, p.head_dim_v);
    if constexpr (!S.in_place) return tile_at<DoutTile>(kShared.ring + stage * kShared.stage + kShared.dout);
  }
  FOVEA_DEVICE EntryTile weights(int n) const {
    return tile_at<EntryTile>(kShared.weights + (kLeapfrog ? n & 1 : 0) * kShared.entries);
  }
  FOVEA_DEVICE EntryTile ds_tile(int n) const {
    return tile_at<EntryTile>(kShared.ds + (kLeapfrog ? n & 1 : 0) * kShared.entries);
  }
  FOVEA_DEVICE u32 statistics(int stage) const {
    return fresh(shared) + kShared.ring + stage * kShared.stage + kShared.statistics;
  }

  FOVEA_DEVICE void load_keys() const {
    const int keys = sequence.band.seqlen_kv - key();
    load_rows<S.async_copy, kThreads, Order>(k_tile(), keys, p.head_dim * kBytes<S.type>, p.k.aligned,
                                             sequence.kv_row(p.k, key(), walk.head_of_keys(p)), p.k.row);
    load_rows<S.async_copy, kThreads, Order>(v_tile(), keys, p.head_dim_v * kBytes<S.type>, p.v.aligned,
                                             sequence.kv_row(p.v, key(), walk.head_of_keys(p)), p.v.row);
  }
  /// Starts the copies of a tile of rows, if there is one, and writes the step after it.
  FOVEA_DEVICE void load(int n) const {
    const Step& at = step(n);
    if (at.exists) {
      const int stage = at.stage, rows = sequence.band.seqlen_q - at.tile * S.block_m;
      load_rows<S.async_copy, kThreads>(q_tile(at, stage), rows, p.head_dim * kBytes<S.type>, p.q.aligned, at.q,
                                        p.q.row);
      load_rows<S.async_copy, kThreads>(dout_tile(at, stage), rows, p.head_dim_v * kBytes<S.type>, p.dout.aligned,
                                        at.dout, p.dout.row);
      static_assert(S.block_m / 2 <= kThreads);
      if (const int x = static_cast<int>(threadIdx.x); x < S.block_m / 2) {  // log2_lse, then delta
        const float* from = (x < S.block_m / 4 ? p.log2_lse : p.delta) + at.slot * S.block_m + x % (S.block_m / 4) * 4;
        copy_or_clear<S.async_copy>(statistics(stage) + x * 16, reinterpret_cast<const char*>(from), true);
      }
    }
    close_copies<S.async_copy>();
    if (walk.keeps()) walk.write(p, n + 1, step(n), false);
  }

  FOVEA_DEVICE void run() const {
    Sums sums;
    clear(sums.dk.c);
    clear(sums.dv.c);
    load_keys();
    if (walk.keeps()) walk.begin(p), walk.write(p, 0, step(0), true);
    __syncthreads();
    if constexpr (S.alibi) clear_slope_parts();
    load(0);
    if constexpr (kLeapfrog) {
      leapfrog(sums);
    } else {
      alternate(sums);
    }
    await_copies<S.async_copy, 0>();
    __syncthreads();
    store(sums.dk, sums.dv);
  }

  /// All warps make the scores of a tile, then all its products; the next tile's rows arrive meanwhile, or while dq
  /// is made where there is room for one tile only.
  FOVEA_DEVICE void alternate(Sums& sums) const {
    int n = 0;
#pragma unroll 1
    for (; step(n).exists; ++n) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // this tile is there for all, and nobody still reads the last one
      if constexpr (S.deterministic) pass_turn(n - 1);
      if constexpr (S.stages == 2) load(n + 1);
      const bool spoiled = sync_or(!full(n), scores(n, sums));
      products(n, sums, spoiled);
    }
    if constexpr (S.deterministic) {
      __syncthreads();
      pass_turn(n - 1);
    }
  }

  /// One barrier a tile.  Between two of them each warp makes the products of one tile and the scores of the next; the
  /// first half of the warps in this order, the others in the opposite one, so that tensor cores have work while scores
  /// pass through the exponential.
  FOVEA_DEVICE void leapfrog(Sums& sums) const {
    bool spoiled = false;
#pragma unroll 1
    for (int n = 0;; ++n) {
      await_copies<S.async_copy, 0>();
      const bool careful = sync_or(n > 0 && !full(n - 1), spoiled);  // behind it nobody still reads tile n − 2
      if constexpr (S.deterministic) pass_turn(n - 2);
      load(n + 1);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        if ((half == 0) == (warp_id() < S.warps / 2)) {
          if (n > 0) products(n - 1, sums, careful);
        } else if (step(n).exists) {
          spoiled = scores(n, sums);
        }
      }
      if (!step(n).exists) {
        if constexpr (S.deterministic) {
          __syncthreads();
          pass_turn(n - 1);
        }
        return;
      }
    }
  }

  /// A barrier; whether some thread says yes, if it matters.
  FOVEA_DEVICE static bool sync_or(bool matters, bool yes) {
    if (S.bias || matters) return __syncthreads_or(yes);
    __syncthreads();
    return false;
  }

  /// P and dS of a tile, to shared memory; whether a hidden entry may have met something that is not finite.
  FOVEA_DEVICE bool scores(int n, Sums& sums) const {
    if constexpr (!S.bias) {
      if (full(n)) return scores<false>(n, sums);
    }
    return scores<true>(n, sums);
  }
  template <bool kHides>
  FOVEA_DEVICE bool scores(int n, Sums& sums) const {
    GradientTile<S> tile;
    if (!tile.works()) return false;
    const Step& at = step(fresh(n));  // else its address would take a register over the products
    const int stage = at.stage;
    const RowMap<Packing::kNone> rows{at.tile * S.block_m, sequence.q_rows, at.head, 1};
    const typename GradientTile<S>::Rules rules{p, sequence, rows};
    const math::DropoutStream stream = S.dropout ? uniform(at.stream) : math::DropoutStream{};
    const bool spoiled = tile.template compute<kHides>(
        q_tile(at, stage), k_tile(), dout_tile(at, stage), v_tile(), statistics(stage), rules, key(),
        Sight{at.full_band ? TileState::kFull : TileState::kPartial, S.mask ? at.mask : TileState::kFull}, stream);
    if constexpr (S.alibi) {
      tile.each([&](int i, int j, int e) {
        const int r = tile.row() + rules.row_of(i, e), c = key() + tile.column() + rules.key_of(j, e);
        sums.slope -= tile.ds[i][j].x[e] * rules.distance(r, c);
      });
      if (const Step& next = step(n + 1); !next.exists || next.head != at.head) store_slope_part(at.head, sums.slope);
    }
    tile.pass_softcap();
    const int lane = fresh(lane_id());
    store_accumulators(corner_c<GradientTile<S>::kN>(weights(n), lane, tile.row(), tile.column()), tile.p);
    store_accumulators(corner_c<GradientTile<S>::kN>(ds_tile(n), lane, tile.row(), tile.column()), tile.ds);
    return spoiled;
  }

  /// What a tile adds to dv, dk and dq.
  FOVEA_DEVICE void products(int n, Sums& sums, bool careful) const {
    if (careful) {
      products<true>(n, sums);
    } else {
      products<false>(n, sums);
    }
  }
  template <bool kCareful>
  FOVEA_DEVICE void products(int n, Sums& sums) const {
    const Step& at = step(n);
    const int stage = at.stage;
    const int lane = fresh(lane_id());
    // Additions to many columns at once would delay the loads of the products, so they come in halves.  But a block
    // that waits for its turn adds last, and with one stage the next rows arrive while dq is made.
    constexpr bool kInHalves = S.head_dim > 128, kLast = S.deterministic || S.stages == 1;
    constexpr int kHalf = kInHalves ? Dq::kN / 4 * 2 : 0;
    if constexpr (kHalf > 0 && !kLast) add_dq<kCareful, 0, kHalf>(n, lane);
    add_columns<kCareful>(sums.dv, weights(n), dout_tile(at, stage), lane);
    if constexpr (kInHalves && !kLast) add_dq<kCareful, kHalf, Dq::kN>(n, lane);
    add_columns<kCareful>(sums.dk, ds_tile(n), q_tile(at, stage), lane);
    if constexpr (S.stages == 1) {
      __syncthreads();
      load(n + 1);
    }
    if constexpr (kHalf > 0 && kLast) add_dq<kCareful, 0, kHalf>(n, lane);
    if constexpr (!kInHalves || kLast) add_dq<kCareful, kHalf, Dq::kN>(n, lane);
    if constexpr (S.deterministic) __threadfence();
  }

  /// What a tile adds to dq, of columns [kBegin, kEnd) of a warp's pieces.
  template <bool kCareful, int kBegin, int kEnd>
  FOVEA_DEVICE void add_dq(int n, int lane) const {
    if (!Dq::works()) return;
    Accumulator dq[Dq::kM][kEnd - kBegin];
    constexpr int kFrom = Dq::kDealt ? 0 : Dq::offset(kBegin);  // from dealt columns' first steps do not carry
    const int column = Dq::column() + kFrom;
    struct Columns {
      FOVEA_DEVICE static constexpr int offset(int j) { return Dq::offset(kBegin + j) - kFrom; }
    };
    const EntryTile ds = ds_tile(n);
    const auto k_columns = k_tile();
    if constexpr (kCareful) {
      clear(dq);
      multiply_seen<S.block_n, Columns>(
          dq, Dq::row(), column, [&](int k, int row) { return read_entry(ds, row, k); },
          [&](int k, int at) { return read_entry(k_columns, k, at); });
    } else {
      const auto a = corner_a<true>(ds, lane, Dq::row(), 0);
      const auto b = corner_b_columns(k_columns, lane, 0, column);
      multiply_steps<S, S.block_n / kStep<S.type>>(
          dq, [&](int i, int k) { return load_a<true>(a, 16 * i, k); },
          [&](OperandB(&pair)[2], int j, int k) { load_b_columns(pair, b, k, Columns::offset(j)); },
          [](int) { return Accumulator{}; });
    }
    if constexpr (S.deterministic && kBegin == 0) Turn::await(p, step(n));
    float* const sum = p.dq_sum + step(n).slot * (S.block_m * S.head_dim) + Dq::first_piece();
#pragma unroll
    for (int i = 0; i < Dq::kM; ++i) {
#pragma unroll
      for (int j = kBegin; j < kEnd; ++j) reduce(sum + Dq::own_piece(i, j), dq[i][j - kBegin]);
    }
  }

  /// C += (entries)ᵀ · rows: dv from P and dout, dk from dS and q.
  template <bool kCareful, class C, class RowTile>
  FOVEA_DEVICE static void add_columns(C& sum, const EntryTile& entries, const RowTile& rows, int lane) {
    if (!C::works()) return;
    if constexpr (kCareful) {
      multiply_seen<S.block_m, C>(
          sum.c, C::row(), C::column(), [&](int k, int row) { return read_entry(entries, k, row); },
          [&](int k, int column) { return read_entry(rows, k, column); });
    } else {
      const auto a = corner_a_columns(entries, lane, 0, C::row());
      const auto b = corner_b_columns(rows, lane, 0, C::column());
      multiply_steps<S, S.block_m / kStep<S.type>>(
          sum.c, [&](int i, int k) { return load_a_columns(a, 16 * i, k); },
          [&](OperandB(&pair)[2], int j, int k) { load_b_columns(pair, b, k, C::offset(j)); }, OnTop{});
    }
  }

  /// Called behind a barrier that all additions of step n, if there is one, came before.
  FOVEA_DEVICE void pass_turn(int n) const {
    if (n >= 0 && threadIdx.x == 0) Turn::pass(p, step(n).slot);
  }

  FOVEA_DEVICE float* slope_part(int head) const {
    return p.slope_parts + ((i64{sequence.batch} * p.q_heads + head) * p.key_blocks + walk.key_block) * S.warps +
           warp_id();
  }
  FOVEA_DEVICE void clear_slope_parts() const {
    if (lane_id() != 0) return;
    for (int h = 0; h < p.group; ++h) *slope_part(walk.first_head + h) = 0.0F;
  }
  /// The warp's share of a head's slope gradient; starts the next.
  FOVEA_DEVICE void store_slope_part(int head, float& sum) const {
    for (int lane = 1; lane < kWarp; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
    if (lane_id() == 0) *slope_part(head) = sum;
    sum = 0.0F;
  }

  /// In the place of k and v, if these have one.
  FOVEA_DEVICE auto dk_tile() const {
    if constexpr (S.in_place) return place_keys<S.head_dim>(p.dk, sequence.kv_rows, p.head_dim);
    if constexpr (!S.in_place) return k_tile();
  }
  FOVEA_DEVICE auto dv_tile() const {
    if constexpr (S.in_place) return place_keys<S.head_dim_v>(p.dv, sequence.kv_rows, p.head_dim_v);
    if constexpr (!S.in_place) return v_tile();
  }
  /// Where this block leaves its part of dk, or dv.
  template <int kDim>
  FOVEA_DEVICE auto place_part(const RowView& view, int columns) const {
    return place_tile<Type::kFloat32, kDim, Order>(sequence.kv_row(view, key(), walk.kv_head), view.row,
                                                   sequence.kv_rows - key(), columns);
  }
  /// Through shared memory; parts from registers.
  FOVEA_DEVICE void store(Dk& dk, Dv& dv) const {
    if constexpr (S.split_gqa) {
      place(place_part<S.head_dim>(p.dk_parts, p.head_dim), dk, p.scale);
      place(place_part<S.head_dim_v>(p.dv_parts, p.head_dim_v), dv, S.dropout ? p.keep_scale : 1.0F);
      return;
    }
    place(dk_tile(), dk, p.scale);
    place(dv_tile(), dv, S.dropout ? p.keep_scale : 1.0F);
    __syncthreads();
    const int keys = sequence.kv_rows - key();
    store_rows<kThreads, Order>(dk_tile(), keys, p.head_dim * kBytes<S.type>, p.dk.aligned,
                                sequence.kv_row(p.dk, key(), walk.kv_head), p.dk.row);
    store_rows<kThreads, Order>(dv_tile(), keys, p.head_dim_v * kBytes<S.type>, p.dv.aligned,
                                sequence.kv_row(p.dv, key(), walk.kv_head), p.dv.row);
  }
  template <class To, class C>
  FOVEA_DEVICE static void place(const To& tile, C& sum, float scale) {
    if (!C::works()) return;
#pragma unroll
    for (auto& row : sum.c) {
#pragma unroll
      for (Accumulator& c : row) {
#pragma unroll
        for (float& x : c.x) x *= scale;
      }
    }
    store_accumulators<C>(corner_c<C::kN>(tile, lane_id(), C::row(), C::column()), sum.c);
  }
};

/// Blocks are numbered as `BlockTask` says.
template <BackwardSpec S>
__device__ void backward(const BackwardParams& p) {
  static_assert(sizeof(Walk<S>) <= kWalkBytes);
  extern __shared__ __align__(128) char shared[];
  Walk<S>& walk = *reinterpret_cast<Walk<S>*>(shared + BackwardShared::of(S).walk);
  if (threadIdx.x == 0) walk.take(p, BlockTask::of<S>(p, number_of_block<S>(p)));
  __syncthreads();
  if (walk.key_block * S.block_n >= walk.sequence.kv_rows) return;
  Backward<S>{p, walk, walk.sequence, shared_address(shared)}.run();
}

}  // namespace fovea::cuda
