#pragma once

#include "cuda/kernels/bias_walk.cuh"
#include "cuda/kernels/gradient_tile.cuh"

// dbias: a block owns one tile of it (a broadcast dimension is one entry long), walks all rows, keys, heads and
// sequences that add to it, recomputes their dS and sums it: entry (i, j) of each at (i mod block_m, j mod block_n).
// Where tiles are few, several blocks share out the walk of each, and `bias_sums` adds up their parts.
namespace fovea::cuda {

template <BackwardSpec S>
struct BiasGradient {
  static constexpr int kThreads = S.warps * kWarp;
  static constexpr BackwardShared kShared = BackwardShared::of(S);
  using Scores = GradientTile<S>;
  using Rules = typename Scores::Rules;
  using Order = typename Scores::Order;
  using SumTile = SharedTile<Type::kFloat32, S.block_m, S.block_n>;  // in the place of all else

  const BackwardParams& p;
  const u32 shared;

  /// A step's rows or keys, of an operand that has a place in shared memory at `offset`, or none.
  template <int kDim>
  FOVEA_DEVICE auto rows_at(int offset, const BiasStep& at, const RowView& view, int columns) const {
    if constexpr (S.in_place) {
      const int row = at.row_tile * S.block_m;
      return place_tile<S.type, kDim>(at.sequence.q_row(view, row, at.head), view.row, at.sequence.band.seqlen_q - row,
                                      columns);
    } else {
      return Tile<S.type, S.block_m, kDim, swizzles(S, kDim)>{fresh(shared) + offset};
    }
  }
  template <int kDim>
  FOVEA_DEVICE auto keys_at(int offset, const BiasStep& at, const RowView& view, int columns) const {
    if constexpr (S.in_place) {
      const int key = at.key_tile * S.block_n;
      return place_tile<S.type, kDim, Order>(at.sequence.kv_row(view, key, at.head / p.group), view.row,
                                             at.sequence.band.seqlen_kv - key, columns);
    } else {
      return Tile<S.type, S.block_n, kDim, swizzles(S, kDim)>{fresh(shared) + offset};
    }
  }
  FOVEA_DEVICE auto q(const BiasStep& at) const { return rows_at<S.head_dim>(kShared.ring, at, p.q, p.head_dim); }
  FOVEA_DEVICE auto dout(const BiasStep& at) const {
    return rows_at<S.head_dim_v>(kShared.ring + kShared.dout, at, p.dout, p.head_dim_v);
  }
  FOVEA_DEVICE auto k(const BiasStep& at) const { return keys_at<S.head_dim>(kShared.k, at, p.k, p.head_dim); }
  FOVEA_DEVICE auto v(const BiasStep& at) const { return keys_at<S.head_dim_v>(kShared.v, at, p.v, p.head_dim_v); }
  FOVEA_DEVICE u32 statistics() const { return fresh(shared) + kShared.ring + kShared.statistics; }

  /// Loads the tiles that the step before has not left there.
  FOVEA_DEVICE void load(const BiasStep& at) const {
    constexpr int kSize = kBytes<S.type>;
    const Sequence& sequence = at.sequence;
    if (at.new_rows) {
      const int row = at.row_tile * S.block_m, rows = sequence.band.seqlen_q - row;
      load_rows<S.async_copy, kThreads>(q(at), rows, p.head_dim * kSize, p.q.aligned, sequence.q_row(p.q, row, at.head),
                                        p.q.row);
      load_rows<S.async_copy, kThreads>(dout(at), rows, p.head_dim_v * kSize, p.dout.aligned,
                                        sequence.q_row(p.dout, row, at.head), p.dout.row);
      const i64 slot = RowSlots(p, sequence, S.block_m).at(at.head, at.row_tile) * S.block_m;
      if (const int x = static_cast<int>(threadIdx.x); x < S.block_m / 2) {  // log2_lse, then delta
        const float* from = (x < S.block_m / 4 ? p.log2_lse : p.delta) + slot + x % (S.block_m / 4) * 4;
        copy_or_clear<S.async_copy>(statistics() + x * 16, reinterpret_cast<const char*>(from), true);
      }
    }
    if (at.new_keys) {
      const int key = at.key_tile * S.block_n, keys = sequence.band.seqlen_kv - key, kv_head = at.head / p.group;
      load_rows<S.async_copy, kThreads, Order>(k(at), keys, p.head_dim * kSize, p.k.aligned,
                                               sequence.kv_row(p.k, key, kv_head), p.k.row);
      load_rows<S.async_copy, kThreads, Order>(v(at), keys, p.head_dim_v * kSize, p.v.aligned,
                                               sequence.kv_row(p.v, key, kv_head), p.v.row);
    }
    close_copies<S.async_copy>();
  }

