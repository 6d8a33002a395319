#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// FlashAttention's backward (2205.14135, algorithm 4; 2307.08691, algorithm 2): a block owns block_n keys of a kv head
// and walks the rows of all heads that read them.  P and dS meet the other products in shared memory; dk and dv stay in
// registers; dq leaves as additions to dq_sum, which `backward_queries` turns into dq.
namespace fovea::cuda {

// dq_sum holds, tile by tile of rows, the pieces of 16 × 8 of the warps' shares, each as its accumulators: lane by lane
// where four floats are added at once, else entry by entry, so that a warp's additions always meet 128 bytes in a row.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kVectorReduction = true;
#else
inline constexpr bool kVectorReduction = false;
#endif

FOVEA_DEVICE void reduce(float* piece, const Accumulator& c) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(piece + 4 * lane_id()), "f"(c.x[0]),
               "f"(c.x[1]), "f"(c.x[2]), "f"(c.x[3])
               : "memory");
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(piece + 32 * e + lane_id(), c.x[e]);
#endif
}

/// Adds floats in shared memory to as many in global memory, by the copy engine; called by one lane, for what its warp
/// has written.
FOVEA_DEVICE void start_reduction(float* to, u32 from, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
#endif
}
/// Shared memory written by ordinary stores before is what the copy engine reads after.
FOVEA_DEVICE void show_to_copy_engine() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
/// Until the reductions that this thread started have read their source, or kDone: have been added.
template <bool kDone>
FOVEA_DEVICE void await_reductions() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kDone) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  } else {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
#endif
}

/// Which keys a block has, and the tiles of rows that see them.  It lies in shared memory: asked once a tile, it is not worth registers.
struct Walk {
  Sequence sequence;
  int key_block, kv_head;
  int first, end;
  int first_full, end_full;  // of those that see every key

  /// Blocks: key blocks (early ones, which most rows see under a causal rule, first) × kv heads × batch.
  FOVEA_DEVICE Walk(const BackwardParams& p, int block, int block_m, int block_n)
      : sequence(p, block / p.key_blocks / p.kv_heads),
        key_block(block % p.key_blocks),
        kv_head(block / p.key_blocks % p.kv_heads) {
    const math::Band& band = sequence.band;
    const Interval keys{key_block * block_n, (key_block + 1) * block_n};
    const Interval rows = band.rows_of_keys(keys), seers = band.rows_that_see_all(keys);
    first = static_cast<int>(rows.begin) / block_m;
    end = rows.empty() ? first : static_cast<int>(rows.end - 1) / block_m + 1;
    first_full = (static_cast<int>(seers.begin) + block_m - 1) / block_m;
    end_full = static_cast<int>(seers.end) / block_m;
  }
};

template <BackwardSpec S>
struct Backward {
  static constexpr int kThreads = S.warps * kWarp;
  static constexpr BackwardShared kShared = BackwardShared::of(S);
  /// dq leaves by way of the tile's place in the ring, which its own rows need no more.
  static constexpr bool kBulk = kVectorReduction && S.stages == 2 && S.block_m * S.head_dim * 4 <= kShared.stage;

  using KTile = Tile<S.type, S.block_n, S.head_dim>;
  using VTile = Tile<S.type, S.block_n, S.head_dim_v>;
  using QTile = Tile<S.type, S.block_m, S.head_dim>;
  using DoutTile = Tile<S.type, S.block_m, S.head_dim_v>;
  using EntryTile = Tile<S.type, S.block_m, S.block_n>;  // P, dS
  static_assert(KTile::kSize == tile_bytes(S.type, S.block_n, S.head_dim));
  static_assert(EntryTile::kSize == tile_bytes(S.type, S.block_m, S.block_n));

  /// A warp's piece of a product that all warps share.
  template <int kRows, int kColumns>
  struct Share {
    static constexpr WarpGrid kGrid = WarpGrid::of(kRows, kColumns, S.warps);
    Accumulator c[kGrid.rows / 16][kGrid.columns / 8];

