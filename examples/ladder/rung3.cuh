// Rung 3, FlashAttention-2 (2307.08691), forward: queries are the outer loop, keys the inner one (algorithm 1).
//
// A block owns 128 queries, 32 of them each of its 4 warps, and walks the keys.  A warp sees whole rows, so maxima and
// sums stay within four lanes and nothing is exchanged ("split-Q").  O stays in registers from the first key to the
// last.  It is not divided by l until then; the scale is multiplied in with the exponent, which makes one multiply-add
// of scale, maximum and unit; sums of a row are put together once, at the end.  What is kept of a row is its
// log-sum-exp.

namespace fovea::ladder {

template <Spec S>
struct SplitForward {
  static constexpr int kThreads = kSplitThreads, kRows = kSplitRows, kKeys = split_keys(S.head_dim);
  static constexpr int kM = kRows / (kThreads / kWarp) / 16, kN = kKeys / 8, kD = S.head_dim / 8;
  using RowTile = Tile<S.type, kRows, S.head_dim>;
  using KeyTile = Tile<S.type, kKeys, S.head_dim>;
  using Scores = Accumulator[kM][kN];
  using Out = Accumulator[kM][kD];

  /// Of a thread's rows: the maximum so far, and this lane's part of the sum.
  struct Running {
    float maximum[kM][2], sum[kM][2];
  };

  const Params& p;
  Head head;
  u32 shared;
  int first;  // row

  FOVEA_DEVICE RowTile q_tile() const { return {shared}; }
  FOVEA_DEVICE KeyTile k_tile(int stage) const {
    return {shared + RowTile::kSize + static_cast<u32>(stage * 2 * KeyTile::kSize)};
  }
  FOVEA_DEVICE KeyTile v_tile(int stage) const { return {k_tile(stage).base + KeyTile::kSize}; }
  FOVEA_DEVICE static int warp_row() { return warp_id() * kM * 16; }
  FOVEA_DEVICE float unit() const { return p.scale * kLog2E; }

  FOVEA_DEVICE void load_keys(int key, int stage) const {
    load<S, kThreads>(k_tile(stage), head, p.k, key, p.seqlen_kv);
    load<S, kThreads>(v_tile(stage), head, p.v, key, p.seqlen_kv);
    close_copies<S.async_copy>();
  }

  FOVEA_DEVICE void run() const {
    Out o;
    clear(o);
    Running running;
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) running.maximum[x / 2][x % 2] = -infinity(), running.sum[x / 2][x % 2] = 0.0F;
    const int end = visible_keys(p, first + kRows);
    load<S, kThreads>(q_tile(), head, p.q, first, p.seqlen_q);
    if (end > 0) load_keys(0, 0);
    close_copies<S.async_copy>();
#pragma unroll 1
    for (int key = 0, stage = 0; key < end; key += kKeys, stage ^= 1) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // these keys are there for all, and all are done with those before
      if (key + kKeys < end) load_keys(key + kKeys, stage ^ 1);
      Scores s;
      multiply_by_rows<S>(s, q_tile(), warp_row(), k_tile(stage), 0);  // S = Q Kᵀ
      hide(s, key);
      update(s, o, running);                      // S becomes P; m, l and O move on
      add_product<S>(o, s, v_tile(stage), 0, 0);  // O += P V
    }
    await_copies<S.async_copy, 0>();
    finish(o, running);
  }

  FOVEA_DEVICE void hide(Scores& s, int key) const {
    if (sees_all(p, first + warp_row(), key + kKeys)) return;
    each_entry(s, [&](float& x, int r, int n) {
      if (!visible(p, first + warp_row() + r, key + n)) x = -infinity();
    });
  }

  /// The online softmax.
  FOVEA_DEVICE void update(Scores& s, Out& o, Running& running) const {
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) {
      const int i = x / 2, h = x % 2;
      float top = running.maximum[i][h];
#pragma unroll
      for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[i][j].x[2 * h], s[i][j].x[2 * h + 1]));
      top = quad_max(top);
      const float reference = top == -infinity() ? 0.0F : top * unit();  // of a row that has seen nothing
      const float factor = exp2(running.maximum[i][h] * unit() - reference);
      running.maximum[i][h] = top;
      float sum = running.sum[i][h] * factor;
#pragma unroll
      for (int y = 0; y < 2 * kN; ++y) {
        float& weight = s[i][y / 2].x[2 * h + y % 2];
        weight = exp2(weight * unit() - reference);
        sum += weight;
      }
      running.sum[i][h] = sum;
#pragma unroll
      for (int y = 0; y < 2 * kD; ++y) o[i][y / 2].x[2 * h + y % 2] *= factor;
    }
  }

  /// O is divided by l; out leaves by way of the place of Q, where each warp has its own rows.
  FOVEA_DEVICE void finish(Out& o, const Running& running) const {
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) {
      const int i = x / 2, h = x % 2, row = first + warp_row() + entry_row(i, 2 * h);
      const float sum = quad_sum(running.sum[i][h]), share = sum == 0.0F ? 0.0F : 1.0F / sum;
#pragma unroll
      for (int y = 0; y < 2 * kD; ++y) o[i][y / 2].x[2 * h + y % 2] *= share;
      if (lane_id() % 4 == 0 && row < p.seqlen_q)
        *head.statistic(p.lse, row) = kLn2 * (running.maximum[i][h] * unit() + log2(sum));
    }
    __syncthreads();  // Q has arrived, for all, even where no key was visible
    store_accumulators(corner_c<kD>(q_tile(), lane_id(), warp_row(), 0), o);
    __syncthreads();
    store<kThreads>(q_tile(), head, p.out, first, p.seqlen_q);
  }
};

/// Blocks: (batch, head) next to each other, their last queries, which see the most keys, first.
template <Spec S>
__device__ void split_forward(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  const int parts = blocks_of(p.seqlen_q, kSplitRows), heads = static_cast<int>(gridDim.x) / parts;
  const int block = static_cast<int>(blockIdx.x);
  SplitForward<S>{p, Head::of(p, block % heads), shared_address(memory), (parts - 1 - block / heads) * kSplitRows}
      .run();
}

}  // namespace fovea::ladder
