// Rung 1's backward (algorithm 4): one block a (batch, head), a block of keys after the other, past each the queries in
// steps of 16.  Keys are shared out to 4 warps; each has dK and dV of its slice in registers, and computes Sᵀ, so that
// Pᵀ and dSᵀ come out of one product as the next one takes them:
//
//     Sᵀ = K Qᵀ      Pᵀ = exp(Sᵀ − lse)      dV += Pᵀ dO      dPᵀ = V dOᵀ      dSᵀ = Pᵀ ∘ (dPᵀ − delta)      dK += dSᵀ
//     Q
//
// dQ of the 16 queries is a sum over all slices: through shared memory, then by atomics into memory.

namespace fovea::ladder {

template <Spec S>
struct SlicedBackward {
  static constexpr int kThreads = kSlicedThreads, kKeys = sliced_keys_backward(S.head_dim),
                       kMine = kKeys / kSlicedWarps;
  static constexpr int kM = kMine / 16, kD = S.head_dim / 8;
  using KeyTile = Tile<S.type, kKeys, S.head_dim>;
  using RowTile = Tile<S.type, kSlicedRows, S.head_dim>;
  using DsTile = SharedTile<S.type, kMine, kSlicedRows>;  // of one warp: its keys by the 16 queries
  static_assert(DsTile::kPitch == kTransposedPitch);
  using Sums = Exchange<S>;

  const Params& p;
  Head head;
  char* shared;

  FOVEA_DEVICE KeyTile k_tile() const { return {shared_address(shared)}; }
  FOVEA_DEVICE KeyTile v_tile() const { return {k_tile().base + KeyTile::kSize}; }
  FOVEA_DEVICE RowTile q_tile(int stage) const {
    return {v_tile().base + KeyTile::kSize + static_cast<u32>(stage * 2 * RowTile::kSize)};
  }
  FOVEA_DEVICE RowTile dout_tile(int stage) const { return {q_tile(stage).base + RowTile::kSize}; }
  static constexpr int kPartialsAt = 2 * KeyTile::kSize + 4 * RowTile::kSize;
  static constexpr int kDsAt = kPartialsAt + partial_bytes(S.head_dim);
  FOVEA_DEVICE Sums sums() const { return {reinterpret_cast<float*>(shared + kPartialsAt)}; }
  FOVEA_DEVICE DsTile ds_tile() const {
    return {shared_address(shared) + static_cast<u32>(kDsAt + warp_id() * DsTile::kSize)};
  }
  /// Of the 16 queries: lse in units of log2, then delta.
  FOVEA_DEVICE float* statistics(int stage) const {
    return reinterpret_cast<float*>(shared + kDsAt + kSlicedWarps * DsTile::kSize) + stage * 2 * kSlicedRows;
  }
  FOVEA_DEVICE static int warp_key() { return warp_id() * kMine; }

  FOVEA_DEVICE void load_queries(int row, int stage) const {
    load<S, kThreads>(q_tile(stage), head, p.q, row, p.seqlen_q);
    load<S, kThreads>(dout_tile(stage), head, p.dout, row, p.seqlen_q);
    close_copies<S.async_copy>();
    const int thread = static_cast<int>(threadIdx.x), i = row + thread;
    if (thread >= kSlicedRows) return;
    statistics(stage)[thread] = log2_lse(p, head, i);
    statistics(stage)[kSlicedRows + thread] = i < p.seqlen_q ? p.delta[head.row_number(p, i)] : 0.0F;
  }

