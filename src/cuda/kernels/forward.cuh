#pragma once

#include "cuda/kernels/scores.cuh"

// FlashAttention's forward (2205.14135, algorithm 1; rows split among warps as in 2307.08691): a block owns block_m
// rows and walks the keys, last ones first; K and V arrive in shared memory a tile ahead; S, P and O stay in registers.
namespace fovea::cuda {

/// What makes a row's out and lse of its sums.
struct RowEnd {
  float factor, lse;
  bool empty;
};
template <ForwardSpec S>
FOVEA_DEVICE RowEnd end_of_row(const ForwardParams& p, int head, float reference, float sum) {
  if (sum == 0.0F) return {0.0F, -infinity(), true};  // a visible key leaves more, or a NaN
  float factor = 1.0F;
  if (p.sink != nullptr) {
    const float sink = p.sink[head] * kLog2E, top = fmaxf(sink, reference);
    factor = exp2(reference - top);
    sum = sum * factor + exp2(sink - top);
    reference = top;
  }
  const float kept = S.dropout ? 65536.0F / static_cast<float>(p.keep_threshold) : 1.0F;
  return {factor * kept / sum, kLn2 * (reference + log2(sum)), false};
}

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

  using Rows = RowMap<S.pack_gqa>;
  using Rules = ScoreRules<S, S.pack_gqa>;
  using Scores = Accumulator[kM][kN];
  using Out = Accumulator[kM][kD];
  using QOperands = OperandA[kM][S.q_in_registers ? S.head_dim / kK : 1];

  static constexpr bool kHidesValues = S.band || S.mask || S.bias;  // of keys that other rows see

  /// Of a thread's rows, 2 in each piece of 16: what exponents are taken against, in units of log2 (−infinity until a
  /// key was seen), and this lane's part of the sum.
  struct Running {
    float reference[kM][2], sum[kM][2];
    bool settled;  // every row of the warp has a reference
  };

  /// What all threads of a block share; in shared memory, because registers are for S and O.
  struct Block {
    Sequence sequence;
    Rows rows;
    int kv_head, v_begin, split;
    Interval keys;  // that the block walks
  };

  const ForwardParams& p;
  const Block& block;
  const u32 shared;
  const Sequence& sequence = block.sequence;
  const Rows& rows = block.rows;
  const Rules rules{p, block.sequence, block.rows};

  FOVEA_DEVICE QTile q_tile() const { return {shared}; }
  FOVEA_DEVICE OutTile out_tile() const { return {shared}; }
  FOVEA_DEVICE KTile k_tile(int stage) const { return {shared + q_bytes(S) + stage * stage_bytes(S)}; }
  FOVEA_DEVICE VTile v_tile(int stage) const { return {k_tile(stage).base + KTile::kSize}; }
  FOVEA_DEVICE int warp_row() const { return warp_id() * kM * 16; }

  FOVEA_DEVICE void load_q() const {
    const int bytes = p.head_dim * kBytes<S.type>;
    if constexpr (S.pack_gqa) {
      load_scattered_tile<S.async_copy, kThreads>(q_tile(), rows.left(), bytes, p.q.aligned, [&](int r) {
        return sequence.q_row(p.q, rows.query(r), rows.head(r));
      });
    } else {
      load_tile<S.async_copy, kThreads>(q_tile(), sequence.q_row(p.q, rows.first, rows.first_head), p.q.row,
                                        rows.left(), bytes, p.q.aligned);
    }
  }
  FOVEA_DEVICE void load_k(int tile, int stage) const {
    const int key = tile * S.block_n;
    load_tile<S.async_copy, kThreads>(k_tile(stage), sequence.kv_row(p.k, key, block.kv_head), p.k.row,
                                      sequence.band.seqlen_kv - key, p.head_dim * kBytes<S.type>, p.k.aligned);
  }
  FOVEA_DEVICE void load_v(int tile, int stage) const {
    const int key = tile * S.block_n, columns = math::smaller(p.head_dim_v - block.v_begin, S.head_dim_v);
    load_tile<S.async_copy, kThreads>(v_tile(stage),
                                      sequence.kv_row(p.v, key, block.kv_head) + block.v_begin * kBytes<S.type>,
                                      p.v.row, sequence.band.seqlen_kv - key, columns * kBytes<S.type>, p.v.aligned);
  }

