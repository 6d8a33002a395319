// What the rungs' kernels have in common, in the words of the library's own (src/cuda/kernels): where the rows of a
// head lie, who sees whom, and products of tiles.
#include "cuda/kernels/copies.cuh"

namespace fovea::ladder {

using namespace cuda;  // NOLINT(google-build-using-namespace): this text is compiled alone

/// One (batch, head) of a call.
struct Head {
  int index, batch, head;

  FOVEA_DEVICE static Head of(const Params& p, int index) { return {index, index / p.heads, index % p.heads}; }
  FOVEA_DEVICE char* row(const RowView& view, int i) const {
    return view.data + batch * view.batch + head * view.head + i64{i} * view.row;
  }
  FOVEA_DEVICE float* statistic(const StatView& view, int i) const {
    return view.data + batch * view.batch + head * view.head + i64{i} * view.row;
  }
  /// Of what the workspace holds of every row, the number of row i.
  FOVEA_DEVICE i64 row_number(const Params& p, int i) const { return i64{index} * p.seqlen_q + i; }
};

FOVEA_DEVICE bool visible(const Params& p, int row, int key) { return key <= row + p.diagonal && key < p.seqlen_kv; }
/// Whether a row, and so all after it, see every key before `end`.
FOVEA_DEVICE bool sees_all(const Params& p, int row, int end) {
  return end <= math::smaller(row + p.diagonal + 1, p.seqlen_kv);
}
/// Keys that some of the rows before `end` see.
FOVEA_DEVICE int visible_keys(const Params& p, int end) {
  return math::smaller(math::larger(math::smaller(end, p.seqlen_q) + p.diagonal, 0), p.seqlen_kv);
}
/// The first row that sees a key.
FOVEA_DEVICE int first_row(const Params& p, int key) { return math::larger(key - p.diagonal, 0); }

FOVEA_DEVICE int blocks_of(int size, int block) { return (size + block - 1) / block; }

/// The lse of a row as exponents take it, in units of log2; a row that sees nothing has weights 2^−∞ = 0.
FOVEA_DEVICE float log2_lse(const Params& p, const Head& head, int i) {
  const float lse = i < p.seqlen_q ? *head.statistic(p.lse, i) : -infinity();
  return lse == -infinity() ? infinity() : lse * kLog2E;
}

/// Rows [first, end) of a tensor into a tile, and zeros behind them.
template <Spec S, int kThreads, class T>
FOVEA_DEVICE void load(const T& tile, const Head& head, const RowView& view, int first, int end) {
  load_rows<S.async_copy, kThreads>(tile, end - first, T::kColumns * 2, view.aligned, head.row(view, first), view.row);
}
template <int kThreads, class T>
FOVEA_DEVICE void store(const T& tile, const Head& head, const RowView& view, int first, int end) {
  store_rows<kThreads>(tile, end - first, T::kColumns * 2, view.aligned, head.row(view, first), view.row);
}

struct Zero {
  FOVEA_DEVICE Accumulator operator()(int) const { return {}; }
};

/// C = A Bᵀ: the rows of A from `row` on, those of B from `column` on.
template <Spec S, class A, class B, int kM, int kN>
FOVEA_DEVICE void multiply_by_rows(Accumulator (&c)[kM][kN], const A& a, int row, const B& b, int column) {
  const Corner<A> from_a = corner_a(a, fresh(lane_id()), row, 0);
  const Corner<B> from_b = corner_b_rows(b, fresh(lane_id()), column, 0);
  multiply_steps<S, A::kColumns / 16>(
      c, [&](int i, int k) { return load_a(from_a, 16 * i, k); },
      [&](OperandB(&two)[2], int j, int k) { load_b_rows(two, from_b, 8 * j, k); }, Zero{});
}

/// C += A B with A in accumulators; B begins at a row and a column of its tile.
template <Spec S, class B, int kM, int kK, int kN>
FOVEA_DEVICE void add_product(Accumulator (&c)[kM][kN], const Accumulator (&a)[kM][kK], const B& b, int row,
                              int column) {
  const Corner<B> from_b = corner_b_columns(b, fresh(lane_id()), row, column);
  multiply_steps<S, kK / 2, true>(
      c, [&](int i, int k) { return operand_a<S.type>(a[i], k / 16); },
      [&](OperandB(&two)[2], int j, int k) { load_b_columns(two, from_b, k, 8 * j); }, OnTop{});
}

/// C += A B over kDepth, with A in a tile, its rows from `row` on.
template <Spec S, int kDepth, class A, class B, int kM, int kN>
FOVEA_DEVICE void add_product(Accumulator (&c)[kM][kN], const A& a, int row, const B& b, int b_row, int column) {
  const Corner<A> from_a = corner_a(a, fresh(lane_id()), row, 0);
  const Corner<B> from_b = corner_b_columns(b, fresh(lane_id()), b_row, column);
  multiply_steps<S, kDepth / 16>(
      c, [&](int i, int k) { return load_a(from_a, 16 * i, k); },
      [&](OperandB(&two)[2], int j, int k) { load_b_columns(two, from_b, k, 8 * j); }, OnTop{});
}

/// C += Aᵀ B over kDepth: the columns of A from `row` on.
template <Spec S, int kDepth, class A, class B, int kM, int kN>
FOVEA_DEVICE void add_transposed_product(Accumulator (&c)[kM][kN], const A& a, int a_row, int row, const B& b,
                                         int b_row, int column) {
  const Corner<A> from_a = corner_a_columns(a, fresh(lane_id()), a_row, row);
  const Corner<B> from_b = corner_b_columns(b, fresh(lane_id()), b_row, column);
  multiply_steps<S, kDepth / 16>(
      c, [&](int i, int k) { return load_a_columns(from_a, 16 * i, k); },
      [&](OperandB(&two)[2], int j, int k) { load_b_columns(two, from_b, k, 8 * j); }, OnTop{});
}

template <int kM, int kN>
FOVEA_DEVICE void scale_all(Accumulator (&c)[kM][kN], float factor) {
#pragma unroll
  for (int x = 0; x < kM * kN * 4; ++x) c[x / 4 / kN][x / 4 % kN].x[x % 4] *= factor;
}

/// Where the numbers of a thread's accumulators lie in their piece: entry e of piece (i, j).
FOVEA_DEVICE int entry_row(int i, int e) { return 16 * i + lane_id() / 4 + e / 2 * 8; }
FOVEA_DEVICE int entry_column(int j, int e) { return 8 * j + lane_id() % 4 * 2 + e % 2; }

/// Calls f(x, row, column) for every number of accumulators.
template <int kM, int kN, class F>
FOVEA_DEVICE void each_entry(Accumulator (&c)[kM][kN], const F& f) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(c[i][j].x[e], entry_row(i, e), entry_column(j, e));
    }
  }
}

