#pragma once

#include "cuda/kernels/forward_end.cuh"

// FlashAttention's forward (2205.14135, algorithm 1; rows split among warps as in 2307.08691): a block owns block_m
// rows and walks the keys, last ones first.  K and V arrive in shared memory a tile ahead; S, P and O in registers.
namespace fovea::cuda {

template <ForwardSpec S>
struct Forward : ForwardEnd<S> {
  using Base = ForwardEnd<S>;
  using Base::find_first_steps, Base::find_later_steps, Base::tile_of, Base::mask_of;
  using Base::join_slices, Base::finish;
  using Base::kM, Base::kN, Base::kD, Base::kK, Base::kThreads, Base::kUnseen;
  using Base::p, Base::block, Base::sequence, Base::rows, Base::rules;
  using Base::q_tile, Base::q_rests, Base::k_tile, Base::v_tile, Base::weight_tile;
  using Base::slice, Base::warp_row, Base::warp_key, Base::warp_column, Base::each_row, Base::entry_row;
  using Base::sync_slice, Base::sync_row_sharers, Base::share_rows;
  using typename Base::KTile, typename Base::Order, typename Base::Out, typename Base::QTile, typename Base::Running,
      typename Base::Scores, typename Base::Share, typename Base::VTile, typename Base::WeightTile;

  /// Pieces of 8 keys that pass through the exponential while the products of those before are made.
  static constexpr int kChunk = S.type == Type::kFloat32 || S.across > 1 ? kN : 2 * Order::kGroups;
  static constexpr int kChunks = kN / kChunk;

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
    if constexpr (S.alibi) {
      constexpr float kLeast = S.type == Type::kFloat16 ? 0x1p-8F : 0x1p-20F;  // P of smaller ones has fewer digits
      float sums[kM][2];
      each_row([&](int i, int h, int) { sums[i][h] = quad_sum(running.sum[i][h]); });
      share_rows(sums, [](float a, float b) { return a + b; });
      each_row([&](int i, int h, int) { fits &= running.reference[i][h] <= kUnseen || sums[i][h] >= kLeast; });
    }
    return fits && check[0] + check[1] + check[2] + check[3] == 0.0F;
  }

  // ---- the walk over tiles of keys

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

  // ---- a tile's S

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
      raise_references(s, running, o, unit, tile);
    }
    return true;
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

  /// Raises each row's reference to the largest score seen, and rescales sum and O.  The first one is raised, too, by
  /// what a slope adds on the way to the slice's other keys, most of which sums have room for.
  FOVEA_DEVICE void raise_references(const Scores& s, Running& running, Out& o, float unit, int tile) const {
    [[maybe_unused]] const int first = static_cast<int>(block.keys.begin) / S.block_n, key = tile * S.block_n,
                               first_key = (first + (tile - first) % S.slices) * S.block_n;

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
      float top = fmaxf(reference, tops[x / 2][x % 2] * unit);
      if constexpr (S.alibi) {
        constexpr float kRoom = 4.0F;
        const int r = warp_row() + entry_row(x / 2, x % 2 * 2);
        if (!block.careful && top > kUnseen && reference <= kUnseen)
          top += fmaxf(rules.rise(r, {key, key + S.block_n}, {first_key, key + S.block_n}) * unit - kRoom, 0.0F);
      }
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

  // ---- its P, and O

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

  // ---- rows of q, k and v to shared memory

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