  FOVEA_DEVICE void keep_q(QOperands& kept) const {
#pragma unroll
    for (int i = 0; S.q_in_registers && i < kM; ++i) {
#pragma unroll
      for (int c = 0; c < S.head_dim; c += kK)
        kept[i][S.q_in_registers ? c / kK : 0] = load_a(q_tile(), warp_row() + 16 * i, c);
    }
  }

  /// S = Q Kᵀ.
  FOVEA_DEVICE void multiply_qk(Scores& s, const QOperands& kept, const KTile& k) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) s[i][j] = {};
    }
#pragma unroll
    for (int pass = 0; pass < kPasses<S.mma>; ++pass) {
#pragma unroll 8
      for (int c = 0; c < S.head_dim; c += kK) {
        OperandA q[kM];
#pragma unroll
        for (int i = 0; i < kM; ++i)
          q[i] = S.q_in_registers ? kept[i][S.q_in_registers ? c / kK : 0] : load_a(q_tile(), warp_row() + 16 * i, c);
#pragma unroll
        for (int j = 0; j < kN; j += 2) {
          OperandB kj[2];
          load_b_rows(kj, k, 8 * j, c);
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            multiply_add<S.type, S.mma>(s[i][j], q[i], kj[0], pass);
            multiply_add<S.type, S.mma>(s[i][j + 1], q[i], kj[1], pass);
          }
        }
      }
    }
  }

  /// O += P V, some columns at a time.
  FOVEA_DEVICE void multiply_pv(Out& o, const Scores& weights, const VTile& v) const {
    constexpr bool kExact = S.type == Type::kFloat32;
    constexpr int kColumns = !kExact ? kD : kD % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int first = 0; first < kD; first += kColumns) {
      Accumulator sum[kM][kColumns];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[i][c] = kExact ? Accumulator{} : o[i][first + c];
      }
#pragma unroll
      for (int pass = 0; pass < kPasses<S.mma>; ++pass) {
#pragma unroll
        for (int key = 0; key < S.block_n; key += kK) {
          OperandA w[kM];
#pragma unroll
          for (int i = 0; i < kM; ++i) w[i] = operand_a<S.type>(weights[i], key / kK);
#pragma unroll
          for (int c = 0; c < kColumns; c += 2) {
            OperandB vc[2];
            load_b_columns(vc, v, key, 8 * (first + c));
#pragma unroll
            for (int i = 0; i < kM; ++i) {
              multiply_add<S.type, S.mma>(sum[i][c], w[i], vc[0], pass);
              multiply_add<S.type, S.mma>(sum[i][c + 1], w[i], vc[1], pass);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = o[i][first + c].x[e];
            x = kExact ? x + sum[i][c].x[e] : sum[i][c].x[e];
          }
        }
      }
    }
  }

  /// Raises each row's reference to the largest score seen; sum and O move on to it.
  FOVEA_DEVICE void raise_references(const Scores& s, Running& running, Out& o, float unit) const {
    running.settled = true;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -infinity();
#pragma unroll
        for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[i][j].x[2 * h], s[i][j].x[2 * h + 1]));
        top = fmaxf(running.reference[i][h], quad_max(top) * unit);
        running.settled &= top > -infinity();
        const float rescale = top == -infinity() ? 1.0F : exp2(running.reference[i][h] - top);
        running.reference[i][h] = top;
        running.sum[i][h] *= rescale;