    FOVEA_DEVICE static bool works() { return kGrid.used == S.warps || warp_id() < kGrid.used; }
    FOVEA_DEVICE static int row() { return warp_id() / kGrid.across * kGrid.rows; }
    FOVEA_DEVICE static int column() { return warp_id() % kGrid.across * kGrid.columns; }
  };
  using Dk = Share<S.block_n, S.head_dim>;
  using Dv = Share<S.block_n, S.head_dim_v>;
  struct Dq : Share<S.block_m, S.head_dim> {
    static constexpr int kM = Share<S.block_m, S.head_dim>::kGrid.rows / 16, kN = Share<S.block_m, S.head_dim>::kGrid.columns / 8;
    static constexpr int kFloats = kM * kN * 128;  // of a warp
    /// The place in dq_sum of a tile's piece in row `i` and column `j` of pieces.
    FOVEA_DEVICE static int piece(int i, int j) { return ((i / kM * Dq::kGrid.across + j / kN) * kM + i % kM) * kN + j % kN; }
  };

  /// A tile of rows on the walk over all that see the block's keys, head by head.
  struct Place {
    int head, tile;
  };
  /// The same for the copies, with the tile's first rows.
  struct Ahead : Place {
    const char *q, *dout;
  };

  const BackwardParams& p;
  const Walk& walk;
  const Sequence& sequence;
  const u32 shared;

  FOVEA_DEVICE int key() const { return walk.key_block * S.block_n; }
  FOVEA_DEVICE i64 slot(const Place& at) const { return RowSlots(p, sequence, S.block_m).at(at.head, at.tile); }
  FOVEA_DEVICE int group() const { return p.q_heads / p.kv_heads; }
  template <class T>
  FOVEA_DEVICE T tile_at(int offset) const {
    return {fresh(shared) + offset};
  }
  FOVEA_DEVICE KTile k_tile() const { return tile_at<KTile>(kShared.k); }
  FOVEA_DEVICE VTile v_tile() const { return tile_at<VTile>(kShared.v); }
  FOVEA_DEVICE QTile q_tile(int stage) const { return tile_at<QTile>(kShared.ring + stage * kShared.stage); }
  FOVEA_DEVICE DoutTile dout_tile(int stage) const { return tile_at<DoutTile>(kShared.ring + stage * kShared.stage + kShared.dout); }
  FOVEA_DEVICE EntryTile weights() const { return tile_at<EntryTile>(kShared.weights); }
  FOVEA_DEVICE EntryTile ds_tile() const { return tile_at<EntryTile>(kShared.ds); }

  FOVEA_DEVICE void load_keys() const {
    const int keys = static_cast<int>(sequence.band.seqlen_kv) - key();
    load_rows<S.async_copy, kThreads>(k_tile(), keys, p.head_dim * kBytes<S.type>, p.k.aligned,
                                      sequence.kv_row(p.k, key(), walk.kv_head), p.k.row);
    load_rows<S.async_copy, kThreads>(v_tile(), keys, p.head_dim_v * kBytes<S.type>, p.v.aligned,
                                      sequence.kv_row(p.v, key(), walk.kv_head), p.v.row);
  }
  FOVEA_DEVICE void load(const Ahead& next, int stage) const {
    const int rows = static_cast<int>(sequence.band.seqlen_q) - next.tile * S.block_m;
    load_rows<S.async_copy, kThreads>(q_tile(stage), rows, p.head_dim * kBytes<S.type>, p.q.aligned, next.q, p.q.row);
    load_rows<S.async_copy, kThreads>(dout_tile(stage), rows, p.head_dim_v * kBytes<S.type>, p.dout.aligned, next.dout, p.dout.row);
  }

  FOVEA_DEVICE Place next(Place at) const { return at.tile + 1 < walk.end ? Place{at.head, at.tile + 1} : Place{at.head + 1, walk.first}; }

