#pragma once

#include "cuda/kernels/forward.cuh"

// Puts together what the splits of each row left (flash decoding): each part scaled to the common reference, in order.
namespace fovea::cuda {

/// Blocks: x: kCombineRows rows; y: sequences × heads; z: chunks of v's columns.
template <ForwardSpec S>
__device__ void combine(const ForwardParams& p) {
  const int line = static_cast<int>(blockIdx.y), head = line % p.q_heads, chunk = static_cast<int>(blockIdx.z);
  const Sequence sequence = Sequence::of(p, line / p.q_heads);
  const int query = static_cast<int>(blockIdx.x) * kCombineRows + warp_id();
  if (query >= sequence.q_rows) return;
  const int width = p.v_columns, begin = chunk * width, stride = width + 2;
  const i64 row = (i64{sequence.batch} * p.q_heads + head) * p.seqlen_q + query;
  const float* const parts = p.partials + (row * p.v_chunks + chunk) * p.splits * stride;

  float reference = -infinity(), sum = 0.0F;
  for (int split = 0; split < p.splits; ++split) {
    const float* part = parts + split * stride;
    if (part[width + 1] != 0.0F) reference = fmaxf(reference, part[width]);
  }
  for (int split = 0; split < p.splits; ++split) {
    const float* part = parts + split * stride;
    if (part[width + 1] != 0.0F) sum += part[width + 1] * exp2(part[width] - reference);
  }
  const RowEnd end = end_of_row<S>(p, head, reference, sum);
  for (int column = lane_id(); column < math::smaller(width, p.head_dim_v - begin); column += kWarp) {
    float o = 0.0F;
    for (int split = 0; split < p.splits; ++split) {
      const float* part = parts + split * stride;
      if (part[width + 1] != 0.0F) o += part[column] * exp2(part[width] - reference);
    }
    write<S.type>(sequence.q_row(p.out, query, head) + (begin + column) * kBytes<S.type>,
                  end.empty ? 0.0F : o * end.factor);
  }
  if (p.lse.data != nullptr && chunk == 0 && lane_id() == 0) *sequence.statistic(p.lse, query, head) = end.lse;
}

}  // namespace fovea::cuda
