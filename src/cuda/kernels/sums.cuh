#pragma once

#include "cuda/kernels/backward_rows.cuh"

// After the main kernel of the backward: dslopes and dsink, each summed by one block in one order.
namespace fovea::cuda {

/// Blocks: heads × batch, or heads alone where slopes are per head.
template <BackwardSpec S>
__device__ void backward_sums(const BackwardParams& p) {
  await_kernel_ahead();
  const int head = static_cast<int>(blockIdx.x) % p.q_heads, first = static_cast<int>(blockIdx.x) / p.q_heads;
  const int thread = static_cast<int>(threadIdx.x);
  if (p.dslopes.data != nullptr) {
    double sum = 0.0;
    for (int b = first; b < (p.slopes.per_batch ? first + 1 : p.batch); ++b) {
      const Sequence sequence = Sequence::of(p, b);
      const float* parts = p.slope_parts + (i64{b} * p.q_heads + head) * p.key_blocks * S.warps;
      const int count = (sequence.kv_rows + S.block_n - 1) / S.block_n * S.warps;
      for (int x = thread; x < count; x += kSideThreads) sum += static_cast<double>(parts[x]);
    }
    sum = sum_of_block(sum);
    if (thread == 0) p.dslopes.data[first * p.dslopes.batch + head] = static_cast<float>(sum);
  }
  if (p.dsink != nullptr && first == 0) {
    double sum = 0.0;
    for (int b = 0; b < p.batch; ++b) {
      const Sequence sequence = Sequence::of(p, b);
      const float* parts = p.sink_parts + RowSlots(p, sequence, S.block_m).at(head, 0);
      for (int x = thread; x < (sequence.q_rows + S.block_m - 1) / S.block_m; x += kSideThreads)
        sum += static_cast<double>(parts[x]);
    }
    sum = sum_of_block(sum);
    if (thread == 0) p.dsink[head] = static_cast<float>(sum);
  }
}

}  // namespace fovea::cuda