  FOVEA_DEVICE void run() const {
    const int first_head = walk.kv_head * group(), end_head = walk.first < walk.end ? first_head + group() : first_head;
    const auto ahead_at = [&](Place at) {
      const int row = at.tile * S.block_m;
      return Ahead{at, sequence.q_row(p.q, row, at.head), sequence.q_row(p.dout, row, at.head)};
    };

    Dk dk;
    Dv dv;
    clear(dk.c);
    clear(dv.c);
    float slope_sum = 0.0F;
    if constexpr (S.alibi) clear_slope_parts();

    Ahead ahead = ahead_at({first_head, walk.first});
    const auto load_ahead = [&](int stage) {
      if (ahead.head < end_head) load(ahead, stage);
      close_copies<S.async_copy>();
      if (++ahead.tile < walk.end) {
        ahead.q += S.block_m * p.q.row;
        ahead.dout += S.block_m * p.dout.row;
      } else {
        ahead = ahead_at({ahead.head + 1, walk.first});
      }
    };
    load_keys();
    load_ahead(0);
    int stage = 0;
#pragma unroll 1
    for (Place at{first_head, walk.first}; at.head < end_head; at = next(at)) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // this tile is there for all, and nobody still reads the last one's P and dS
      const bool full = at.tile >= walk.first_full && at.tile < walk.end_full;
      if constexpr (S.mask || S.bias) {
        visit<true>(at, stage, full ? TileState::kFull : TileState::kPartial, dk, dv, slope_sum, load_ahead);
      } else if (full) {
        visit<false>(at, stage, TileState::kFull, dk, dv, slope_sum, load_ahead);
      } else {
        visit<true>(at, stage, TileState::kPartial, dk, dv, slope_sum, load_ahead);
      }
      if constexpr (S.alibi) {
        if (at.tile + 1 == walk.end) store_slope_part(at.head, slope_sum);
      }
      if constexpr (S.stages == 2) stage ^= 1;
    }
    await_copies<S.async_copy, 0>();
    if constexpr (kBulk) await_reductions<S.deterministic>();
    __syncthreads();
    if constexpr (S.deterministic) {
      if (first_head < end_head) pass_turn({end_head - 1, walk.end - 1});
    }
    store(dk, dv);
  }

  /// One tile of rows: its P and dS, and what they add to dv, dk and dq.  kHides: some entries may be hidden.
  template <bool kHides, class LoadAhead>
  FOVEA_DEVICE void visit(const Place& at, int stage, TileState state, Dk& dk, Dv& dv, float& slope_sum,
                          const LoadAhead& load_ahead) const {
    const RowMap<false> rows{at.tile * S.block_m, sequence.q_rows, at.head, 1};
    const ScoreRules<S, false> rules{p, sequence, rows};
    bool spoiled = false;
    {
      GradientTile<S> tile;
      if (tile.works()) {
        tile.load_statistics(p, slot(at) * S.block_m);
        const math::DropoutStream stream = S.dropout ? rules.stream(at.head) : math::DropoutStream{};
        spoiled = tile.template compute<kHides>(q_tile(stage), k_tile(), dout_tile(stage), v_tile(), rules, key(), state,
                                                S.mask, stream);
        if constexpr (S.alibi) {
          tile.each([&](int i, int j, int e) {
            const int r = tile.row() + 16 * i + lane_id() / 4 + e / 2 * 8, c = key() + tile.column() + 8 * j + lane_id() % 4 * 2 + e % 2;
            slope_sum -= tile.ds[i][j].x[e] * rules.distance(r, c);
          });
        }
        tile.pass_softcap();
        store(corner_c(weights(), tile.row(), tile.column()), tile.p);
        store(corner_c(ds_tile(), tile.row(), tile.column()), tile.ds);
      }
    }
    if constexpr (kBulk) await_reductions<S.deterministic>();  // of the last tile
    if constexpr (kHides) {
      spoiled = __syncthreads_or(spoiled);
    } else {
      __syncthreads();
    }
    if constexpr (S.deterministic) pass_turn_before(at);
    if constexpr (S.stages == 2) load_ahead(stage ^ 1);
    add_columns<kHides>(dv, weights(), dout_tile(stage), spoiled);
    add_columns<kHides>(dk, ds_tile(), q_tile(stage), spoiled);
    if constexpr (S.stages == 1 || kBulk) __syncthreads();  // the tile's rows have been read
    if constexpr (S.stages == 1) load_ahead(0);
    add_dq<kHides>(at, stage, spoiled);
  }

  /// C += (entries)ᵀ · rows: dv from P and dout, dk from dS and q.
  template <bool kHides, class C, class RowTile>
  FOVEA_DEVICE static void add_columns(C& sum, const EntryTile& entries, const RowTile& rows, bool spoiled) {
    if (!C::works()) return;
    if (kHides && spoiled) {
      multiply_seen<S.block_m>(
          sum, [&](int k, int row) { return entries.at(k, row); }, [&](int k, int column) { return rows.at(k, column); });
    } else {
      const auto a = corner_a_columns(entries, 0, C::row());
      const auto b = corner_b_columns(rows, 0, C::column());
      multiply<S, S.block_m / kStep<S.type>>(
          sum.c, [&](int i, int k) { return load_a_columns(a, 16 * i, k); },
          [&](OperandB(&two)[2], int j, int k) { load_b_columns(two, b, k, 8 * j); });
    }
  }

  /// dq += dS · k.
  template <bool kHides>
  FOVEA_DEVICE void add_dq(const Place& at, int stage, bool spoiled) const {
    if (!Dq::works()) return;
    Dq dq;
    clear(dq.c);
    const EntryTile ds = ds_tile();
    const KTile k_columns = k_tile();
    if (kHides && spoiled) {
      multiply_seen<S.block_n>(
          dq, [&](int k, int row) { return ds.at(row, k); }, [&](int k, int column) { return k_columns.at(k, column); });
    } else {
      const auto a = corner_a<true>(ds, Dq::row(), 0);
      const auto b = corner_b_columns(k_columns, 0, Dq::column());
      multiply<S, S.block_n / kStep<S.type>>(
          dq.c, [&](int i, int k) { return load_a<true>(a, 16 * i, k); },
          [&](OperandB(&two)[2], int j, int k) { load_b_columns(two, b, k, 8 * j); });
    }
    float* sum = p.dq_sum + slot(at) * (S.block_m * S.head_dim) + warp_id() * Dq::kFloats;
    const u32 staged = fresh(shared) + kShared.ring + stage * kShared.stage + warp_id() * Dq::kFloats * 4;
#pragma unroll
    for (int i = 0; i < Dq::kM; ++i) {
#pragma unroll
      for (int j = 0; j < Dq::kN; ++j) {
        if constexpr (kBulk) {
          store_shared_16(staged + (i * Dq::kN + j) * 512 + fresh(lane_id()) * 16, bits(dq.c[i][j]));
        }
      }
    }
    if constexpr (kBulk) {
      show_to_copy_engine();
      __syncwarp();
    }
    if constexpr (S.deterministic) await_turn(at);
    if constexpr (kBulk) {
      if (lane_id() == 0) start_reduction(sum, staged, Dq::kFloats * 4);
    } else {
#pragma unroll
      for (int x = 0; x < Dq::kM * Dq::kN; ++x) reduce(sum + x * 128, dq.c[x / Dq::kN][x % Dq::kN]);
      if constexpr (S.deterministic) __threadfence();
    }
  }

  // ---- turns: where bits must not change, dq is added up in the order of the key blocks ---------------------------------

  FOVEA_DEVICE int turn(const Place& at) const {
    const i64 row = i64{at.tile} * S.block_m;
    return walk.key_block - static_cast<int>(sequence.band.keys_of_rows({row, row + S.block_m}).begin / S.block_n);
  }
  FOVEA_DEVICE void await_turn(const Place& at) const {
    if (lane_id() == 0) {
      const int mine = turn(at);
      const int* ticket = p.tickets + slot(at);
      int now;
      do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(ticket) : "memory");
      } while (now != mine);
    }
    __syncwarp();
  }
  /// Called behind a barrier that all additions of this tile came before.
  FOVEA_DEVICE void pass_turn(const Place& at) const {
    if (threadIdx.x != 0) return;
    __threadfence();
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p.tickets + slot(at)), "r"(turn(at) + 1) : "memory");
  }
  FOVEA_DEVICE void pass_turn_before(const Place& at) const {
    if (at.tile > walk.first) return pass_turn({at.head, at.tile - 1});
    if (at.head > walk.kv_head * group()) pass_turn({at.head - 1, walk.end - 1});
  }

  /// The slow product, term by term, that leaves out hidden entries of A: for tiles in which something hidden may not be
  /// finite.
  template <int kSteps, class C, class A, class B>
  FOVEA_DEVICE static void multiply_seen(C& sum, const A& a, const B& b) {
    const int row = fresh(C::row() + lane_id() / 4), column = fresh(C::column() + lane_id() % 4 * 2);
#pragma unroll 1
    for (int k = 0; k < kSteps; ++k) {
      constexpr int kM = C::kGrid.rows / 16, kN = C::kGrid.columns / 8;
      float factors[kM][2];
#pragma unroll
      for (int x = 0; x < 2 * kM; ++x) factors[x / 2][x % 2] = read_shared<S.type>(a(k, row + 8 * x));
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float other = read_shared<S.type>(b(k, column + 8 * j + e));
#pragma unroll
          for (int x = 0; x < 2 * kM; ++x) {
            const float factor = factors[x / 2][x % 2];
            if (!GradientTile<S>::hidden(factor)) sum.c[x / 2][j].x[x % 2 * 2 + e] += factor * other;
          }
        }
      }
    }
  }

  FOVEA_DEVICE float* slope_part(int head) const {
    return p.slope_parts + (i64{sequence.batch} * p.q_heads + head) * p.key_blocks + walk.key_block;
  }
  FOVEA_DEVICE void clear_slope_parts() const {
    if (threadIdx.x != 0) return;
    for (int h = 0; h < group(); ++h) *slope_part(walk.kv_head * group() + h) = 0.0F;
  }
  /// The block's share of a head's slope gradient, in the order of the warps; starts the next.
  FOVEA_DEVICE void store_slope_part(int head, float& sum) const {
    for (int lane = 1; lane < kWarp; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
    if (lane_id() == 0) store_shared(shared + kShared.scratch + 4 * warp_id(), __float_as_uint(sum));
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0F;
      for (int w = 0; w < S.warps; ++w) total += __uint_as_float(load_shared(shared + kShared.scratch + 4 * w));
      *slope_part(head) = total;
    }
    sum = 0.0F;
  }

  /// Through shared memory, in the place of k and v.
  FOVEA_DEVICE void store(Dk& dk, Dv& dv) const {
    const float kept = S.dropout ? 65536.0F / static_cast<float>(p.keep_threshold) : 1.0F;
    place(k_tile(), dk, p.scale);
    place(v_tile(), dv, kept);
    __syncthreads();
    const int keys = sequence.kv_rows - key();
    store_rows<kThreads>(k_tile(), keys, p.head_dim * kBytes<S.type>, p.dk.aligned, sequence.kv_row(p.dk, key(), walk.kv_head), p.dk.row);
    store_rows<kThreads>(v_tile(), keys, p.head_dim_v * kBytes<S.type>, p.dv.aligned, sequence.kv_row(p.dv, key(), walk.kv_head), p.dv.row);
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
    store(corner_c(tile, C::row(), C::column()), sum.c);
  }
  template <class To, int kM, int kN>
  FOVEA_DEVICE static void store(const Corner<To>& to, const Accumulator (&c)[kM][kN]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) store_accumulator(to, 16 * i, 8 * j, c[i][j]);
    }
  }
};

/// Blocks are numbered as `Walk` says; where one waits for others, as they begin, so that those have begun.
template <BackwardSpec S>
__device__ void backward(const BackwardParams& p) {
  extern __shared__ __align__(128) char shared[];
  Walk& walk = *reinterpret_cast<Walk*>(shared + BackwardShared::of(S).walk);
  if (threadIdx.x == 0) {
    const int block = S.deterministic ? atomicAdd(p.tickets + i64{p.q_heads} * p.row_slots, 1) : static_cast<int>(blockIdx.x);
    walk = Walk(p, block, S.block_m, S.block_n);
  }
  __syncthreads();
  if (walk.key_block * S.block_n >= walk.sequence.kv_rows) return;
  Backward<S>{p, walk, walk.sequence, shared_address(shared)}.run();
}

}  // namespace fovea::cuda