#pragma unroll
        for (int c = 0; c < kD; ++c) {
          o[i][c].x[2 * h] *= rescale;
          o[i][c].x[2 * h + 1] *= rescale;
        }
      }
    }
    running.settled = __all_sync(kAllLanes, running.settled);
  }

  /// S becomes P = 2^(unit·S − reference).  Any reference is exact as long as sums stay in range: false where they do
  /// not, or a NaN came in.
  FOVEA_DEVICE static bool exponentiate(Scores& s, const Running& running, float (&sum)[kM][2], float unit) {
    constexpr float kMost = 8192.0F;
    bool fits = true;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[i][h] = 0.0F;
        const float reference = larger_than_minus_infinity(running.reference[i][h]);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            s[i][j].x[e] = exp2(s[i][j].x[e] * unit - reference);
            sum[i][h] += s[i][j].x[e];
          }
        }
        fits &= sum[i][h] < kMost;
      }
    }
    return __all_sync(kAllLanes, fits);
  }
  /// Nothing visible yet: keep −inf − −inf away.
  FOVEA_DEVICE static float larger_than_minus_infinity(float reference) {
    return reference == -infinity() ? 0.0F : reference;
  }

  /// P of one tile of keys, its sums taken along.  False, and nothing computed, where this warp's rows see none of
  /// them. The search for a maximum is left out where the references still serve: it costs more than the exponentials.
  FOVEA_DEVICE bool weigh(Scores& s, const QOperands& kept, Out& o, Running& running, int tile, int stage,
                          float unit) const {
    const int key = tile * S.block_n;
    const Interval mine = rows.queries(warp_row(), warp_row() + 16 * kM);
    const TileState state = mine.empty() ? TileState::kHidden : sequence.band.tile(mine, {key, key + S.block_n});
    if (state == TileState::kHidden) return false;
    bool raise = !running.settled;
    for (;;) {  // twice where the references do not serve
      EntryPairs<S, kM, kN> pairs;
      rules.fetch(pairs, warp_row(), key);
      multiply_qk(s, kept, k_tile(stage));
      rules.template finish<false>(s, warp_row(), key, state, S.mask, static_cast<Accumulator(*)[kN]>(nullptr), pairs);
      if (raise) raise_references(s, running, o, unit);
      float sum[kM][2];
      if (exponentiate(s, running, sum, unit) || raise) {
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) running.sum[i][h] += sum[i][h];
        }
        return true;
      }
      raise = true;
    }
  }

  FOVEA_DEVICE void add_values(Out& o, Scores& weights, int tile, int stage) const {
    if constexpr (S.dropout) {
      const math::DropoutStream stream = rules.stream(rows.first_head);
      rules.template drop<false>(weights, warp_row(), tile * S.block_n, stream,
                                 [](float& x, bool kept) { x = kept ? x : 0.0F; });
    }
    multiply_pv(o, weights, v_tile(stage));
  }

  /// Tiles of keys arrive stages − 1 ahead, last ones first.
  FOVEA_DEVICE void walk_ahead(Out& o, Running& running, int first, int last, float unit) const {
#pragma unroll
    for (int ahead = 0; ahead < S.stages - 1; ++ahead) {
      if (last - ahead >= first) load_k(last - ahead, ahead), load_v(last - ahead, ahead);
      close_copies<S.async_copy>();
    }
    int stage = 0;
    QOperands kept;
#pragma unroll 1
    for (int tile = last; tile >= first; --tile) {
      await_copies<S.async_copy, math::larger(S.stages - 2, 0)>();
      __syncthreads();  // this tile is there for all, and all are done with the one whose place comes next
      if (tile == last) keep_q(kept);
      const int ahead = tile - (S.stages - 1), free = stage == 0 ? S.stages - 1 : stage - 1;
      if (ahead >= first) load_k(ahead, free), load_v(ahead, free);
      close_copies<S.async_copy>();
      Scores s;
      if (weigh(s, kept, o, running, tile, stage, unit)) add_values(o, s, tile, stage);
      stage = stage + 1 == S.stages ? 0 : stage + 1;
    }
  }

  /// One place for K and one for V: V arrives while S is made, the next K while P V is.
  FOVEA_DEVICE void walk_in_turns(Out& o, Running& running, int first, int last, float unit) const {
    load_k(last, 0);
    close_copies<S.async_copy>();
    QOperands kept;
#pragma unroll 1
    for (int tile = last; tile >= first; --tile) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // K is there for all, and all are done with V
      if (tile == last) keep_q(kept);
      load_v(tile, 0);
      close_copies<S.async_copy>();
      Scores s;
      const bool seen = weigh(s, kept, o, running, tile, 0, unit);
      await_copies<S.async_copy, 0>();
      __syncthreads();  // V is there for all, and all are done with K
      if (tile > first) load_k(tile - 1, 0);
      close_copies<S.async_copy>();
      if (seen) add_values(o, s, tile, 0);
    }
  }

  FOVEA_DEVICE void run() const {
    const int first = block.keys.begin / S.block_n;
    const int last = block.keys.empty() ? first - 1 : (block.keys.end - 1) / S.block_n;
    Out o;
    Running running;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) running.reference[i][h] = -infinity(), running.sum[i][h] = 0.0F;
