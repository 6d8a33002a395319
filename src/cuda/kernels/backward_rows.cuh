#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// Before the main kernel of the backward: the statistics of every row, and zeros where the main kernel adds.
namespace fovea::cuda {

template <Type kType>
FOVEA_DEVICE float dot_pieces(uint4 a, uint4 b) {
  const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0F;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kType == Type::kFloat32) {
      sum += widen<kType>(x[w]) * widen<kType>(y[w]);
    } else {
      sum += widen<kType>(x[w] & 0xffffU) * widen<kType>(y[w] & 0xffffU) +
             widen<kType>(x[w] >> 16) * widen<kType>(y[w] >> 16);
    }
  }
  return sum;
}

inline constexpr int kRowsAtOnce = 2;  // of a thread

/// Lanes that share a row: those that read all of it at once, so that a warp reads whole lines of memory.
template <BackwardSpec S>
FOVEA_DEVICE constexpr int lanes_of_row() {
  int lanes = math::larger(kSideThreads / S.block_m, 1);
  while (lanes < kWarp && lanes * 16 < S.head_dim_v * kBytes<S.type>) lanes *= 2;
  return lanes;
}

/// The inner products of the rows of two tensors, from `out` and `dout` on, by a whole block.
template <BackwardSpec S>
FOVEA_DEVICE void dots_of_rows(const BackwardParams& p, const char* out, const char* dout, int rows,
                               float (&dots)[S.block_m]) {
  constexpr int kLanes = lanes_of_row<S>(), kApart = kSideThreads / kLanes;
  constexpr int kRows = math::larger(math::smaller(S.block_m / kApart, kRowsAtOnce), 1);
  const int bytes = p.head_dim_v * kBytes<S.type>, lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool in_pieces = p.out.aligned && p.dout.aligned && bytes % 16 == 0;
#pragma unroll 1
  for (int r = static_cast<int>(threadIdx.x) / kLanes; r < S.block_m; r += kRows * kApart) {
    const auto offset = [&](int n, i64 stride) { return math::smaller(r + n * kApart, rows - 1) * stride; };
    float sums[kRows] = {};
    if (in_pieces) {
#pragma unroll 1
      for (int at = lane * 16; at < bytes; at += kLanes * 16) {
        uint4 x[kRows], y[kRows];  // asked for all at once
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
          x[n] = read_once(out + offset(n, p.out.row) + at);
          y[n] = read_once(dout + offset(n, p.dout.row) + at);
        }
#pragma unroll
        for (int n = 0; n < kRows; ++n) sums[n] += dot_pieces<S.type>(x[n], y[n]);
      }
    } else {
#pragma unroll 1
      for (int at = lane * kBytes<S.type>; at < bytes; at += kLanes * kBytes<S.type>) {
#pragma unroll
        for (int n = 0; n < kRows; ++n)
          sums[n] += read<S.type>(out + offset(n, p.out.row) + at) * read<S.type>(dout + offset(n, p.dout.row) + at);
      }
    }
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
      for (int step = kLanes / 2; step > 0; step /= 2) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], step);
      if (lane == 0 && r + n * kApart < S.block_m) dots[r + n * kApart] = sums[n];
    }
  }
}

/// The sum over all threads, in the same order every time; for thread 0.
template <class T>
FOVEA_DEVICE T sum_of_block(T x) {
  __shared__ T parts[kSideThreads / kWarp];
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  __syncthreads();
  if (lane_id() == 0) parts[warp_id()] = x;
  __syncthreads();
  x = parts[0];
  for (int w = 1; w < kSideThreads / kWarp; ++w) x += parts[w];
  return x;
}

template <BackwardSpec S>
FOVEA_DEVICE void clear_sums(const BackwardParams& p, i64 tile) {
  auto* sums = reinterpret_cast<float4*>(p.dq_sum + tile * (S.block_m * S.head_dim));
  for (int x = static_cast<int>(threadIdx.x); x < S.block_m * S.head_dim / 4; x += kSideThreads) sums[x] = {};
}

/// Blocks: `RowBlock`.  Writes log2_lse, delta and the sink's parts, clears the tickets and what is added to of dq_sum.
template <BackwardSpec S>
__device__ void backward_rows(const BackwardParams& p) {
  await_kernel_ahead();
  let_next_kernel_begin();
  const auto [batch, head, tile] = RowBlock::of(p, S.block_m);
  const Sequence sequence = Sequence::of(p, batch);
  if ((S.deterministic || S.ends_dq) && blockIdx.x + threadIdx.x == 0) *p.begun = 0;
  if constexpr (S.ends_dq) {
    const DqPlaces places{p};
    const int turn = places.turn(sequence.batch, head / p.group), of_group = head % p.group;
    if (of_group + tile == 0 && threadIdx.x == 0) p.added[turn] = 0;
    if (turn < p.dq_places) clear_sums<S>(p, places.first_tile(turn) + of_group * p.row_blocks + tile);
  }
  static_assert(S.block_m <= kSideThreads);
  if (tile * S.block_m >= sequence.q_rows) return;
  const i64 slot = RowSlots(p, sequence, S.block_m).at(head, tile);
  if constexpr (!S.holds_dq && !S.ends_dq) clear_sums<S>(p, slot);
  if (S.deterministic && threadIdx.x == 0) p.tickets[slot] = 0;

  __shared__ float dots[S.block_m];
  const int r = static_cast<int>(threadIdx.x), first = tile * S.block_m;
  const int rows = math::smaller(sequence.band.seqlen_q - first, S.block_m);
  const float lse = r < rows ? *sequence.statistic(p.lse, first + r, head) : -infinity();  // awaited at the end
  const float dlse = r < rows && p.dlse.data != nullptr ? *sequence.statistic(p.dlse, first + r, head) : 0.0F;
  if (rows > 0) dots_of_rows<S>(p, sequence.q_row(p.out, first, head), sequence.q_row(p.dout, first, head), rows, dots);
  __syncthreads();
  const bool sees = lse != -infinity();
  const float delta = sees ? dots[r] - dlse : 0.0F;
  if (r < S.block_m) {
    p.log2_lse[slot * S.block_m + r] = sees ? lse * kLog2E : infinity();
    p.delta[slot * S.block_m + r] = delta;
  }
  if (p.dsink != nullptr) {
    const float sink_part = sum_of_block(sees ? -delta * exp2((p.sink[head] - lse) * kLog2E) : 0.0F);
    if (r == 0) p.sink_parts[slot] = sink_part;
  }
}

}  // namespace fovea::cuda
