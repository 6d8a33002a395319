#include "call.h"

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

}  // namespace fovea::python
