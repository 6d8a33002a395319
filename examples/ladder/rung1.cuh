// Rung 1, FlashAttention as first published (2205.14135): nothing of size N × N in memory.
//
// Forward: one block a (batch, head).  Keys are the outer loop, queries the inner one (algorithm 1).  A block of 128
// keys is shared out to 4 warps; each keeps its slice of K and V in registers while 16 queries after 16 pass by.  All
// warps have the same queries, so every step ends in an exchange: maximum and sum of a row, and O = Σ P V over the
// slices, go through shared memory ("sliced-K").  O, m and l of a row lie in memory between blocks of keys, O always
// divided by l:
//
//     m' = max(m, m̃)      l' = l · e^(m − m') + l̃ · e^(m̃ − m')      O = (l · e^(m − m') · O + e^(m̃ − m') · Σ P V) / l'
//
// Backward (algorithm 4): P is computed again from S and lse.  A block of keys has its dK and dV in registers, a slice
// in each warp; dQ of 16 queries is summed over the slices through shared memory, then added to memory by atomics.

namespace fovea::ladder {

template <Spec S>
struct SlicedForward {
  static constexpr int kKeys = kSlicedKeys, kMine = kKeys / kSlicedWarps, kThreads = kSlicedThreads;
  static constexpr int kN = kMine / 8, kD = S.head_dim / 8;  // pieces of 8: of a warp's keys, of a row
  using KeyTile = Tile<S.type, kKeys, S.head_dim>;
  using QTile = Tile<S.type, kSlicedRows, S.head_dim>;
  using Sums = Exchange<S>;

  /// A warp's slice of K and V, as operands.
  struct Slice {
    OperandB keys[kD / 2][kN / 2][2], values[kN / 2][kD / 2][2];
  };

  const Params& p;
  Head head;
  char* shared;

  FOVEA_DEVICE KeyTile k_tile() const { return {shared_address(shared)}; }
  FOVEA_DEVICE KeyTile v_tile() const { return {k_tile().base + KeyTile::kSize}; }
  FOVEA_DEVICE QTile q_tile(int stage) const {
    return {v_tile().base + KeyTile::kSize + static_cast<u32>(stage * QTile::kSize)};
  }
  FOVEA_DEVICE Sums sums() const { return {reinterpret_cast<float*>(shared + 2 * KeyTile::kSize + 2 * QTile::kSize)}; }
  using PerWarp = float[kSlicedWarps][kSlicedRows];
  FOVEA_DEVICE PerWarp& maxima() const {
    return *reinterpret_cast<PerWarp*>(reinterpret_cast<char*>(sums().partials) + partial_bytes(S.head_dim));
  }
  FOVEA_DEVICE PerWarp& weight_sums() const { return *(&maxima() + 1); }
  FOVEA_DEVICE static int warp_key() { return warp_id() * kMine; }

  FOVEA_DEVICE void load_q(int row, int stage) const {
    load<S, kThreads>(q_tile(stage), head, p.q, row, p.seqlen_q);
    close_copies<S.async_copy>();
  }

  FOVEA_DEVICE void take_slice(Slice& slice) const {
    const Corner<KeyTile> k = corner_b_rows(k_tile(), lane_id(), warp_key(), 0);
    const Corner<KeyTile> v = corner_b_columns(v_tile(), lane_id(), warp_key(), 0);
#pragma unroll
    for (int c = 0; c < kD / 2; ++c) {
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) load_b_rows(slice.keys[c][j], k, 16 * j, 16 * c);
    }
#pragma unroll
    for (int j = 0; j < kN / 2; ++j) {
#pragma unroll
      for (int c = 0; c < kD / 2; ++c) load_b_columns(slice.values[j][c], v, 16 * j, 16 * c);
    }
  }

