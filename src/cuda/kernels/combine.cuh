#pragma once

#include "cuda/kernels/row_end.cuh"

// Combines the parts of rows whose keys were split (flash decoding): each is rescaled to the common reference.
namespace fovea::cuda {

/// Blocks: x: rows of sequences × heads; y: chunks of v's columns.  A thread weighs a split, a warp adds up every 4th.
template <ForwardSpec S>
__device__ void combine(const ForwardParams& p) {
  constexpr int kWarps = kMostSplits / kWarp;
  __shared__ float tops[kWarps], sums[kWarps], weights[kMostSplits];
  __shared__ float4 shares[kWarps][kWarp];
  const int thread = static_cast<int>(threadIdx.x), chunk = static_cast<int>(blockIdx.y);
  const int line = static_cast<int>(blockIdx.x) / p.seqlen_q, query = static_cast<int>(blockIdx.x) - line * p.seqlen_q;
  const int head = line % p.q_heads, width = p.v_columns, begin = chunk * width, stride = width + kPartFacts;
  const Sequence sequence = Sequence::of(p, line / p.q_heads);
  if (query >= sequence.q_rows) return;
  const float* const parts = p.partials + (i64{blockIdx.x} * p.v_chunks + chunk) * p.splits * stride;

  await_kernel_ahead();
  const float2 facts = *reinterpret_cast<const float2*>(parts + math::smaller(thread, p.splits - 1) * stride + width);
  const bool there = thread < p.splits && facts.y != 0.0F;
  float reference = there ? facts.x : -infinity(), total = 0.0F;
  for (int lane = 1; lane < kWarp; lane *= 2) reference = fmaxf(reference, __shfl_xor_sync(kAllLanes, reference, lane));
  tops[warp_id()] = reference;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) reference = fmaxf(reference, tops[w]);
  const float weight = exp2(facts.x - reference);
  weights[thread] = there ? weight : -1.0F;
  float sum = there ? facts.y * weight : 0.0F;
  for (int lane = 1; lane < kWarp; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
  sums[warp_id()] = sum;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  const RowEnd end = end_of_row<S>(p, head, reference, total);

#pragma unroll 1
  for (int first = 0; first < width; first += 4 * kWarp) {
    const int mine = math::smaller(first + 4 * lane_id(), width - 4);
    float4 o{};
#pragma unroll 8
    for (int split = warp_id(); split < p.splits; split += kWarps) {
      const float4 part = *reinterpret_cast<const float4*>(parts + split * stride + mine);
      const float w = weights[split];
      if (w < 0.0F) continue;
      o.x += w * part.x, o.y += w * part.y, o.z += w * part.z, o.w += w * part.w;
    }
    shares[warp_id()][lane_id()] = o;
    __syncthreads();
    const int column = first + thread;
    if (column < math::smaller(width, p.head_dim_v - begin)) {
      float x = 0.0F;
      for (int w = 0; w < kWarps; ++w) x += reinterpret_cast<const float*>(shares[w])[thread];
      write<S.type>(sequence.q_row(p.out, query, head) + (begin + column) * kBytes<S.type>,
                    end.empty ? 0.0F : x * end.factor);
    }
    __syncthreads();
  }
  if (p.lse.data != nullptr && chunk == 0 && thread == 0) *sequence.statistic(p.lse, query, head) = end.lse;
}

/// The same of many rows and at most kWarpSplits parts.  A warp combines a row, a lane weighs a split.
template <ForwardSpec S>
__device__ void combine_by_warps(const ForwardParams& p) {
  const int row = static_cast<int>(blockIdx.x) * (kMostSplits / kWarp) + warp_id(), lane = lane_id();
  const int line = row / p.seqlen_q, query = row - line * p.seqlen_q, chunk = static_cast<int>(blockIdx.y);
  if (line >= p.batch * p.q_heads) return;
  const int head = line % p.q_heads, width = p.v_columns, begin = chunk * width, stride = width + kPartFacts;
  const Sequence sequence = Sequence::of(p, line / p.q_heads);
  if (query >= sequence.q_rows) return;
  const float* const parts = p.partials + (i64{row} * p.v_chunks + chunk) * p.splits * stride;
  await_kernel_ahead();
  const float2 facts = *reinterpret_cast<const float2*>(parts + math::smaller(lane, p.splits - 1) * stride + width);
  const bool there = lane < p.splits && facts.y != 0.0F;
  float reference = there ? facts.x : -infinity();
  for (int other = 1; other < kWarp; other *= 2)
    reference = fmaxf(reference, __shfl_xor_sync(kAllLanes, reference, other));
  const float weight = there ? exp2(facts.x - reference) : -1.0F;
  float sum = there ? facts.y * weight : 0.0F;
  for (int other = 1; other < kWarp; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  const RowEnd end = end_of_row<S>(p, head, reference, sum);
  char* const to = sequence.q_row(p.out, query, head) + begin * kBytes<S.type>;
#pragma unroll 1
  for (int first = 0; first < width; first += 4 * kWarp) {
    const int column = first + 4 * lane;
    float o[4] = {};
#pragma unroll 8
    for (int split = 0; split < p.splits; ++split) {
      const float4 part = *reinterpret_cast<const float4*>(parts + split * stride + math::smaller(column, width - 4));
      const float w = __shfl_sync(kAllLanes, weight, split);
      if (w < 0.0F) continue;
      o[0] += w * part.x, o[1] += w * part.y, o[2] += w * part.z, o[3] += w * part.w;
    }
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      if (column + x < math::smaller(width, p.head_dim_v - begin))
        write<S.type>(to + (column + x) * kBytes<S.type>, end.empty ? 0.0F : o[x] * end.factor);
    }
  }
  if (p.lse.data != nullptr && chunk == 0 && lane == 0) *sequence.statistic(p.lse, query, head) = end.lse;
}

}  // namespace fovea::cuda
