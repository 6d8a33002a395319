#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// FlashAttention's backward (2205.14135, algorithm 4; 2307.08691, algorithm 2): a block owns block_n keys of a kv head
// and walks the rows of all heads that read them.  P and dS meet the other products in shared memory; dk and dv stay in
// registers; dq leaves as additions to dq_sum, which `backward_queries` turns into dq.
namespace fovea::cuda {

/// Where entry e of lane l of a piece of 16 × 8 lies in dq_sum, so that a warp adds to 512 bytes in a row.
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

template <BackwardSpec S>
struct Backward {
  static constexpr int kThreads = S.warps * kWarp;
  static constexpr BackwardShared kShared = BackwardShared::of(S);

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
  using Dq = Share<S.block_m, S.head_dim>;

  /// The tiles of rows that see the block's keys, head by head.
  struct Walk {
    int head, tile;
  };

  const BackwardParams& p;
  const Sequence& sequence;
  const RowSlots slots;
  const int kv_head, key_block;
  const u32 shared;

  FOVEA_DEVICE int key() const { return key_block * S.block_n; }
  FOVEA_DEVICE int group() const { return p.q_heads / p.kv_heads; }
  template <class T>
  FOVEA_DEVICE T tile_at(int offset) const {
    return {fresh(shared) + offset, fresh(lane_id())};
  }
  FOVEA_DEVICE KTile k_tile() const { return tile_at<KTile>(kShared.k); }
  FOVEA_DEVICE VTile v_tile() const { return tile_at<VTile>(kShared.v); }
  FOVEA_DEVICE QTile q_tile(int stage) const { return tile_at<QTile>(kShared.ring + stage * kShared.stage); }
  FOVEA_DEVICE DoutTile dout_tile(int stage) const { return tile_at<DoutTile>(kShared.ring + stage * kShared.stage + kShared.dout); }
  FOVEA_DEVICE EntryTile weights() const { return tile_at<EntryTile>(kShared.weights); }
  FOVEA_DEVICE EntryTile ds_tile() const { return tile_at<EntryTile>(kShared.ds); }

  FOVEA_DEVICE void load_keys() const {
    const int keys = static_cast<int>(sequence.band.seqlen_kv) - key();
    load_strided_tile<S.async_copy, kThreads>(k_tile(), keys, p.head_dim * kBytes<S.type>, p.k.aligned,
                                              sequence.kv_row(p.k, key(), kv_head), p.k.row);
    load_strided_tile<S.async_copy, kThreads>(v_tile(), keys, p.head_dim_v * kBytes<S.type>, p.v.aligned,
                                              sequence.kv_row(p.v, key(), kv_head), p.v.row);
  }
  FOVEA_DEVICE void load_rows(const Walk& at, int stage) const {
    const int row = at.tile * S.block_m, rows = static_cast<int>(sequence.band.seqlen_q) - row;
    load_strided_tile<S.async_copy, kThreads>(q_tile(stage), rows, p.head_dim * kBytes<S.type>, p.q.aligned,
                                              sequence.q_row(p.q, row, at.head), p.q.row);
    load_strided_tile<S.async_copy, kThreads>(dout_tile(stage), rows, p.head_dim_v * kBytes<S.type>, p.dout.aligned,
                                              sequence.q_row(p.dout, row, at.head), p.dout.row);
  }

  FOVEA_DEVICE TileState state(const Walk& at) const {
    return sequence.band.tile({at.tile * S.block_m, (at.tile + 1) * S.block_m}, {key(), key() + S.block_n});
  }

