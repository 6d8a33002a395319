#pragma once

#include <fovea/plan.h>

namespace fovea {

/// Exact attention in tiles, without the seqlen_q × seqlen_kv matrix (FlashAttention, 2205.14135; 2307.08691).
///
/// q    [batch, seqlen_q, num_q_heads, head_dim]     fp32, fp16 or bf16, any strides with the last dimension contiguous
/// k    [batch, seqlen_kv, num_kv_heads, head_dim]   same dtype; num_q_heads is a multiple of num_kv_heads
/// v    [batch, seqlen_kv, num_kv_heads, head_dim_v]
/// out  [batch, seqlen_q, num_q_heads, head_dim_v]   same dtype
/// lse  [batch, num_q_heads, seqlen_q]               fp32, optional; natural logarithm of the softmax denominator
///
/// With options.cu_seqlens_q/kv the tensors are packed: [total, heads, dim], and lse is [num_q_heads, total_q].
/// All tensors of a call are on q's device.  On the CPU the call returns when all is done.  On a GPU it queues its work
/// in the default stream and may return before that is done; for another stream use a Plan.  Throws Error; where the
/// input is at fault nothing has been written.  Plans and allocates a workspace in every call; for repeated calls make
/// a Plan.  Any number of threads may call at once.
FOVEA_API void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options,
                                 const Tensor& out, const Tensor& lse = {});

/// The gradients that attention_backward writes.  dq, dk, dv are required; the others where they are wanted.
struct Gradients {
  Tensor dq{};             ///< like q
  Tensor dk{};             ///< like k
  Tensor dv{};             ///< like v
  Tensor dbias{};          ///< like options.bias, summed over its broadcast dimensions
  Tensor dalibi_slopes{};  ///< like options.alibi_slopes
  Tensor dsink{};          ///< like options.sink
};

/// Gradients of attention_forward, recomputed from q, k, v, out and lse tile by tile.  `options` are the forward's,
/// dropout seed and offset included; `out` and `lse` are what it wrote, `dout` is like out.  `dlse`, optional, like
/// lse, is the gradient that came in through lse.  Device, stream, errors and threads as attention_forward's.
FOVEA_API void attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                  const Tensor& lse, const Tensor& dout, const AttentionOptions& options,
                                  const Gradients& gradients, const Tensor& dlse = {});

}  // namespace fovea