#pragma unroll
      for (int c = 0; c < kD; ++c) o[i][c] = {};
    }
    const float unit = score_unit<S>(p);

    running.settled = false;
    if (first <= last) {
      load_q();
      if constexpr (S.stages == 1) {
        walk_in_turns(o, running, first, last, unit);
      } else {
        walk_ahead(o, running, first, last, unit);
      }
    }
    await_copies<S.async_copy, 0>();
    __syncthreads();
    finish(o, running);
  }

  /// Divides by the sums and writes O and lse, or this split's part of them.
  FOVEA_DEVICE void finish(Out& o, Running& running) const {
    bool spoiled = false;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = warp_row() + entry_row(i, 2 * h);
        float check = 0.0F;
#pragma unroll
        for (int c = 0; c < kD; ++c) check += o[i][c].x[2 * h] * 0.0F + o[i][c].x[2 * h + 1] * 0.0F;
        const float sum = quad_sum(running.sum[i][h]), reference = running.reference[i][h];
        float factor = 1.0F;
        if (r < rows.left())
          factor = S.split ? store_part(o[i], h, r, reference, sum) : normalise(o[i], h, r, reference, sum);
        spoiled |= keep_row_facts(r, reference, factor, quad_sum(check) == 0.0F);
      }
    }
    if constexpr (!S.split) store_out(o);
    __syncwarp();
    if (kHidesValues && __any_sync(kAllLanes, spoiled)) mend_rows();
  }

  // ---- rows that are not finite
  // --------------------------------------------------------------------------------------- A hidden entry has weight
  // 0, but 0 · NaN is NaN.  Such rows are made once more, entry by entry, of what they see.

  struct RowFacts {
    float reference, factor;
    u32 finite;
  };
  FOVEA_DEVICE u32 facts_at(int r) const { return k_tile(0).base + static_cast<u32>(r) * 16; }

  FOVEA_DEVICE bool keep_row_facts(int r, float reference, float factor, bool finite) const {
    if (lane_id() % 4 == 0) {
      store_shared_16(facts_at(r), {__float_as_uint(reference), __float_as_uint(factor), finite ? 1U : 0U, 0U});
    }
    return !finite && r < rows.left();
  }

  FOVEA_DEVICE void mend_rows() const {
#pragma unroll 1
    for (int r = warp_row(); r < math::smaller(warp_row() + 16 * kM, rows.left()); ++r) {
      const uint4 facts = load_shared_16(facts_at(r));
      if (facts.z == 0) mend_row(r, __uint_as_float(facts.x), __uint_as_float(facts.y));
    }
  }

  FOVEA_DEVICE void mend_row(int r, float reference, float factor) const {
    constexpr int kColumns = (S.head_dim_v + kWarp - 1) / kWarp;
    const int head = rows.head(r), query = rows.query(r);
    float sum[kColumns] = {};
#pragma unroll 1
    for (int first = block.keys.begin; first < block.keys.end; first += kWarp) {
      const int j = first + lane_id();
      const bool visible = j < block.keys.end && rules.visible(r, j);
      float weight = 0.0F;
      if (visible) {
        const char *q = sequence.q_row(p.q, query, head), *k = sequence.kv_row(p.k, j, block.kv_head);
        float qk = 0.0F;
#pragma unroll 1
        for (int c = 0; c < p.head_dim; ++c)
          qk += read<S.type>(q + c * kBytes<S.type>) * read<S.type>(k + c * kBytes<S.type>);
        weight = exp2(rules.finished(qk, r, j, nullptr) * score_unit<S>(p) - reference);
        if constexpr (S.dropout) weight = rules.kept(r, j) ? weight : 0.0F;
      }
#pragma unroll 1
      for (int t = 0; t < kWarp; ++t) {
        const float w = __shfl_sync(kAllLanes, weight, t);
        if (!__shfl_sync(kAllLanes, visible, t)) continue;
        const char* v = sequence.kv_row(p.v, first + t, block.kv_head) + block.v_begin * kBytes<S.type>;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const int column = n * kWarp + lane_id();
          if (block.v_begin + column < p.head_dim_v) sum[n] += w * read<S.type>(v + column * kBytes<S.type>);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int column = n * kWarp + lane_id();
      if (column >= S.head_dim_v || block.v_begin + column >= p.head_dim_v) continue;
      if constexpr (S.split) {
        part_of(query, head)[block.v_begin + column] = sum[n];
      } else {
        write<S.type>(sequence.q_row(p.out, query, head) + (block.v_begin + column) * kBytes<S.type>, sum[n] * factor);
      }
    }
  }

  FOVEA_DEVICE static int entry_row(int i, int e) { return 16 * i + lane_id() / 4 + e / 2 * 8; }

  /// One row: adds the sink, divides; an empty row gives 0 and −infinity.  Returns what O was multiplied by.
  FOVEA_DEVICE float normalise(Accumulator (&o)[kD], int h, int r, float reference, float sum) const {
    const RowEnd end = end_of_row<S>(p, rows.head(r), reference, sum);
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      o[c].x[2 * h] = end.empty ? 0.0F : o[c].x[2 * h] * end.factor;
      o[c].x[2 * h + 1] = end.empty ? 0.0F : o[c].x[2 * h + 1] * end.factor;
    }
    if (p.lse.data != nullptr && block.v_begin == 0 && lane_id() % 4 == 0) {
      *sequence.statistic(p.lse, rows.query(r), rows.head(r)) = end.lse;
    }
    return end.factor;
  }

  FOVEA_DEVICE float* part_of(int query, int head) const {
    const i64 row = (i64{sequence.batch} * p.q_heads + head) * p.seqlen_q + query;
    return p.partials + (row * p.splits + block.split) * (p.head_dim_v + 2);
  }
  FOVEA_DEVICE float store_part(const Accumulator (&o)[kD], int h, int r, float reference, float sum) const {
    float* part = part_of(rows.query(r), rows.head(r));
#pragma unroll
    for (int c = 0; c < kD; ++c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = block.v_begin + 8 * c + lane_id() % 4 * 2 + e;
        if (column < p.head_dim_v) part[column] = o[c].x[2 * h + e];
      }
    }
    if (block.v_begin == 0 && lane_id() % 4 == 0) {
      part[p.head_dim_v] = reference;
      part[p.head_dim_v + 1] = sum;
    }
    return 1.0F;
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
    constexpr int kPieces = OutTile::kPieces, kLanes = kPieces >= 8 ? 8 : 2;
    const int bytes = math::smaller(p.head_dim_v - block.v_begin, S.head_dim_v) * kBytes<S.type>;
