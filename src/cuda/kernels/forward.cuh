#pragma once

#include "cuda/kernels/scores.cuh"

// FlashAttention's forward (2205.14135, algorithm 1; rows split among warps as in 2307.08691): a block owns block_m rows
// and walks the keys, last ones first; K and V arrive in shared memory a tile ahead; S, P and O stay in registers.
namespace fovea::cuda {

template <ForwardSpec S>
struct Forward {
  static constexpr int kThreads = S.warps * kWarp;
  static constexpr int kM = S.block_m / S.warps / 16;  // pieces of 16 rows of a warp
  static constexpr int kN = S.block_n / 8;             // pieces of 8 keys
  static constexpr int kD = S.head_dim_v / 8;          // pieces of 8 columns of v
  static constexpr int kK = kStep<S.type>;

  using QTile = SharedTile<S.type, S.block_m, S.head_dim>;
  using KTile = SharedTile<S.type, S.block_n, S.head_dim>;
  using VTile = SharedTile<S.type, S.block_n, S.head_dim_v>;
  using OutTile = SharedTile<S.type, S.block_m, S.head_dim_v>;  // in the place of Q

  static constexpr int kQBytes = math::larger(QTile::kSize, OutTile::kSize);
  static constexpr int kStageBytes = KTile::kSize + VTile::kSize;
  static constexpr int kSharedBytes = kQBytes + S.stages * kStageBytes;

  using Rows = RowMap<S.pack_gqa>;
  using Rules = ScoreRules<S, S.pack_gqa>;
  using Scores = Accumulator[kM][kN];
  using Out = Accumulator[kM][kD];

  /// Running maximum and sum of a thread's rows: 2 in each piece of 16.
  struct Statistics {
    float maximum[kM][2], sum[kM][2];
  };

  const ForwardParams& p;
  const Sequence sequence;
  const Rows rows;
  const Rules rules;
  const int kv_head, v_begin;
  const u32 shared;

  FOVEA_DEVICE QTile q_tile() const { return {shared}; }
  FOVEA_DEVICE OutTile out_tile() const { return {shared}; }
  FOVEA_DEVICE KTile k_tile(int stage) const { return {shared + kQBytes + stage * kStageBytes}; }
  FOVEA_DEVICE VTile v_tile(int stage) const { return {shared + kQBytes + stage * kStageBytes + KTile::kSize}; }
  FOVEA_DEVICE int warp_row() const { return warp_id() * kM * 16; }

  FOVEA_DEVICE void load_q() const {
    load_tile<S.async_copy, kThreads>(q_tile(), rows.left(), p.head_dim * kBytes<S.type>, p.q.aligned,
                                      [&](int r) { return sequence.q_row(p.q, rows.query(r), rows.head(r)); });
  }
  FOVEA_DEVICE void load_kv(int tile, int stage) const {
    const int key = tile * S.block_n, keys = static_cast<int>(sequence.band.seqlen_kv) - key;
    const int v_columns = math::smaller(p.head_dim_v - v_begin, S.head_dim_v);
    load_tile<S.async_copy, kThreads>(k_tile(stage), keys, p.head_dim * kBytes<S.type>, p.k.aligned,
                                      [&](int r) { return sequence.kv_row(p.k, key + r, kv_head); });
    load_tile<S.async_copy, kThreads>(v_tile(stage), keys, v_columns * kBytes<S.type>, p.v.aligned, [&](int r) {
      return sequence.kv_row(p.v, key + r, kv_head) + v_begin * kBytes<S.type>;
    });
  }

  /// S = Q Kᵀ.
  FOVEA_DEVICE void multiply_qk(Scores& s, const KTile& k) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) s[i][j] = {};
    }
#pragma unroll
    for (int c = 0; c < S.head_dim; c += kK) {
      OperandA q[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) q[i] = load_a(q_tile(), warp_row() + 16 * i, c);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        OperandB kj[2];
        load_b_rows(kj, k, 8 * j, c);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          multiply_add<S.type, S.mma>(s[i][j], q[i], kj[0]);
          multiply_add<S.type, S.mma>(s[i][j + 1], q[i], kj[1]);
        }
      }
    }
  }

  /// O += P V.
  FOVEA_DEVICE void multiply_pv(Out& o, const Scores& weights, const VTile& v) const {
#pragma unroll
    for (int key = 0; key < S.block_n; key += kK) {
      OperandA w[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) w[i] = operand_a<S.type>(weights[i], key / kK);
#pragma unroll
      for (int c = 0; c < kD; c += 2) {
        OperandB vc[2];
        load_b_columns(vc, v, key, 8 * c);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          multiply_add<S.type, S.mma>(o[i][c], w[i], vc[0]);
          multiply_add<S.type, S.mma>(o[i][c + 1], w[i], vc[1]);
        }
      }
    }
  }

  /// S becomes P = 2^(unit·S − maximum); maximum, sum and O move on to the new maximum.
  FOVEA_DEVICE void online_softmax(Scores& s, Statistics& running, Out& o, float unit) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = running.maximum[i][h];
