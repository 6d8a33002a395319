#pragma once

#include <fovea/attention.h>

namespace fovea {

/// The inputs of a plan, out of the arguments of a call.
inline Inputs operands(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  Inputs in;
  in.q = q, in.k = k, in.v = v;
  in.mask = options.mask;
  in.bias = options.bias;
  in.alibi_slopes = options.alibi_slopes;
  in.sink = options.sink;
  in.q_lengths = options.q_lengths;
  in.kv_lengths = options.kv_lengths;
  in.cu_seqlens_q = options.cu_seqlens_q;
  in.cu_seqlens_kv = options.cu_seqlens_kv;
  return in;
}

}  // namespace fovea
