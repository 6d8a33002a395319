#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// Before the main kernel of the backward: what it needs of every row, and zeros where it adds.
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

/// Blocks: row blocks × heads × batch.  Writes log2_lse, delta and the sink's parts, clears dq_sum and the tickets.
template <BackwardSpec S>
__device__ void backward_rows(const BackwardParams& p) {
  constexpr int kLanes = 8;  // that share a row
  const int block = static_cast<int>(blockIdx.x), tile = block % p.row_blocks, head = block / p.row_blocks % p.q_heads;
  const Sequence sequence = Sequence::of(p, block / p.row_blocks / p.q_heads);
  if (S.deterministic && block == 0 && threadIdx.x == 0) p.tickets[i64{p.q_heads} * p.row_slots] = 0;
  if (tile * S.block_m >= sequence.q_rows) return;
  const i64 slot = RowSlots(p, sequence, S.block_m).at(head, tile);

  auto* sums = reinterpret_cast<float4*>(p.dq_sum + slot * (S.block_m * S.head_dim));
  for (int x = static_cast<int>(threadIdx.x); x < S.block_m * S.head_dim / 4; x += kSideThreads) sums[x] = {};
  if (S.deterministic && threadIdx.x == 0) p.tickets[slot] = 0;

  const int lane = static_cast<int>(threadIdx.x) % kLanes, bytes = p.head_dim_v * kBytes<S.type>;
  float sink_part = 0.0F;
  for (int r = static_cast<int>(threadIdx.x) / kLanes; r < S.block_m; r += kSideThreads / kLanes) {
    const int i = tile * S.block_m + r;
    const float lse = i < sequence.band.seqlen_q ? *sequence.statistic(p.lse, i, head) : -infinity();
    float delta = 0.0F;
    if (lse != -infinity()) {
      const char *out = sequence.q_row(p.out, i, head), *dout = sequence.q_row(p.dout, i, head);
#pragma unroll 4
      for (int at = lane * 16; at < bytes; at += kLanes * 16) {
        delta += dot_pieces<S.type>(read_piece(out + at, bytes - at, p.out.aligned),
                                    read_piece(dout + at, bytes - at, p.dout.aligned));
      }
    }
    for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(kAllLanes, delta, step);
    if (lane != 0) continue;
    if (lse != -infinity() && p.dlse.data != nullptr) delta -= *sequence.statistic(p.dlse, i, head);
    p.log2_lse[slot * S.block_m + r] = lse == -infinity() ? infinity() : lse * kLog2E;
    p.delta[slot * S.block_m + r] = delta;
    if (p.dsink != nullptr && lse != -infinity()) sink_part -= delta * exp2((p.sink[head] - lse) * kLog2E);
  }
  if (p.dsink != nullptr) {
    sink_part = sum_of_block(sink_part);
    if (threadIdx.x == 0) p.sink_parts[slot] = sink_part;
  }
}

}  // namespace fovea::cuda
