#pragma once

#include "cuda/kernels/backward.cuh"

// After the main kernel of the backward: dq_sum, in the order of warps' accumulators, becomes dq.
namespace fovea::cuda {

/// Eight columns of the rows `row` and `row + 8` of a head, of a piece of 16 × 8 of their sums: the four of each lane
/// of a quad, or, where accumulators lie entry by entry, of each entry.
template <BackwardSpec S, bool kByLane>
FOVEA_DEVICE void write_dq(const BackwardParams& p, const Sequence& sequence, int row, int head, int column,
                           const float4 (&sums)[4]) {
  float x[4][4];
#pragma unroll
  for (int a = 0; a < 4; ++a) x[a][0] = sums[a].x, x[a][1] = sums[a].y, x[a][2] = sums[a].z, x[a][3] = sums[a].w;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row + 8 * h >= sequence.q_rows) continue;
    float y[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int lane = c / 2, e = 2 * h + c % 2;
      y[c] = (kByLane ? x[lane][e] : x[e][lane]) * p.scale;
    }
    char* to = sequence.q_row(p.dq, row + 8 * h, head) + column * kBytes<S.type>;
    const int bytes = (p.head_dim - column) * kBytes<S.type>;
    if constexpr (S.type == Type::kFloat32) {
      write_piece(to, {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3])},
                  bytes, p.dq.aligned);
      write_piece(to + 16, {__float_as_uint(y[4]), __float_as_uint(y[5]), __float_as_uint(y[6]), __float_as_uint(y[7])},
                  bytes - 16, p.dq.aligned);
    } else {
      write_piece(
          to, {pack<S.type>(y[0], y[1]), pack<S.type>(y[2], y[3]), pack<S.type>(y[4], y[5]), pack<S.type>(y[6], y[7])},
          bytes, p.dq.aligned);
    }
  }
}

/// Blocks: `RowBlock`.  A thread takes 8 columns of the rows r and r + 8 of a piece of 16 × 8, which are 64 bytes in a
/// row.
template <BackwardSpec S>
__device__ void backward_queries(const BackwardParams& p) {
  await_kernel_ahead();
  const auto [batch, head, tile] = RowBlock::of(p, S.block_m);
  const Sequence sequence = Sequence::of(p, batch);
  const float* sum = p.dq_sum + RowSlots(p, sequence, S.block_m).at(head, tile) * (S.block_m * S.head_dim);
  constexpr int kAcross = S.head_dim / 8;
  for (int at = static_cast<int>(threadIdx.x); at < S.block_m / 16 * kAcross * 8; at += kSideThreads) {
    const int r = at % 8, piece = at / 8, column = piece % kAcross * 8;
    const int row = tile * S.block_m + piece / kAcross * 16 + r;
    if (row >= sequence.q_rows || column >= p.head_dim) continue;
    const float* from = sum + Backward<S>::Dq::piece(piece / kAcross, piece % kAcross);
    float4 sums[4];
#pragma unroll
    for (int a = 0; a < 4; ++a)
      sums[a] = *reinterpret_cast<const float4*>(from + (kVectorReduction ? 16 * r + 4 * a : 32 * a + 4 * r));
    write_dq<S, kVectorReduction>(p, sequence, row, head, column, sums);
  }
}

}  // namespace fovea::cuda