#pragma unroll
        for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[i][j].x[2 * h], s[i][j].x[2 * h + 1]));
        top = quad_max(top);
        const float reference = top == -infinity() ? 0.0F : top * unit;  // nothing visible yet: keep −inf − −inf away
        const float rescale = exp2(running.maximum[i][h] * unit - reference);
        running.maximum[i][h] = top;
        float sum = running.sum[i][h] * rescale;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[i][j].x[e] = exp2(s[i][j].x[e] * unit - reference);
            sum += s[i][j].x[e];
          }
        }
        running.sum[i][h] = sum;
#pragma unroll
        for (int c = 0; c < kD; ++c) {
          o[i][c].x[2 * h] *= rescale;
          o[i][c].x[2 * h + 1] *= rescale;
        }
      }
    }
  }

  /// One tile of keys, in shared memory.
  FOVEA_DEVICE void attend(Out& o, Statistics& running, int tile, int stage, const math::DropoutStream& stream, float unit) const {
    const int key = tile * S.block_n;
    const Interval keys{key, math::smaller<i64>(key + S.block_n, sequence.kv_rows)};
    const Interval mine = rows.queries(warp_row(), warp_row() + 16 * kM);
    TileState state = mine.empty() ? TileState::kHidden : sequence.band.tile(mine, {key, key + S.block_n});
    if (state == TileState::kHidden) return;
    if (rows.left() < warp_row() + 16 * kM) state = TileState::kPartial;
    Scores s;
    multiply_qk(s, k_tile(stage));
    rules.template finish<false>(s, warp_row(), key, state, S.mask, static_cast<Accumulator(*)[kN]>(nullptr));
    online_softmax(s, running, o, unit);
    if constexpr (S.dropout) {
      rules.template drop<false>(s, warp_row(), key, stream, [](float& x, bool kept) { x = kept ? x : 0.0F; });
    }
    multiply_pv(o, s, v_tile(stage));
  }

  FOVEA_DEVICE void run(int split) const {
    const int keys_end_of_split = S.split ? (split + 1) * p.keys_per_split : p.seqlen_kv;
    Interval keys = sequence.band.keys_of_rows(rows.queries(0, S.block_m));
    if constexpr (S.split) keys = {math::larger<i64>(keys.begin, i64{split} * p.keys_per_split), math::smaller<i64>(keys.end, keys_end_of_split)};
    const int first = static_cast<int>(keys.begin) / S.block_n;
    const int last = keys.empty() ? first - 1 : static_cast<int>(keys.end - 1) / S.block_n;

    Out o;
    Statistics running;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) running.maximum[i][h] = -infinity(), running.sum[i][h] = 0.0F;