  /// dK and dV of the keys from `key` on, dQ's share of them.
  FOVEA_DEVICE void run(int key) const {
    __syncthreads();  // all are done with the block before
    load<S, kThreads>(k_tile(), head, p.k, key, p.seqlen_kv);
    load<S, kThreads>(v_tile(), head, p.v, key, p.seqlen_kv);
    const int first = first_row(p, key) / kSlicedRows * kSlicedRows;
    if (first < p.seqlen_q) load_queries(first, 0);
    close_copies<S.async_copy>();
    Accumulator dk[kM][kD], dv[kM][kD];
    clear(dk);
    clear(dv);
#pragma unroll 1
    for (int row = first, stage = 0; row < p.seqlen_q; row += kSlicedRows, stage ^= 1) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // these queries are there for all, and all are done with those before
      if (row + kSlicedRows < p.seqlen_q) load_queries(row + kSlicedRows, stage ^ 1);
      step(dk, dv, row, key, stage);
    }
    await_copies<S.async_copy, 0>();
    __syncthreads();
    store_gradients(dk, dv, key);
  }

  /// 16 queries against the block of keys.
  FOVEA_DEVICE void step(Accumulator (&dk)[kM][kD], Accumulator (&dv)[kM][kD], int row, int key, int stage) const {
    const float* statistic = statistics(stage);
    Accumulator weights[kM][2], ds[kM][2];  // transposed: keys by queries
    multiply_by_rows<S>(weights, k_tile(), warp_key(), q_tile(stage), 0);
    const float unit = p.scale * kLog2E;
    each_entry(weights, [&](float& x, int, int r) { x = exp2(x * unit - statistic[r]); });
    const int first = key + warp_key();
    if (!sees_all(p, row, first + kMine)) {
      each_entry(weights, [&](float& x, int n, int r) { x = visible(p, row + r, first + n) ? x : 0.0F; });
    }
    add_product<S>(dv, weights, dout_tile(stage), 0, 0);
    multiply_by_rows<S>(ds, v_tile(), warp_key(), dout_tile(stage), 0);
#pragma unroll
    for (int x = 0; x < kM * 8; ++x) {
      const float delta = statistic[kSlicedRows + entry_column(x / 4 % 2, x % 4)];
      float& d = ds[x / 8][x / 4 % 2].x[x % 4];
      d = weights[x / 8][x / 4 % 2].x[x % 4] * (d - delta);
    }
    add_product<S>(dk, ds, q_tile(stage), 0, 0);

    __syncwarp();  // all lanes have read what the step before has left there
    store_accumulators(corner_c<2>(ds_tile(), lane_id(), 0, 0), ds);
    __syncwarp();
    Accumulator dq[1][kD];
    clear(dq);
    add_transposed_product<S, kMine>(dq, ds_tile(), 0, 0, k_tile(), warp_key(), 0);
    sums().give(dq);
    __syncthreads();
    add_dq(row);
  }

  FOVEA_DEVICE void add_dq(int row) const {
    const int i = row + Sums::row();
    if (i >= p.seqlen_q) return;
    float* to = p.dq_sum + head.row_number(p, i) * S.head_dim + Sums::first_column();
#pragma unroll
    for (int x = 0; x < S.head_dim; x += 8) atomicAdd(to + x, sums().take(Sums::first_column() + x));
  }

  /// Through the places of K and V, so that rows leave in whole pieces.
  FOVEA_DEVICE void store_gradients(Accumulator (&dk)[kM][kD], const Accumulator (&dv)[kM][kD], int key) const {
    scale_all(dk, p.scale);
    store_accumulators(corner_c<kD>(k_tile(), lane_id(), warp_key(), 0), dk);
    store_accumulators(corner_c<kD>(v_tile(), lane_id(), warp_key(), 0), dv);
    __syncthreads();
    store<kThreads>(k_tile(), head, p.dk, key, p.seqlen_kv);
    store<kThreads>(v_tile(), head, p.dv, key, p.seqlen_kv);
  }
};

/// Blocks: (batch, head).
template <Spec S>
__device__ void sliced_backward(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  const SlicedBackward<S> backward{p, Head::of(p, static_cast<int>(blockIdx.x)), memory};
#pragma unroll 1
  for (int key = 0; key < p.seqlen_kv; key += backward.kKeys) backward.run(key);
}

}  // namespace fovea::ladder
