// Rung 0, the formula: S and P are matrices in memory, N × N for each head, and every step is a kernel of its own that
// reads what the one before has written.
//
//     S = Q Kᵀ · scale      P = softmax(S)      O = P V
//
// S is kept in fp32, P in the dtype of the inputs: 6 bytes an entry.  A mask is of no help: hidden entries are
// computed, and become 0 in P.

namespace fovea::ladder {

/// A matrix in memory: rows `stride` bytes apart, of which those before `rows` are there.
struct Matrix {
  char* data;
  i64 stride;
  int rows;
  bool aligned;
};

/// C of 64 × 64 = A B over `depth`, by 4 warps of 32 × 32.  kAColumns: A is given as its transpose; kBRows: so is B.
template <Spec S, bool kAColumns, bool kBRows>
struct TileProduct {
  using T = Tile<S.type, kProductTile, kProductTile>;
  static constexpr int kThreads = kFormulaThreads;
  using C = Accumulator[2][4];

  u32 shared;
  FOVEA_DEVICE T a_tile(int stage) const { return {shared + static_cast<u32>(stage * 2 * T::kSize)}; }
  FOVEA_DEVICE T b_tile(int stage) const { return {a_tile(stage).base + T::kSize}; }
  FOVEA_DEVICE static int warp_row() { return warp_id() / 2 * 32; }
  FOVEA_DEVICE static int warp_column() { return warp_id() % 2 * 32; }

  FOVEA_DEVICE static void load_tile(const T& tile, const Matrix& m, int row, int column) {
    load_rows<S.async_copy, kThreads>(tile, m.rows - row, T::kColumns * 2, m.aligned,
                                      m.data + row * m.stride + column * 2, m.stride);
  }
  FOVEA_DEVICE void load_both(const Matrix& a, const Matrix& b, int row, int column, int depth, int stage) const {
    load_tile(a_tile(stage), a, kAColumns ? depth : row, kAColumns ? row : depth);
    load_tile(b_tile(stage), b, kBRows ? column : depth, kBRows ? depth : column);
    close_copies<S.async_copy>();
  }

  FOVEA_DEVICE void run(C& c, const Matrix& a, const Matrix& b, int row, int column, int depth) const {
    clear(c);
    if (depth > 0) load_both(a, b, row, column, 0, 0);
#pragma unroll 1
    for (int at = 0, stage = 0; at < depth; at += kProductTile, stage ^= 1) {
      await_copies<S.async_copy, 0>();
      __syncthreads();  // this step's tiles are there for all, and all are done with those of the step before
      if (at + kProductTile < depth) load_both(a, b, row, column, at + kProductTile, stage ^ 1);
      add(c, a_tile(stage), b_tile(stage));
    }
  }

  FOVEA_DEVICE static void add(C& c, const T& a, const T& b) {
    if constexpr (kBRows) {
      const Corner<T> from_a = corner_a(a, fresh(lane_id()), warp_row(), 0);
      const Corner<T> from_b = corner_b_rows(b, fresh(lane_id()), warp_column(), 0);
      multiply_steps<S, kProductTile / 16>(
          c, [&](int i, int k) { return load_a(from_a, 16 * i, k); },
          [&](OperandB(&two)[2], int j, int k) { load_b_rows(two, from_b, 8 * j, k); }, OnTop{});
    } else if constexpr (kAColumns) {
      add_transposed_product<S, kProductTile>(c, a, 0, warp_row(), b, 0, warp_column());
    } else {
      add_product<S, kProductTile>(c, a, warp_row(), b, 0, warp_column());
    }
  }
};

/// The operands of each product, and where its result goes.
template <Spec S>
struct Formula {
  const Params& p;
  Head head;

  FOVEA_DEVICE Matrix rows_of(const RowView& view, int rows) const {
    return {head.row(view, 0), view.row, rows, view.aligned};
  }
  /// P, or dS; its columns go on with zeros to a whole number of tiles.
  FOVEA_DEVICE Matrix weights() const {
    return {p.weights + i64{head.index} * p.seqlen_q * p.pitch * 2, p.pitch * 2, p.seqlen_q, true};
  }
  FOVEA_DEVICE float* scores(int row) const { return p.scores + head.row_number(p, row) * p.pitch; }