#pragma unroll
      for (int c = 0; c < kD; ++c) o[i][c] = {};
    }
    const math::DropoutStream stream = S.dropout ? rules.stream(rows.first_head) : math::DropoutStream{};
    const float unit = score_unit<S>(p);

    if (first <= last) {
      load_q();
#pragma unroll
      for (int ahead = 0; ahead < S.stages - 1; ++ahead) {
        if (last - ahead >= first) load_kv(last - ahead, ahead);
        close_copies<S.async_copy>();
      }
      int stage = 0;
#pragma unroll 1
      for (int tile = last; tile >= first; --tile) {
        if constexpr (S.stages == 1) {
          __syncthreads();
          load_kv(tile, 0);
          close_copies<S.async_copy>();
        }
        await_copies<S.async_copy, (S.stages > 1 ? S.stages - 2 : 0)>();
        __syncthreads();  // this tile is there for all, and all are done with the tile whose place comes next
        if constexpr (S.stages > 1) {
          const int ahead = tile - (S.stages - 1), free = stage == 0 ? S.stages - 1 : stage - 1;
          if (ahead >= first) load_kv(ahead, free);
          close_copies<S.async_copy>();
        }
        attend(o, running, tile, stage, stream, unit);
        stage = stage + 1 == S.stages ? 0 : stage + 1;
      }
    }
    await_copies<S.async_copy, 0>();
    __syncthreads();
    finish(o, running, split, unit);
  }

  /// Divides by the sums and writes O and lse, or this split's part of them.
  FOVEA_DEVICE void finish(Out& o, Statistics& running, int split, float unit) const {
    bool spoiled = false;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = warp_row() + entry_row(i, 2 * h);
        const float sum = quad_sum(running.sum[i][h]);
        const float maximum = running.maximum[i][h] * unit;
        if (r < rows.left()) {
          if constexpr (S.split) {
            store_part(o[i], h, r, split, maximum, sum);
          } else {
            spoiled |= !normalise(o[i], h, r, maximum, sum);
          }
        }
      }
    }
    if constexpr (!S.split) store_out(o);
    (void)spoiled;
  }

  FOVEA_DEVICE static int entry_row(int i, int e) { return 16 * i + lane_id() / 4 + e / 2 * 8; }

  /// One row: adds the sink, divides; an empty row gives 0 and −infinity.
  FOVEA_DEVICE bool normalise(Accumulator (&o)[kD], int h, int r, float maximum, float sum) const {
    const bool empty = sum == 0.0F;  // a visible key leaves at least 1, or a NaN
    const int query = rows.query(r), head = rows.head(r);
    float factor = 1.0F;
    if (p.sink != nullptr && !empty) {
      const float sink = p.sink[head] * kLog2E, top = fmaxf(sink, maximum);
      factor = exp2(maximum - top);
      sum = sum * factor + exp2(sink - top);
      maximum = top;
    }
    const float kept = S.dropout ? 65536.0F / static_cast<float>(p.keep_threshold) : 1.0F;
    const float normalised = empty ? 0.0F : factor * kept / sum;
    float check = 0.0F;
#pragma unroll
    for (int c = 0; c < kD; ++c) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        o[c].x[e] = empty ? 0.0F : o[c].x[e] * normalised;
        check += o[c].x[e] * 0.0F;
      }
    }
    if (p.lse.data != nullptr && v_begin == 0 && lane_id() % 4 == 0) {
      *sequence.statistic(p.lse, query, head) = empty ? -infinity() : kLn2 * (maximum + log2(sum));
    }
    return check == 0.0F;
  }

  FOVEA_DEVICE void store_part(const Accumulator (&o)[kD], int h, int r, int split, float maximum, float sum) const {
    const int query = rows.query(r), head = rows.head(r);
    const i64 row = (i64{sequence.batch} * p.q_heads + head) * p.seqlen_q + query;
    float* part = p.partials + (row * p.splits + split) * (p.head_dim_v + 2);
#pragma unroll
    for (int c = 0; c < kD; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = v_begin + 8 * c + lane_id() % 4 * 2 + e;
        if (column < p.head_dim_v) part[column] = o[c].x[2 * h + e];
      }
    }
    if (v_begin == 0 && lane_id() % 4 == 0) {
      part[p.head_dim_v] = maximum;
      part[p.head_dim_v + 1] = sum;
    }
  }

  /// Through shared memory, so that rows leave in whole pieces of 16 bytes.
  FOVEA_DEVICE void store_out(const Out& o) const {
    const OutTile tile = out_tile();
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int c = 0; c < kD; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const u32 at = tile.at(warp_row() + entry_row(i, 2 * h), 8 * c + lane_id() % 4 * 2);
          const float x = o[i][c].x[2 * h], y = o[i][c].x[2 * h + 1];
          if constexpr (S.type == Type::kFloat32) {
            store_shared(at, __float_as_uint(x));
            store_shared(at + 4, __float_as_uint(y));
          } else {
            store_shared(at, pack<S.type>(x, y));
          }
        }
      }
    }
    __syncwarp();  // a warp stores its own rows
    constexpr int kPieces = OutTile::kPieces;
    const int columns = math::smaller(p.head_dim_v - v_begin, S.head_dim_v), bytes = columns * kBytes<S.type>;
#pragma unroll 1
    for (int at = lane_id(); at < 16 * kM * kPieces; at += kWarp) {
      const int r = warp_row() + at / kPieces, piece = at % kPieces;
      if (r >= rows.left() || piece * 16 >= bytes) continue;
      const uint4 x = load_shared_16(tile.base + r * OutTile::kPitch + piece * 16);
      char* to = sequence.q_row(p.out, rows.query(r), rows.head(r)) + v_begin * kBytes<S.type> + piece * 16;
      if (p.out.aligned && piece * 16 + 16 <= bytes) {
        *reinterpret_cast<uint4*>(to) = x;
      } else {
        scatter_16(to, x, bytes - piece * 16);
      }
    }
  }
};

/// Blocks: row blocks (late ones, which see the most under a causal rule, first) × parts of the keys × columns of v ×
/// heads × batch.
template <ForwardSpec S>
__device__ void forward(const ForwardParams& p) {
  extern __shared__ __align__(128) char shared[];
  int block = static_cast<int>(blockIdx.x);
  const auto take = [&block](int count) {
    const int part = block % count;
    block /= count;
    return part;
  };
  const int row_block = p.row_blocks - 1 - take(p.row_blocks), split = take(p.splits), chunk = take(p.v_chunks);
  const int heads = S.pack_gqa ? p.kv_heads : p.q_heads, group = p.q_heads / p.kv_heads;
  const int head = take(heads);
  const Sequence sequence(p, block);
  const RowMap<S.pack_gqa> rows{row_block * S.block_m, sequence.q_rows * (S.pack_gqa ? group : 1),
                                S.pack_gqa ? head * group : head, S.pack_gqa ? group : 1};
  if (rows.left() <= 0) return;
  const ScoreRules<S, S.pack_gqa> rules{p, sequence, rows};
  Forward<S>{p, sequence, rows, rules, S.pack_gqa ? head : head / group, chunk * S.head_dim_v, shared_address(shared)}.run(split);
}

}  // namespace fovea::cuda
