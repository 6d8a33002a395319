// Rung 3's backward (algorithm 2 of 2307.08691): a block owns 128 keys with their dK and dV and walks the queries, 64
// at a time.  Of the statistics only lse is read.  P and dS of a tile go through shared memory once, in the dtype of
// the inputs; after that every product is shared out by its results, so that no sum is left to be made between warps:
//
//     S = Q Kᵀ,  dP = dO Vᵀ      64 × 128: 4 × 2 warps, 16 × 64 each
//     dV += Pᵀ dO,  dK += dSᵀ Q  128 × d: 8 warps, 16 rows each
//     dQ = dS K                  64 × d: 4 × 2 warps, added to memory by atomics

namespace fovea::ladder {

template <Spec S>
struct SplitBackward {
  static constexpr int kThreads = kSplitThreadsBackward, kRows = kSplitRowsBackward, kKeys = kSplitKeysBackward;
  static constexpr int kN = kKeys / 2 / 8, kD = S.head_dim / 8;
  using KeyTile = Tile<S.type, kKeys, S.head_dim>;
  using RowTile = Tile<S.type, kRows, S.head_dim>;
  using EntryTile = Tile<S.type, kRows, kKeys>;
  using Gradients = Accumulator[1][kD];

  const Params& p;
  Head head;
  char* shared;
  int key;  // the block's first

  FOVEA_DEVICE KeyTile k_tile() const { return {shared_address(shared)}; }
  FOVEA_DEVICE KeyTile v_tile() const { return {k_tile().base + KeyTile::kSize}; }
  FOVEA_DEVICE RowTile q_tile(int stage) const {
    return {v_tile().base + KeyTile::kSize + static_cast<u32>(stage * 2 * RowTile::kSize)};
  }
  FOVEA_DEVICE RowTile dout_tile(int stage) const { return {q_tile(stage).base + RowTile::kSize}; }
  static constexpr int kEntriesAt = 2 * KeyTile::kSize + 4 * RowTile::kSize;
  FOVEA_DEVICE EntryTile p_tile() const { return {shared_address(shared) + kEntriesAt}; }
  FOVEA_DEVICE EntryTile ds_tile() const { return {p_tile().base + EntryTile::kSize}; }
  /// Of the queries: lse in units of log2, then delta.
  FOVEA_DEVICE float* statistics(int stage) const {
    return reinterpret_cast<float*>(shared + kEntriesAt + 2 * EntryTile::kSize) + stage * 2 * kRows;
  }
  /// Of 4 × 2 warps, and of 8.
  FOVEA_DEVICE static int warp_row() { return warp_id() / 2 * 16; }
  FOVEA_DEVICE static int warp_half() { return warp_id() % 2; }
  FOVEA_DEVICE static int warp_key() { return warp_id() * 16; }

  FOVEA_DEVICE void load_queries(int row, int stage) const {
    load<S, kThreads>(q_tile(stage), head, p.q, row, p.seqlen_q);
    load<S, kThreads>(dout_tile(stage), head, p.dout, row, p.seqlen_q);
    close_copies<S.async_copy>();
    const int thread = static_cast<int>(threadIdx.x), i = row + thread;
    if (thread >= kRows) return;
    statistics(stage)[thread] = log2_lse(p, head, i);
    statistics(stage)[kRows + thread] = i < p.seqlen_q ? p.delta[head.row_number(p, i)] : 0.0F;
  }