  /// Adds a step's dS.
  FOVEA_DEVICE void add(Scores& tile, float (&sum)[Scores::kM][Scores::kN][4], const BiasStep& at) const {
    const RowMap<Packing::kNone> map{at.row_tile * S.block_m, at.sequence.q_rows, at.head, 1};
    const Rules rules{p, at.sequence, map};
    const math::DropoutStream stream = S.dropout ? uniform(rules.stream(at.head)) : math::DropoutStream{};
    tile.template compute<true>(q(at), k(at), dout(at), v(at), statistics(), rules, at.key_tile * S.block_n, at.sight,
                                stream);
    tile.each([&](int i, int j, int e) { sum[i][j][e] += tile.ds[i][j].x[e]; });
  }

  FOVEA_DEVICE void run() const {
    __shared__ __align__(16) char steps[2][sizeof(BiasStep)];
    const auto step = [&](int n) -> BiasStep& { return *reinterpret_cast<BiasStep*>(steps[n % 2]); };
    Scores tile;
    float sum[Scores::kM][Scores::kN][4] = {};
    const auto walk = [&] { return BiasWalk<S>{p, BiasTile<S>(p, static_cast<int>(fresh(blockIdx.x)))}; };
    if (warp_id() == 0) walk().begin(step(0));
#pragma unroll 1
    for (int n = 0;; ++n) {
      __syncthreads();  // the step is known, and all threads are done with the one before
      const BiasStep& at = step(n);
      if (at.left <= 0) break;
      load(at);
      if (threadIdx.x == 0) step(n + 1) = walk().after(at);
      await_copies<S.async_copy, 0>();
      __syncthreads();
      if (Scores::works()) add(tile, sum, at);
    }
    store(sum, walk().to);
  }

  /// Through shared memory, where broadcast rows and keys are summed: where both are, by the lanes of a warp.
  FOVEA_DEVICE void store(const float (&sum)[Scores::kM][Scores::kN][4], const BiasTile<S>& to) const {
    const SumTile sums{shared};
    if (Scores::works()) {
      Scores::each([&](int i, int j, int e) {
        const int r = Scores::row() + Rules::row_of(i, e), c = Scores::column() + Rules::key_of(j, e);
        store_shared(sums.at(r, c), __float_as_uint(sum[i][j][e]));
      });
    }
    __syncthreads();
    const bool own_row = to.own_row(), own_key = to.own_key();
    const int lanes = own_row || own_key ? 1 : kWarp, keys = to.keys();
    const int addends = (own_row ? 1 : S.block_m) * (own_key ? 1 : S.block_n);
    for (int at = static_cast<int>(threadIdx.x) / lanes; at < to.rows() * keys; at += kThreads / lanes) {
      const int i = at / keys, j = at % keys;
      double total = 0.0;
      for (int x = static_cast<int>(threadIdx.x) % lanes; x < addends; x += lanes) {
        const int r = own_row ? i : own_key ? x : x / S.block_n, c = own_key ? j : x % S.block_n;
        total += static_cast<double>(__uint_as_float(load_shared(sums.at(r, c))));
      }
      for (int lane = 1; lane < lanes; lane *= 2) total += __shfl_xor_sync(kAllLanes, total, lane);
      if (p.bias_parts > 1) {
        p.bias_sums[i64{blockIdx.x} * to.entries() + i * to.pitch() + j] = static_cast<float>(total);
      } else {
        to.write_entry(i, j, total);
      }
    }
  }
};

/// Blocks: `BiasTile`.
template <BackwardSpec S>
__device__ void bias_gradient(const BackwardParams& p) {
  extern __shared__ __align__(128) char shared[];
  BiasGradient<S>{p, shared_address(shared)}.run();
}

/// After `bias_gradient` in parts.  Blocks: tiles of dbias × pieces of them; threads that share an entry add up parts.
template <BackwardSpec S>
__device__ void bias_sums(const BackwardParams& p) {
  await_kernel_ahead();
  __shared__ double shares[kSideThreads];
  const int pieces = bias_pieces(S, p.dbias.query != 0, p.dbias.key != 0), block = static_cast<int>(blockIdx.x);
  const int tiles = static_cast<int>(gridDim.x) / pieces;
  const BiasTile<S> to(p, block / pieces);
  const int width = math::smaller(math::larger(to.entries(), kBiasLanes), kSideThreads);
  const int thread = static_cast<int>(threadIdx.x), at = block % pieces * width + thread % width;
  const int i = at / to.pitch(), j = at % to.pitch();
  const bool real = i < to.rows() && j < to.keys();
  double sum = 0.0;
#pragma unroll 8
  for (int part = real ? thread / width : p.bias_parts; part < p.bias_parts; part += kSideThreads / width) {
    sum += static_cast<double>(p.bias_sums[(i64{part} * tiles + block / pieces) * to.entries() + at]);
  }
  shares[thread] = sum;
  __syncthreads();
  if (!real || thread >= width) return;
  for (int other = 1; other < kSideThreads / width; ++other) sum += shares[other * width + thread];
  to.write_entry(i, j, sum);
}

}  // namespace fovea::cuda
