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

/// 16 bytes, or zeros, without a branch, so that many loads are in flight at once.
FOVEA_DEVICE uint4 read_or_clear(const char* from, bool real) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred real;\nsetp.ne.s32 real, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@real ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<int>(real)));
  return x;
}

/// A lane's part of the inner product of two rows: every kLanes-th of their 16-byte pieces, or of their elements.
template <BackwardSpec S, int kLanes>
FOVEA_DEVICE float dot_of_rows(const BackwardParams& p, const char* out, const char* dout, int lane) {
  constexpr int kPieces = (S.head_dim_v * kBytes<S.type> / 16 + kLanes - 1) / kLanes,
                kAtOnce = math::smaller(kPieces, 4);
  const int bytes = p.head_dim_v * kBytes<S.type>;
  float sum = 0.0F;
  if (p.out.aligned && p.dout.aligned && bytes % 16 == 0) {
#pragma unroll 1
    for (int at = lane * 16; at < bytes; at += kAtOnce * kLanes * 16) {
      uint4 x[kAtOnce], y[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int here = at + n * kLanes * 16;
        x[n] = read_or_clear(out + here, here < bytes);
        y[n] = read_or_clear(dout + here, here < bytes);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) sum += dot_pieces<S.type>(x[n], y[n]);
    }
    return sum;
  }
#pragma unroll 1
  for (int at = lane * kBytes<S.type>; at < bytes; at += kLanes * kBytes<S.type>) {
    sum += read<S.type>(out + at) * read<S.type>(dout + at);
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

template <BackwardSpec S>
FOVEA_DEVICE void clear_sums(const BackwardParams& p, i64 tile) {
  auto* sums = reinterpret_cast<float4*>(p.dq_sum + tile * (S.block_m * S.head_dim));
  for (int x = static_cast<int>(threadIdx.x); x < S.block_m * S.head_dim / 4; x += kSideThreads) sums[x] = {};
}

/// Blocks: `RowBlock`.  Writes log2_lse, delta and the sink's parts, clears the tickets and what is added to of dq_sum.
template <BackwardSpec S>
__device__ void backward_rows(const BackwardParams& p) {
  constexpr int kLanes = math::larger(kSideThreads / S.block_m, 4);  // that share a row
  const auto [batch, head, tile] = RowBlock::of(p, S.block_m);
  const Sequence sequence = Sequence::of(p, batch);
  if ((S.deterministic || S.ends_dq) && blockIdx.x + threadIdx.x == 0) *p.begun = 0;
  if constexpr (S.ends_dq) {
    const DqPlaces places{p};
    const int turn = places.turn(sequence.batch, head / p.group), of_group = head % p.group;
    if (of_group + tile == 0 && threadIdx.x == 0) p.added[turn] = 0;
    if (turn < p.dq_places) clear_sums<S>(p, places.first_tile(turn) + of_group * p.row_blocks + tile);
  }
  if (tile * S.block_m >= sequence.q_rows) return;
  const i64 slot = RowSlots(p, sequence, S.block_m).at(head, tile);
  if constexpr (!S.holds_dq && !S.ends_dq) clear_sums<S>(p, slot);
  if (S.deterministic && threadIdx.x == 0) p.tickets[slot] = 0;

  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float sink_part = 0.0F;
#pragma unroll 1
  for (int pass = 0; pass * kSideThreads < S.block_m * kLanes; ++pass) {
    const int r = (pass * kSideThreads + static_cast<int>(threadIdx.x)) / kLanes;
    const int i = tile * S.block_m + r;
    const bool real = r < S.block_m && i < sequence.band.seqlen_q;
    const float lse = real ? *sequence.statistic(p.lse, i, head) : -infinity();
    float delta = 0.0F;
    if (real) {  // without waiting for lse
      delta = dot_of_rows<S, kLanes>(p, sequence.q_row(p.out, i, head), sequence.q_row(p.dout, i, head), lane);
    }
    for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(kAllLanes, delta, step);
    if (lane != 0 || r >= S.block_m) continue;
    if (real && p.dlse.data != nullptr) delta -= *sequence.statistic(p.dlse, i, head);
    if (lse == -infinity()) delta = 0.0F;
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