// ---- sums over warps, of rungs 1 and 2

/// Sums of 16 queries on their way from the accumulators of 4 warps, each with a share, to all threads: 8 threads a
/// row.
template <Spec S>
struct Exchange {
  static constexpr int kPitch = S.head_dim + 8;
  float* partials;

  FOVEA_DEVICE void give(const Accumulator (&c)[1][S.head_dim / 8]) const {
    float* mine = partials + warp_id() * kSlicedRows * kPitch;
#pragma unroll
    for (int j = 0; j < S.head_dim / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        auto* to = reinterpret_cast<float2*>(mine + entry_row(0, e) * kPitch + entry_column(j, e));
        *to = {c[0][j].x[e], c[0][j].x[e + 1]};
      }
    }
  }

  FOVEA_DEVICE static int row() { return static_cast<int>(threadIdx.x) / 8; }
  /// A thread has this, and every 8th from there.
  FOVEA_DEVICE static int first_column() { return static_cast<int>(threadIdx.x) % 8; }
  FOVEA_DEVICE float take(int column) const {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kSlicedWarps; ++w) sum += partials[(w * kSlicedRows + row()) * kPitch + column];
    return sum;
  }
  /// What the first thread of a row has, for all of them.
  FOVEA_DEVICE static float of_row(float x) { return __shfl_sync(kAllLanes, x, lane_id() & ~7); }
};

// ---- around the backward of rungs 1 to 3: before it, delta and sums of dq that are 0; after it, dq

/// A thread's row of its head, and its 8 elements of that.
struct Place {
  Head head;
  int row, column;

  template <Spec S>
  FOVEA_DEVICE static Place of(const Params& p) {
    constexpr int kPieces = S.head_dim / 8, kRows = around_rows(S.head_dim);
    const int blocks = blocks_of(p.seqlen_q, kRows), block = static_cast<int>(blockIdx.x);
    const int thread = static_cast<int>(threadIdx.x);
    return {Head::of(p, block / blocks), block % blocks * kRows + thread / kPieces, thread % kPieces * 8};
  }
};

/// delta = Σ dout ∘ out, which is Σ P ∘ dP without P.
template <Spec S>
__device__ void prepare_backward(const Params& p) {
  const Place place = Place::of<S>(p);
  const bool real = place.row < p.seqlen_q;
  float sum = 0.0F;
  if (real) {
    const uint4 a = read_piece(place.head.row(p.out, place.row) + place.column * 2, 16, p.out.aligned);
    const uint4 b = read_piece(place.head.row(p.dout, place.row) + place.column * 2, 16, p.dout.aligned);
    const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum += widen<S.type>(x[w] & 0xffffU) * widen<S.type>(y[w] & 0xffffU) +
             widen<S.type>(x[w] >> 16) * widen<S.type>(y[w] >> 16);
    }
  }
#pragma unroll
  for (int lane = S.head_dim / 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
  if (!real) return;
  const i64 row = place.head.row_number(p, place.row);
  auto* to = reinterpret_cast<float4*>(p.dq_sum + row * S.head_dim + place.column);
  to[0] = to[1] = float4{};
  if (place.column != 0) return;
  p.delta[row] = p.dlse.data == nullptr ? sum : sum - *place.head.statistic(p.dlse, place.row);
}

template <Spec S>
__device__ void finish_dq(const Params& p) {
  const Place place = Place::of<S>(p);
  if (place.row >= p.seqlen_q) return;
  const auto* from =
      reinterpret_cast<const float4*>(p.dq_sum + place.head.row_number(p, place.row) * S.head_dim + place.column);
  const float4 a = from[0], b = from[1];
  const float s = p.scale;
  write_piece(place.head.row(p.dq, place.row) + place.column * 2,
              {pack<S.type>(a.x * s, a.y * s), pack<S.type>(a.z * s, a.w * s), pack<S.type>(b.x * s, b.y * s),
               pack<S.type>(b.z * s, b.w * s)},
              16, p.dq.aligned);
}

}  // namespace fovea::ladder
