#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// dbias: a block owns one tile of it (a broadcast dimension is one entry long), walks all rows, keys, heads and
// sequences that flow into it, recomputes their dS and adds them up: entry (i, j) of each at (i mod block_m, j mod
// block_n).
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

  template <int kRows, int kDim>
  FOVEA_DEVICE Tile<S.type, kRows, kDim> tile_at(int offset) const {
    return {fresh(shared) + offset};
  }

  /// Adds dS of one tile of rows and one of keys.
  FOVEA_DEVICE void add(Scores& tile, float (&sum)[Scores::kM][Scores::kN][4], const Sequence& sequence, int head,
                        int row_tile, int key_tile) const {
    const int row = row_tile * S.block_m, key = key_tile * S.block_n, kv_head = head / (p.group);
    const Interval own{row, row + S.block_m};
    Sight sight{sequence.band.tile(own, {key, key + S.block_n})};
    if constexpr (S.mask) sight.mask = mask_tile<S.block_n>(p, sequence, {head, head + 1}, own, key);
    if (sight.hidden()) return;
    const int rows = sequence.band.seqlen_q - row, keys = sequence.band.seqlen_kv - key;
    const auto q = tile_at<S.block_m, S.head_dim>(kShared.ring);
    const auto dout = tile_at<S.block_m, S.head_dim_v>(kShared.ring + kShared.dout);
    const auto k = tile_at<S.block_n, S.head_dim>(kShared.k);
    const auto v = tile_at<S.block_n, S.head_dim_v>(kShared.v);
    const u32 statistics = fresh(shared) + kShared.ring + kShared.statistics;
    constexpr int kSize = kBytes<S.type>;
    __syncthreads();
    load_rows<S.async_copy, kThreads>(q, rows, p.head_dim * kSize, p.q.aligned, sequence.q_row(p.q, row, head),
                                      p.q.row);
    load_rows<S.async_copy, kThreads>(dout, rows, p.head_dim_v * kSize, p.dout.aligned,
                                      sequence.q_row(p.dout, row, head), p.dout.row);
    load_rows<S.async_copy, kThreads, Order>(k, keys, p.head_dim * kSize, p.k.aligned,
                                             sequence.kv_row(p.k, key, kv_head), p.k.row);
    load_rows<S.async_copy, kThreads, Order>(v, keys, p.head_dim_v * kSize, p.v.aligned,
                                             sequence.kv_row(p.v, key, kv_head), p.v.row);
    const i64 slot = RowSlots(p, sequence, S.block_m).at(head, row_tile) * S.block_m;
    if (const int x = static_cast<int>(threadIdx.x); x < S.block_m / 2) {  // log2_lse, then delta
      const float* from = (x < S.block_m / 4 ? p.log2_lse : p.delta) + slot + x % (S.block_m / 4) * 4;
      copy_or_clear<S.async_copy>(statistics + x * 16, reinterpret_cast<const char*>(from), true);
    }
    close_copies<S.async_copy>();
    await_copies<S.async_copy, 0>();
    __syncthreads();
    if (!tile.works()) return;
    const RowMap<false> map{row, sequence.q_rows, head, 1};
    const Rules rules{p, sequence, map};
    const math::DropoutStream stream = S.dropout ? uniform(rules.stream(head)) : math::DropoutStream{};
    tile.template compute<true>(q, k, dout, v, statistics, rules, key, sight, stream);
    tile.each([&](int i, int j, int e) { sum[i][j][e] += tile.ds[i][j].x[e]; });
  }

  /// Tile (row_tile, key_tile) of dbias's batch and head; numbers of broadcast dimensions are 0.
  FOVEA_DEVICE void run(int batch, int head, int row_tile, int key_tile) const {
    const bool own_row = p.dbias.query != 0, own_key = p.dbias.key != 0;
    Scores tile;
    float sum[Scores::kM][Scores::kN][4] = {};
    const auto range = [](bool own, int at, int count) { return Interval{own ? at : 0, own ? at + 1 : count}; };
    const Interval batches = range(p.dbias.batch != 0, batch, p.batch),
                   heads = range(p.dbias.head != 0, head, p.q_heads);
#pragma unroll 1
    for (int b = batches.begin; b < batches.end; ++b) {
      const Sequence sequence = Sequence::of(p, b);
      const int row_tiles = (sequence.q_rows + S.block_m - 1) / S.block_m;
      const Interval rows = range(own_row, row_tile, row_tiles);
#pragma unroll 1
      for (int h = heads.begin; h < heads.end; ++h) {
#pragma unroll 1
        for (int r = rows.begin; r < rows.end && r < row_tiles; ++r) {
          const Interval seen = sequence.band.keys_of_rows({r * S.block_m, (r + 1) * S.block_m});
          if (seen.empty()) continue;
          const int first = own_key ? key_tile : seen.begin / S.block_n;
          const int end = own_key ? key_tile + 1 : (seen.end - 1) / S.block_n + 1;
#pragma unroll 1
          for (int k = first; k < end; ++k) add(tile, sum, sequence, h, r, k);
        }
      }
    }
    store(sum, batch, head, row_tile, key_tile, own_row, own_key);
  }

  /// Through shared memory, where broadcast rows and keys are summed.
  FOVEA_DEVICE void store(const float (&sum)[Scores::kM][Scores::kN][4], int batch, int head, int row_tile,
                          int key_tile, bool own_row, bool own_key) const {
    const SumTile sums{shared};
    __syncthreads();
    if (Scores::works()) {
      Scores::each([&](int i, int j, int e) {
        const int r = Scores::row() + Rules::row_of(i, e), c = Scores::column() + Rules::key_of(j, e);
        store_shared(sums.at(r, c), __float_as_uint(sum[i][j][e]));
      });
    }
    __syncthreads();
    const int rows = own_row ? math::smaller(S.block_m, p.seqlen_q - row_tile * S.block_m) : 1;
    const int keys = own_key ? math::smaller(S.block_n, p.seqlen_kv - key_tile * S.block_n) : 1;
    for (int at = static_cast<int>(threadIdx.x); at < rows * keys; at += kThreads) {
      const int i = at / keys, j = at % keys;
      double total = 0.0;
      for (int r = own_row ? i : 0; r < (own_row ? i + 1 : S.block_m); ++r) {
        for (int c = own_key ? j : 0; c < (own_key ? j + 1 : S.block_n); ++c) {
          total += static_cast<double>(__uint_as_float(load_shared(sums.at(r, c))));
        }
      }
      char* to = p.dbias.data + batch * p.dbias.batch + head * p.dbias.head +
                 (i64{row_tile} * S.block_m + i) * p.dbias.query + (i64{key_tile} * S.block_n + j) * p.dbias.key;
      write<S.bias_type>(to, static_cast<float>(total));
    }
  }
};

/// Blocks: key tiles × row tiles × heads × batch, of dbias: 1 where it is broadcast.
template <BackwardSpec S>
__device__ void bias_gradient(const BackwardParams& p) {
  extern __shared__ __align__(128) char shared[];
  int block = static_cast<int>(blockIdx.x);
  const auto take = [&block](i64 stride, int count) {
    if (stride == 0) return 0;
    const int part = block % count;
    block /= count;
    return part;
  };
  const int key_tile = take(p.dbias.key, p.key_blocks), row_tile = take(p.dbias.query, p.row_blocks);
  const int head = take(p.dbias.head, p.q_heads), batch = take(p.dbias.batch, p.batch);
  BiasGradient<S>{p, shared_address(shared)}.run(batch, head, row_tile, key_tile);
}

}  // namespace fovea::cuda