#pragma unroll 4
    for (int row = lane_id() / kLanes; row < 16 * kM; row += kWarp / kLanes) {
      const int r = warp_row() + row;
      if (r >= rows.left()) break;
      char* to = sequence.q_row(p.out, rows.query(r), rows.head(r)) + block.v_begin * kBytes<S.type>;
#pragma unroll
      for (int at = lane_id() % kLanes * 16; at < kPieces * 16; at += kLanes * 16) {
        if (at >= bytes) break;
        const uint4 x = load_shared_16(tile.base + r * OutTile::kPitch + at);
        if (p.out.aligned && at + 16 <= bytes) {
          *reinterpret_cast<uint4*>(to + at) = x;
        } else {
          scatter_16(to + at, x, bytes - at);
        }
      }
    }
  }
};

/// Blocks: x: row blocks (late ones, which see the most under a causal rule, first) × columns of v × parts of the keys;
/// y: heads; z: sequences.
template <ForwardSpec S>
__device__ void forward(const ForwardParams& p) {
  using Kernel = Forward<S>;
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(16) char block_memory[sizeof(typename Kernel::Block)];
  typename Kernel::Block& me = *reinterpret_cast<typename Kernel::Block*>(block_memory);
  if (threadIdx.x == 0) {
    const int x = static_cast<int>(blockIdx.x), part = x / p.row_blocks, head = static_cast<int>(blockIdx.y);
    me.sequence = Sequence::of(p, p.first_batch + static_cast<int>(blockIdx.z));
    const int group = S.pack_gqa ? p.group : 1;
    me.rows = {(p.row_blocks - 1 - x % p.row_blocks) * S.block_m, me.sequence.q_rows * group, head * group, group};
    me.kv_head = S.pack_gqa ? head : head / p.group;
    me.v_begin = part % p.v_chunks * S.head_dim_v;
    me.split = part / p.v_chunks;
    me.keys = me.sequence.band.keys_of_rows(me.rows.queries(0, S.block_m));
    if constexpr (S.split) {
      const int begin = me.split * p.keys_per_split;
      me.keys = {math::larger(me.keys.begin, begin), math::smaller(me.keys.end, begin + p.keys_per_split)};
    }
  }
  __syncthreads();
  if (me.rows.left() > 0) Kernel{p, me, shared_address(shared)}.run();
}

}  // namespace fovea::cuda