  /// S, or dP: every entry, hidden or not, in fp32.
  FOVEA_DEVICE void store_scores(Accumulator (&c)[2][4], int row, int column) const {
    each_entry(c, [&](float x, int r, int n) {
      if (row + r < p.seqlen_q && column + n < p.seqlen_kv) scores(row + r)[column + n] = x;
    });
  }
  FOVEA_DEVICE void store_rows_of(Accumulator (&c)[2][4], const Matrix& to, int row, int column) const {
    each_entry(c, [&](float x, int r, int n) {
      if (row + r < to.rows) write<S.type>(to.data + (row + r) * to.stride + (column + n) * 2, x);
    });
  }
};

/// Blocks: (batch, head) × tiles of the result, those side by side next to each other.
template <Spec S, Product kProduct>
__device__ void product(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  using enum Product;
  constexpr bool kOfEntries = kProduct == kScores || kProduct == kWeightGradients;
  constexpr bool kOfKeys = kProduct == kDk || kProduct == kDv;
  constexpr bool kScaled = kProduct == kScores || kProduct == kDq || kProduct == kDk;
  const int rows = kOfKeys ? p.seqlen_kv : p.seqlen_q, columns = kOfEntries ? p.seqlen_kv : S.head_dim;
  const int across = blocks_of(columns, kProductTile), tiles = blocks_of(rows, kProductTile) * across;
  const int block = static_cast<int>(blockIdx.x), tile = block % tiles;
  const Formula<S> formula{p, Head::of(p, block / tiles)};
  const Matrix q = formula.rows_of(p.q, p.seqlen_q), k = formula.rows_of(p.k, p.seqlen_kv);
  const Matrix v = formula.rows_of(p.v, p.seqlen_kv), dout = formula.rows_of(p.dout, p.seqlen_q);
  const Matrix a = kProduct == kScores ? q : kProduct == kWeightGradients ? dout : formula.weights();
  const Matrix b = kProduct == kScores || kProduct == kDq             ? k
                   : kProduct == kWeightGradients || kProduct == kOut ? v
                   : kProduct == kDk                                  ? q
                                                                      : dout;
  const int depth = kOfEntries ? S.head_dim : kOfKeys ? p.seqlen_q : static_cast<int>(p.pitch);
  const TileProduct<S, kOfKeys, kOfEntries> product{shared_address(memory)};
  Accumulator c[2][4];
  product.run(c, a, b, tile / across * kProductTile, tile % across * kProductTile, depth);
  const int row = tile / across * kProductTile + product.warp_row();
  const int column = tile % across * kProductTile + product.warp_column();
  if constexpr (kScaled) scale_all(c, p.scale);
  if constexpr (kOfEntries) {
    formula.store_scores(c, row, column);
  } else {
    const RowView& to = kProduct == kOut ? p.out : kProduct == kDq ? p.dq : kProduct == kDk ? p.dk : p.dv;
    formula.store_rows_of(c, formula.rows_of(to, rows), row, column);
  }
}

/// f over the numbers of all threads of a block.
template <class F>
FOVEA_DEVICE float over_block(float x, const F& f) {
  extern __shared__ __align__(128) char memory[];
  auto* parts = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, lane));
  __syncthreads();
  if (lane_id() == 0) parts[warp_id()] = x;
  __syncthreads();
  x = parts[0];
#pragma unroll
  for (int w = 1; w < kFormulaThreads / kWarp; ++w) x = f(x, parts[w]);
  return x;
}
FOVEA_DEVICE float block_sum(float x) {
  return over_block(x, [](float a, float b) { return a + b; });
}

/// One row of S, P and dP.
template <Spec S>
struct FormulaRow {
  Formula<S> formula;
  int row;

  /// Blocks: (batch, head) × rows.
  FOVEA_DEVICE static FormulaRow of(const Params& p) {
    const int block = static_cast<int>(blockIdx.x);
    return {{p, Head::of(p, block / p.seqlen_q)}, block % p.seqlen_q};
  }
  FOVEA_DEVICE float4 four_scores(int j) const { return *reinterpret_cast<const float4*>(formula.scores(row) + j); }
  /// S at 4 keys, in units of log2; −∞ where hidden.
  FOVEA_DEVICE void load_scores(float (&s)[4], int j) const {
    const float4 four = four_scores(j);
    const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] = visible(formula.p, row, j + e) ? x[e] * kLog2E : -infinity();
  }
  FOVEA_DEVICE uint2& weights(int j) const {
    const Matrix all = formula.weights();
    return *reinterpret_cast<uint2*>(all.data + row * all.stride + j * 2);
  }
  FOVEA_DEVICE void store_weights(int j, const float (&w)[4]) const {
    weights(j) = {pack<S.type>(w[0], w[1]), pack<S.type>(w[2], w[3])};
  }
  /// Calls f(j) for the first of every 4 keys, up to a whole number of tiles.
  template <class F>
  FOVEA_DEVICE void each_four(const F& f) const {
    for (int j = static_cast<int>(threadIdx.x) * 4; j < formula.p.pitch; j += 4 * kFormulaThreads) f(j);
  }
};

/// P = softmax(S).
template <Spec S>
__device__ void softmax(const Params& p) {
  const FormulaRow<S> me = FormulaRow<S>::of(p);
  float s[4], top = -infinity(), sum = 0.0F;
  me.each_four([&](int j) {
    me.load_scores(s, j);
    top = fmaxf(top, fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])));
  });
  top = over_block(top, [](float a, float b) { return fmaxf(a, b); });
  const float reference = top == -infinity() ? 0.0F : top;  // of a row that sees nothing
  const auto exponentiate = [&](int j) {
    me.load_scores(s, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] = exp2(s[e] - reference);
  };
  me.each_four([&](int j) {
    exponentiate(j);
    sum += s[0] + s[1] + s[2] + s[3];
  });
  sum = block_sum(sum);
  const float share = sum == 0.0F ? 0.0F : 1.0F / sum;
  me.each_four([&](int j) {
    exponentiate(j);
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] *= share;
    me.store_weights(j, s);
  });
  if (threadIdx.x == 0) *me.formula.head.statistic(p.lse, me.row) = kLn2 * (top + log2(sum));
}

}  // namespace fovea::ladder
