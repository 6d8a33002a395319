#pragma once

#include "cuda/kernels/forward.cuh"

// Puts together what the splits of each row left (flash decoding): each part scaled to the common reference, in order.
namespace fovea::cuda {

/// Blocks: x: kCombineRows rows; y: heads; z: sequences.
template <ForwardSpec S>
__device__ void combine(const ForwardParams& p) {
  const Sequence sequence = Sequence::of(p, p.first_batch + static_cast<int>(blockIdx.z));
  const int query = static_cast<int>(blockIdx.x) * kCombineRows + warp_id(), head = static_cast<int>(blockIdx.y);
  if (query >= sequence.q_rows) return;
  const int columns = p.head_dim_v, stride = columns + 2;
  const float* const parts =
      p.partials + ((i64{sequence.batch} * p.q_heads + head) * p.seqlen_q + query) * p.splits * stride;

  float reference = -infinity(), sum = 0.0F;
  for (int split = 0; split < p.splits; ++split) {
    const float* part = parts + split * stride;
    if (part[columns + 1] != 0.0F) reference = fmaxf(reference, part[columns]);
  }
  for (int split = 0; split < p.splits; ++split) {
    const float* part = parts + split * stride;
    if (part[columns + 1] != 0.0F) sum += part[columns + 1] * exp2(part[columns] - reference);
  }
  const RowEnd end = end_of_row<S>(p, head, reference, sum);
  for (int column = lane_id(); column < columns; column += kWarp) {
    float o = 0.0F;
    for (int split = 0; split < p.splits; ++split) {
      const float* part = parts + split * stride;
      if (part[columns + 1] != 0.0F) o += part[column] * exp2(part[columns] - reference);
    }
    write<S.type>(sequence.q_row(p.out, query, head) + column * kBytes<S.type>, end.empty ? 0.0F : o * end.factor);
  }
  if (p.lse.data != nullptr && lane_id() == 0) *sequence.statistic(p.lse, query, head) = end.lse;
}

}  // namespace fovea::cuda