  /// All blocks of keys, and past each of them the rows that see it; rows.begin is a multiple of 16.
  FOVEA_DEVICE void run(const Interval& rows) const {
    const int blocks = math::larger(blocks_of(visible_keys(p, rows.end), kKeys), 1);
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int key = block * kKeys;
      // Rows that see nothing are written with the first block.
      const int first =
          block == 0 ? rows.begin : math::larger(rows.begin, first_row(p, key) / kSlicedRows * kSlicedRows);
      __syncthreads();  // all are done with the block before
      load<S, kThreads>(k_tile(), head, p.k, key, p.seqlen_kv);
      load<S, kThreads>(v_tile(), head, p.v, key, p.seqlen_kv);
      load_q(first, 0);
      await_copies<S.async_copy, 0>();
      __syncthreads();
      Slice slice;
      take_slice(slice);
#pragma unroll 1
      for (int row = first, stage = 0; row < rows.end; row += kSlicedRows, stage ^= 1) {
        await_copies<S.async_copy, 0>();
        __syncthreads();  // these queries are there for all, and all are done with those before
        if (row + kSlicedRows < rows.end) load_q(row + kSlicedRows, stage ^ 1);
        step(slice, row, key, stage);
      }
    }
  }

  /// 16 queries against the block of keys.
  FOVEA_DEVICE void step(const Slice& slice, int row, int key, int stage) const {
    Accumulator s[1][kN];
    score(s, slice, row, key, stage);
    give_maxima(s);
    __syncthreads();
    exponentiate(s);
    Accumulator o[1][kD];
    clear(o);
#pragma unroll
    for (int j = 0; j < kN / 2; ++j) {
      const OperandA weights = operand_a<S.type>(s[0], j);
#pragma unroll
      for (int c = 0; c < kD; ++c)
        multiply_add<S.type, S.mma>(o[0][c], o[0][c], weights, slice.values[j][c / 2][c % 2]);
    }
    sums().give(o);
    __syncthreads();
    const int last = math::larger(visible_keys(p, math::smaller(row + kSlicedRows, p.seqlen_q)) - 1, 0) / kKeys;
    update_rows(row, key == 0, key / kKeys == last);
  }

  /// S = Q Kᵀ of a warp's keys, in units of log2.
  FOVEA_DEVICE void score(Accumulator (&s)[1][kN], const Slice& slice, int row, int key, int stage) const {
    const Corner<QTile> q = corner_a(q_tile(stage), lane_id(), 0, 0);
    clear(s);
#pragma unroll
    for (int c = 0; c < kD / 2; ++c) {
      const OperandA queries = load_a(q, 0, 16 * c);
#pragma unroll
      for (int j = 0; j < kN; ++j) multiply_add<S.type, S.mma>(s[0][j], s[0][j], queries, slice.keys[c][j / 2][j % 2]);
    }
    scale_all(s, p.scale * kLog2E);
    if (!sees_all(p, row, key + kKeys)) {
      each_entry(s, [&](float& x, int r, int n) {
        if (!visible(p, row + r, key + warp_key() + n)) x = -infinity();
      });
    }
  }

  FOVEA_DEVICE void give_maxima(const Accumulator (&s)[1][kN]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -infinity();
#pragma unroll
      for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[0][j].x[2 * h], s[0][j].x[2 * h + 1]));
      top = quad_max(top);
      if (lane_id() % 4 == 0) maxima()[warp_id()][entry_row(0, 2 * h)] = top;
    }
  }
  /// m̃: over all slices.
  FOVEA_DEVICE float block_maximum(int r) const {
    float top = maxima()[0][r];
#pragma unroll
    for (int w = 1; w < kSlicedWarps; ++w) top = fmaxf(top, maxima()[w][r]);
    return top;
  }

  /// S becomes P = 2^(S − m̃), and its sum is left for all.
  FOVEA_DEVICE void exponentiate(Accumulator (&s)[1][kN]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = block_maximum(entry_row(0, 2 * h)), reference = top == -infinity() ? 0.0F : top;
      float sum = 0.0F;
#pragma unroll
      for (int x = 0; x < 2 * kN; ++x) {
        float& weight = s[0][x / 2].x[2 * h + x % 2];
        weight = exp2(weight - reference);
        sum += weight;
      }
      sum = quad_sum(sum);
      if (lane_id() % 4 == 0) weight_sums()[warp_id()][entry_row(0, 2 * h)] = sum;
    }
  }

  /// O, m and l of the rows, from memory and back; after the last block of keys that a row sees, out and lse.
  FOVEA_DEVICE void update_rows(int row, bool first, bool last) const {
    const int r = Sums::row(), i = row + r;
    const i64 number = head.row_number(p, i);
    const bool real = i < p.seqlen_q, tells = real && threadIdx.x % 8 == 0;  // 8 threads have a row
    const bool old = real && !first;
    const float before = Sums::of_row(old && tells ? p.maxima[number] : -infinity());
    const float before_sum = Sums::of_row(old && tells ? p.sums[number] : 0.0F);
    const float top = block_maximum(r), maximum = fmaxf(before, top);
    const float reference = maximum == -infinity() ? 0.0F : maximum;  // of a row that has seen nothing
    float added = 0.0F;
#pragma unroll
    for (int w = 0; w < kSlicedWarps; ++w) added += weight_sums()[w][r];
    const float old_share = before_sum * exp2(before - reference), new_share = exp2(top - reference);
    const float sum = old_share + new_share * added;
#pragma unroll
    for (int x = 0; x < S.head_dim / 8; ++x) {
      const int column = Sums::first_column() + 8 * x;
      float& memory = p.o[number * S.head_dim + column];
      const float before_o = old ? memory : 0.0F, added_o = sums().take(column);
      const float mean = sum == 0.0F ? 0.0F : (old_share * before_o + new_share * added_o) / sum;
      if (real && last) write<S.type>(head.row(p.out, i) + column * 2, mean);
      if (real && !last) memory = mean;
    }
    if (tells && last) *head.statistic(p.lse, i) = kLn2 * (maximum + log2(sum));
    if (tells && !last) p.maxima[number] = maximum, p.sums[number] = sum;
  }
};

/// Blocks: (batch, head).
template <Spec S>
__device__ void sliced_forward(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  SlicedForward<S>{p, Head::of(p, static_cast<int>(blockIdx.x)), memory}.run({0, p.seqlen_q});
}

}  // namespace fovea::ladder