  FOVEA_DEVICE void run() const {
    const Interval rows = sequence.band.rows_of_keys({key(), key() + S.block_n});
    const int first = static_cast<int>(rows.begin) / S.block_m;
    const int end = rows.empty() ? first : static_cast<int>(rows.end - 1) / S.block_m + 1;
    const int first_head = kv_head * group(), end_head = end > first ? first_head + group() : first_head;
    const auto next = [&](const Walk& at) { return at.tile + 1 < end ? Walk{at.head, at.tile + 1} : Walk{at.head + 1, first}; };

    Dk dk;
    Dv dv;
    clear(dk.c);
    clear(dv.c);
    float slope_sum = 0.0F;
    if constexpr (S.alibi) clear_slope_parts();

    Walk at{first_head, first}, ahead = at;
    load_keys();
#pragma unroll
    for (int stage = 0; stage < S.stages - 1; ++stage) {
      if (ahead.head < end_head) load_rows(ahead, stage);
      close_copies<S.async_copy>();
      ahead = next(ahead);
    }
    int stage = 0;
#pragma unroll 1
    for (; at.head < end_head; at = next(at)) {
      if constexpr (S.stages == 1) {
        __syncthreads();
        load_rows(at, 0);
        close_copies<S.async_copy>();
      }
      await_copies<S.async_copy, (S.stages > 1 ? S.stages - 2 : 0)>();
      __syncthreads();  // this tile is there for all, and all are done with the tile whose place comes next
      if constexpr (S.stages > 1) {
        if (ahead.head < end_head) load_rows(ahead, stage == 0 ? S.stages - 1 : stage - 1);
        close_copies<S.async_copy>();
        ahead = next(ahead);
      }
      visit(at, stage, dk, dv, slope_sum);
      if constexpr (S.alibi) {
        if (at.tile + 1 == end) store_slope_part(at.head, slope_sum);
      }
      stage = stage + 1 == S.stages ? 0 : stage + 1;
    }
    await_copies<S.async_copy, 0>();
    __syncthreads();
    store(dk, dv);
  }

  /// One tile of rows: its P and dS, and what they add to dv, dk and dq.
  FOVEA_DEVICE void visit(const Walk& at, int stage, Dk& dk, Dv& dv, float& slope_sum) const {
    const TileState tile_state = state(at);
    const RowMap<false> rows{at.tile * S.block_m, sequence.q_rows, at.head, 1};
    const ScoreRules<S, false> rules{p, sequence, rows};
    const bool hides = S.bias || S.mask || tile_state == TileState::kPartial;
    bool spoiled = false;
    {
      GradientTile<S> tile;
      if (tile.works()) {
        tile.load_statistics(p, slots.at(at.head, at.tile) * S.block_m);
        const math::DropoutStream stream = S.dropout ? rules.stream(at.head) : math::DropoutStream{};
        spoiled = tile.compute(q_tile(stage), k_tile(), dout_tile(stage), v_tile(), rules, key(), tile_state, S.mask,
                               hides, stream);
        if constexpr (S.alibi) {
          tile.each([&](int i, int j, int e) {
            const int r = tile.row() + 16 * i + lane_id() / 4 + e / 2 * 8, c = key() + tile.column() + 8 * j + lane_id() % 4 * 2 + e % 2;
            slope_sum -= tile.ds[i][j].x[e] * rules.distance(r, c);
          });
        }
        tile.pass_softcap();
#pragma unroll
        for (int i = 0; i < tile.kM; ++i) {
#pragma unroll
          for (int j = 0; j < tile.kN; ++j) {
            store_accumulator(weights(), tile.row() + 16 * i, tile.column() + 8 * j, tile.p[i][j]);
            store_accumulator(ds_tile(), tile.row() + 16 * i, tile.column() + 8 * j, tile.ds[i][j]);
          }
        }
      }
    }
    if (hides) {
      spoiled = __syncthreads_or(spoiled);
    } else {
      __syncthreads();
    }
    add_columns(dv, weights(), dout_tile(stage), spoiled);
    add_columns(dk, ds_tile(), q_tile(stage), spoiled);
    add_dq(at, spoiled);
  }

