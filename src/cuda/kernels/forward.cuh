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
  using Order = KeyOrder<S.block_n, S.bias>;
  using Rules = ScoreRules<S, S.pack_gqa, Order>;
  using Scores = Accumulator[kM][kN];
  using Out = Accumulator[kM][kD];

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
    const char *k, *v;  // the sequence's, of the block's head and columns
    Interval keys;      // that the block walks
    Band::Reach reach[S.warps];
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
      load_scattered_rows<S.async_copy, kThreads>(q_tile(), rows.left(), bytes, p.q.aligned, [&](int r) {
        return sequence.q_row(p.q, rows.query(r), rows.head(r));
      });
    } else {
      load_rows<S.async_copy, kThreads>(q_tile(), rows.left(), bytes, p.q.aligned,
                                        sequence.q_row(p.q, rows.first, rows.first_head), p.q.row);
    }
  }
  template <int kParts, class Tile>
  using Copies = RowCopies<S.async_copy, kThreads, Order, kParts, Tile>;
  template <int kParts = 1>
  FOVEA_DEVICE Copies<kParts, KTile> k_copies(int tile, int stage) const {
    const int key = tile * S.block_n;
    return {k_tile(stage), sequence.band.seqlen_kv - key, p.head_dim * kBytes<S.type>,
            p.k.aligned,   block.k + key * p.k.row,       p.k.row};
  }
  template <int kParts = 1>
  FOVEA_DEVICE Copies<kParts, VTile> v_copies(int tile, int stage) const {
    const int key = tile * S.block_n, columns = math::smaller(p.head_dim_v - block.v_begin, S.head_dim_v);
    return {v_tile(stage), sequence.band.seqlen_kv - key, columns * kBytes<S.type>,
            p.v.aligned,   block.v + key * p.v.row,       p.v.row};
  }
  FOVEA_DEVICE void load(int tile, int stage) const {
    k_copies(tile, stage).all();
    v_copies(tile, stage).all();
  }

  /// S = Q Kᵀ.
  template <class Between>
  FOVEA_DEVICE void multiply_qk(Scores& s, const KTile& tile, Between& between) const {
    const int lane = fresh(lane_id());
    const Corner<QTile> q = corner_a(q_tile(), lane, warp_row(), 0);
    const Corner<KTile> k = corner_b_rows(tile, lane, 0, 0);
    multiply_steps<S, S.head_dim / kK>(
        s, [&](int i, int c) { return load_a(q, 16 * i, c); },
        [&](OperandB(&two)[2], int j, int c) { load_b_rows(two, k, 8 * j, c); }, [](int) { return Accumulator{}; },
        between);
  }

  /// O += P V.
  template <class Between>
  FOVEA_DEVICE void multiply_pv(Out& o, const Scores& weights, const VTile& tile, Between& between) const {
    const Corner<VTile> v = corner_b_columns(tile, fresh(lane_id()), 0, 0);
    multiply_steps<S, S.block_n / kK, true>(
        o, [&](int i, int key) { return operand_a<S.type>(weights[i], key / kK); },
        [&](OperandB(&two)[2], int c, int key) { load_b_columns(two, v, key, 8 * c); }, OnTop{}, between);
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
  template <class Between>
  FOVEA_DEVICE bool weigh(Scores& s, Out& o, Running& running, int tile, int stage, float unit,
                          Between&& between) const {
    const int key = tile * S.block_n;
    const TileState state = block.reach[fresh(warp_id())].tile({key, key + S.block_n});
    if (state == TileState::kHidden) return false;
    float sum[kM][2];
    bool raise = !running.settled, fits;
#pragma unroll 1
    do {  // twice where the references do not serve
      Entries<S, kM, kN> entries;
      rules.fetch(entries, warp_row(), key);
      multiply_qk(s, k_tile(stage), between);
      between.close();
      rules.finish(s, warp_row(), key, state, entries);
      if (raise) raise_references(s, running, o, unit);
      fits = exponentiate(s, running, sum, unit) || raise;
      raise = true;
    } while (!fits);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) running.sum[i][h] += sum[i][h];
    }
    return true;
  }

  template <class Between>
  FOVEA_DEVICE void add_values(Out& o, Scores& weights, int tile, int stage, Between&& between) const {
    if constexpr (S.dropout) {
      const math::DropoutStream stream = rules.stream(rows.first_head);
      rules.template for_each_draw<kM, kN>(warp_row(), tile * S.block_n, stream, [&](int i, int j, int e, bool kept) {
        if (!kept) weights[i][j].x[e] = 0.0F;
      });
    }
    // A block of instructions of its own: ptxas else moves O about in registers to share it with the redone scores.
#pragma unroll 1
    for (int once = fresh(0); once < 1; ++once) multiply_pv(o, weights, v_tile(stage), between);
  }

  /// Tiles of keys arrive stages − 1 ahead, last ones first.
  FOVEA_DEVICE void walk_ahead(Out& o, Running& running, int first, int last, float unit) const {
#pragma unroll
    for (int ahead = 0; ahead < S.stages - 1; ++ahead) {
      if (last - ahead >= first) load(last - ahead, ahead);
      close_copies<S.async_copy>();
    }
    int stage = 0;
#pragma unroll 1
    for (int tile = last; tile >= first; --tile) {
      await_copies<S.async_copy, math::larger(S.stages - 2, 0)>();
      __syncthreads();  // this tile is there for all, and all are done with the one whose place comes next
      const int ahead = tile - (S.stages - 1), free = stage == 0 ? S.stages - 1 : stage - 1;
      if (ahead >= first) load(ahead, free);
      close_copies<S.async_copy>();
      Scores s;
      if (weigh(s, o, running, tile, stage, unit, Nothing{})) add_values(o, s, tile, stage, Nothing{});
      stage = stage + 1 == S.stages ? 0 : stage + 1;
    }
  }

  /// One place for K and one for V: V arrives while S is made, the next K while P V is.
  FOVEA_DEVICE void walk_in_turns(Out& o, Running& running, int first, int last, float unit) const {
    k_copies(last, 0).all();
    close_copies<S.async_copy>();
#pragma unroll 1
    for (int tile = last; tile >= first; --tile) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // K is there for all, and all are done with V
      auto v = v_copies<S.head_dim / kK>(tile, 0);
      Scores s;
      const bool seen = weigh(s, o, running, tile, 0, unit, v);
      if (!seen) v.all();
      close_copies<S.async_copy>();
      await_copies<S.async_copy, 0>();
      __syncthreads();  // V is there for all, and all are done with K
      auto k = k_copies<S.block_n / kK>(math::larger(tile - 1, first), 0);
      if (tile == first) k.close();
      if (seen) {
        add_values(o, s, tile, 0, k);
      } else {
        k.all();
      }
      close_copies<S.async_copy>();
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
        for (int c = 0; kHidesValues && c < kD; ++c) check += o[i][c].x[2 * h] * 0.0F + o[i][c].x[2 * h + 1] * 0.0F;
        const float sum = quad_sum(running.sum[i][h]), reference = running.reference[i][h];
        float factor = 1.0F;
        if (r < rows.left())
          factor = S.split ? store_part(o[i], h, r, reference, sum) : normalise(o[i], h, r, reference, sum);
        if constexpr (kHidesValues) spoiled |= keep_row_facts(r, reference, factor, quad_sum(check) == 0.0F);
      }
    }
    if constexpr (!S.split) store_out(o);
    __syncwarp();
    if (kHidesValues && __any_sync(kAllLanes, spoiled)) mend_rows();
  }

  // ---- rows that are not finite: a hidden entry has weight 0, but 0 · NaN is NaN; made once more of what they see

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
  if (lane_id() == 0) {
    int row_block = static_cast<int>(blockIdx.x), part = 0;
    if (row_block >= p.row_blocks) {
      part = row_block / p.row_blocks;
      row_block -= part * p.row_blocks;
    }
    const int head = static_cast<int>(blockIdx.y), group = S.pack_gqa ? p.group : 1;
    const Sequence sequence = Sequence::of(p, p.first_batch + static_cast<int>(blockIdx.z));
    const typename Kernel::Rows rows{(p.row_blocks - 1 - row_block) * S.block_m, sequence.q_rows * group, head * group,
                                     group};
    constexpr int kRows = S.block_m / S.warps;
    const int warp = warp_id();
    me.reach[warp] = sequence.band.reach(rows.queries(warp * kRows, (warp + 1) * kRows));
    if (warp == 0) {
      me.sequence = sequence;
      me.rows = rows;
      me.kv_head = S.pack_gqa || p.group == 1 ? head : head / p.group;
      me.v_begin = 0, me.split = part;
      if (p.v_chunks > 1) {
        me.v_begin = part % p.v_chunks * S.head_dim_v;
        me.split = part / p.v_chunks;
      }
      me.k = sequence.kv_row(p.k, 0, me.kv_head);
      me.v = sequence.kv_row(p.v, 0, me.kv_head) + me.v_begin * kBytes<S.type>;
      me.keys = sequence.band.keys_of_rows(rows.queries(0, S.block_m));
      if constexpr (S.split) {
        const int begin = me.split * p.keys_per_split;
        me.keys = {math::larger(me.keys.begin, begin), math::smaller(me.keys.end, begin + p.keys_per_split)};
      }
    }
  }
  __syncthreads();
  if (me.rows.left() > 0) Kernel{p, me, shared_address(shared)}.run();
}

}  // namespace fovea::cuda
