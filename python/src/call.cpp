#include "call.h"

#include <algorithm>

namespace fovea::python {

Problem problem_of(const Call& call, const Rules& rules) {
  AttentionOptions options;
  static_cast<Rules&>(options) = rules;
  options.mask = call.in.mask;
  options.bias = call.in.bias;
  options.alibi_slopes = call.in.alibi_slopes;
  options.sink = call.in.sink;
  options.q_lengths = call.in.q_lengths;
  options.kv_lengths = call.in.kv_lengths;
  options.cu_seqlens_q = call.in.cu_seqlens_q;
  options.cu_seqlens_kv = call.in.cu_seqlens_kv;
  options.max_seqlen_q = call.max_seqlen_q;
  options.max_seqlen_kv = call.max_seqlen_kv;
  Problem problem = describe(call.direction, call.in.q, call.in.k, call.in.v, options);
  for (Lengths* lengths : {&problem.q_lengths, &problem.kv_lengths, &problem.packed_q, &problem.packed_kv}) {
    lengths->values.clear();
  }
  return problem;
}

Tensor padded(const Tensor& view) {
  Tensor t = view;
  while (t.rank < Tensor::kMaxRank) {
    std::copy_backward(t.shape.begin(), t.shape.begin() + t.rank, t.shape.begin() + t.rank + 1);
    std::copy_backward(t.strides.begin(), t.strides.begin() + t.rank, t.strides.begin() + t.rank + 1);
    t.shape[0] = 1;
    t.strides[0] = t.rank == 0 ? 1 : t.shape[1] * t.strides[1];
    ++t.rank;
  }
  return t;
}

}  // namespace fovea::python