  FOVEA_DEVICE void run() const {
    load<S, kThreads>(k_tile(), head, p.k, key, p.seqlen_kv);
    load<S, kThreads>(v_tile(), head, p.v, key, p.seqlen_kv);
    const int first = first_row(p, key) / kRows * kRows;
    if (first < p.seqlen_q) load_queries(first, 0);
    close_copies<S.async_copy>();
    Gradients dk, dv;
    clear(dk);
    clear(dv);
#pragma unroll 1
    for (int row = first, stage = 0; row < p.seqlen_q; row += kRows, stage ^= 1) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // these queries are there for all, and all are done with those before
      if (row + kRows < p.seqlen_q) load_queries(row + kRows, stage ^ 1);
      differentiate(row, stage);
      __syncthreads();  // P and dS are there for all
      add_transposed_product<S, kRows>(dv, p_tile(), 0, warp_key(), dout_tile(stage), 0, 0);  // dV += Pᵀ dO
      add_transposed_product<S, kRows>(dk, ds_tile(), 0, warp_key(), q_tile(stage), 0, 0);    // dK += dSᵀ Q
      add_dq(row);
    }
    await_copies<S.async_copy, 0>();
    __syncthreads();
    store_gradients(dk, dv);
  }

  /// P = exp(S − lse) and dS = P ∘ (dP − delta) of a tile, into shared memory.
  FOVEA_DEVICE void differentiate(int row, int stage) const {
    const float *lse = statistics(stage) + warp_row(), *delta = lse + kRows;
    const float unit = p.scale * kLog2E;
    const int mine = warp_half() * (kKeys / 2);
    Accumulator weights[1][kN], ds[1][kN];
    multiply_by_rows<S>(weights, q_tile(stage), warp_row(), k_tile(), mine);
    each_entry(weights, [&](float& x, int r, int) { x = exp2(x * unit - lse[r]); });
    const int first = row + warp_row();
    if (!sees_all(p, first, key + mine + kKeys / 2)) {
      each_entry(weights, [&](float& x, int r, int n) { x = visible(p, first + r, key + mine + n) ? x : 0.0F; });
    }
    store_accumulators(corner_c<kN>(p_tile(), lane_id(), warp_row(), mine), weights);
    multiply_by_rows<S>(ds, dout_tile(stage), warp_row(), v_tile(), mine);
#pragma unroll
    for (int x = 0; x < 4 * kN; ++x)
      ds[0][x / 4].x[x % 4] = weights[0][x / 4].x[x % 4] * (ds[0][x / 4].x[x % 4] - delta[entry_row(0, x % 4)]);
    store_accumulators(corner_c<kN>(ds_tile(), lane_id(), warp_row(), mine), ds);
  }

  FOVEA_DEVICE void add_dq(int row) const {
    Accumulator dq[1][kD / 2];
    clear(dq);
    const int column = warp_half() * (S.head_dim / 2);
    add_product<S, kKeys>(dq, ds_tile(), warp_row(), k_tile(), 0, column);
    each_entry(dq, [&](float x, int r, int c) {
      const int i = row + warp_row() + r;
      if (i < p.seqlen_q) atomicAdd(p.dq_sum + head.row_number(p, i) * S.head_dim + column + c, x);
    });
  }

  /// Through the places of K and V, so that rows leave in whole pieces.
  FOVEA_DEVICE void store_gradients(Gradients& dk, const Gradients& dv) const {
    scale_all(dk, p.scale);
    store_accumulators(corner_c<kD>(k_tile(), lane_id(), warp_key(), 0), dk);
    store_accumulators(corner_c<kD>(v_tile(), lane_id(), warp_key(), 0), dv);
    __syncthreads();
    store<kThreads>(k_tile(), head, p.dk, key, p.seqlen_kv);
    store<kThreads>(v_tile(), head, p.dv, key, p.seqlen_kv);
  }
};

/// Blocks: (batch, head) next to each other, their first keys, which most queries see, first.
template <Spec S>
__device__ void split_backward(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  const int parts = blocks_of(p.seqlen_kv, kSplitKeysBackward), heads = static_cast<int>(gridDim.x) / parts;
  const int block = static_cast<int>(blockIdx.x);
  SplitBackward<S>{p, Head::of(p, block % heads), memory, block / heads * kSplitKeysBackward}.run();
}

}  // namespace fovea::ladder