  /// C += (entries)ᵀ · rows: dv from P and dout, dk from dS and q.
  template <class C, class RowTile>
  FOVEA_DEVICE static void add_columns(C& sum, const EntryTile& entries, const RowTile& rows, bool spoiled) {
    if (!C::works()) return;
    if (spoiled) {
      multiply_seen<S.block_m>(
          sum, [&](int k, int row) { return entries.at(k, row); }, [&](int k, int column) { return rows.at(k, column); });
    } else {
      multiply<S, S.block_m / kStep<S.type>>(
          sum.c, [&](int i, int k) { return load_a_columns(entries, C::row() + 16 * i, k); },
          [&](OperandB(&b)[2], int j, int k) { load_b_columns(b, rows, k, C::column() + 8 * j); });
    }
  }

  /// dq += dS · k.
  FOVEA_DEVICE void add_dq(const Walk& at, bool spoiled) const {
    if (!Dq::works()) return;
    Dq dq;
    clear(dq.c);
    const EntryTile ds = ds_tile();
    const KTile k_columns = k_tile();
    if (spoiled) {
      multiply_seen<S.block_n>(
          dq, [&](int k, int row) { return ds.at(row, k); }, [&](int k, int column) { return k_columns.at(k, column); });
    } else {
      multiply<S, S.block_n / kStep<S.type>>(
          dq.c, [&](int i, int k) { return load_a<true>(ds, Dq::row() + 16 * i, k); },
          [&](OperandB(&b)[2], int j, int k) { load_b_columns(b, k_columns, k, Dq::column() + 8 * j); });
    }
    float* sum = p.dq_sum + slots.at(at.head, at.tile) * (S.block_m * S.head_dim);
#pragma unroll
    for (int i = 0; i < Dq::kGrid.rows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Dq::kGrid.columns / 8; ++j) {
        reduce(sum + ((Dq::row() / 16 + i) * (S.head_dim / 8) + Dq::column() / 8 + j) * 128, dq.c[i][j]);
      }
    }
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
    return p.slope_parts + (i64{sequence.batch} * p.q_heads + head) * p.key_blocks + key_block;
  }
  FOVEA_DEVICE void clear_slope_parts() const {
    if (threadIdx.x != 0) return;
    for (int h = 0; h < group(); ++h) *slope_part(kv_head * group() + h) = 0.0F;
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
    store_tile<kThreads>(k_tile(), keys, p.head_dim * kBytes<S.type>, p.dk.aligned, sequence.kv_row(p.dk, key(), kv_head), p.dk.row);
    store_tile<kThreads>(v_tile(), keys, p.head_dim_v * kBytes<S.type>, p.dv.aligned, sequence.kv_row(p.dv, key(), kv_head), p.dv.row);
  }
  template <class To, class C>
  FOVEA_DEVICE static void place(const To& tile, C& sum, float scale) {
    if (!C::works()) return;
#pragma unroll
    for (int i = 0; i < C::kGrid.rows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < C::kGrid.columns / 8; ++j) {
#pragma unroll
        for (float& x : sum.c[i][j].x) x *= scale;
        store_accumulator(tile, C::row() + 16 * i, C::column() + 8 * j, sum.c[i][j]);
      }
    }
  }
};

/// Blocks: key blocks (early ones, which most rows see under a causal rule, first) × kv heads × batch.
template <BackwardSpec S>
__device__ void backward(const BackwardParams& p) {
  extern __shared__ __align__(128) char shared[];
  int block = static_cast<int>(blockIdx.x);
  const int key_block = block % p.key_blocks, kv_head = block / p.key_blocks % p.kv_heads;
  // Asked for once a tile: not worth registers.
  Sequence& sequence = *reinterpret_cast<Sequence*>(shared + BackwardShared::of(S).sequence);
  if (threadIdx.x == 0) sequence = Sequence(p, block / p.key_blocks / p.kv_heads);
  __syncthreads();
  if (key_block * S.block_n >= sequence.kv_rows) return;
  Backward<S>{p, sequence, RowSlots(p, sequence, S.block_m), kv_head, key_block, shared_address(shared)}.run();
}

}  // namespace fovea::cuda
