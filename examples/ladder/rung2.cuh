// Rung 2: rung 1, parallel over the sequence too.  With one block a (batch, head), a batch of 4 with 16 heads keeps 64
// of a GPU's multiprocessors busy, whatever the length of its sequences.  Forward, a block takes 128 queries of its
// head past all keys; backward, the blocks of keys, which were one after the other, are blocks of the grid.  Nothing
// else changes, but that atomic sums of dq now come from many blocks at once.

namespace fovea::ladder {

/// Blocks: (batch, head) next to each other, their last queries, which see the most keys, first.
template <Spec S>
__device__ void sequence_forward(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  const int parts = blocks_of(p.seqlen_q, kSequenceRows), heads = static_cast<int>(gridDim.x) / parts;
  const int block = static_cast<int>(blockIdx.x), first = (parts - 1 - block / heads) * kSequenceRows;
  SlicedForward<S>{p, Head::of(p, block % heads), memory}.run(
      {first, math::smaller(first + kSequenceRows, p.seqlen_q)});
}

/// Likewise, the first keys, which most queries see, first.
template <Spec S>
__device__ void sequence_backward(const Params& p) {
  extern __shared__ __align__(128) char memory[];
  const int parts = blocks_of(p.seqlen_kv, SlicedBackward<S>::kKeys), heads = static_cast<int>(gridDim.x) / parts;
  const int block = static_cast<int>(blockIdx.x);
  SlicedBackward<S>{p, Head::of(p, block % heads), memory}.run(block / heads * SlicedBackward<S>::kKeys);
}

}  // namespace fovea::ladder
