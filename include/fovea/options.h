#pragma once

#include <fovea/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace fovea {

/// Which corner of the [seqlen_q, seqlen_kv] rectangle the causal diagonal passes through.  There is no silent default:
/// PyTorch and cuDNN mean kTopLeft, FlashAttention since 2.1 means kBottomRight.
enum class Causal : std::uint8_t { kNone, kTopLeft, kBottomRight };

/// Dropout of attention weights.  An entry's draw depends on (seed, offset, batch, head, row, column) alone, never on
/// tiles, threads or backend (docs/contract.md, "Dropout bits"; Philox of Salmon et al., SC 2011).
struct Dropout {
  float probability = 0.0F;  ///< in [0, 1); kept entries are scaled by the inverse of the exact kept probability
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
  friend bool operator==(const Dropout&, const Dropout&) = default;
};

/// Every option that is not a tensor; part of a call's AttentionOptions and of a Problem.
struct Rules {
  std::optional<float> softmax_scale;  ///< default 1 / sqrt(head_dim)
  Causal causal = Causal::kNone;
  std::optional<std::int64_t> window_left;   ///< keys before the diagonal that stay visible; unset: unbounded
  std::optional<std::int64_t> window_right;  ///< keys after it; with no causal corner it is bottom_right's diagonal
  float softcap = 0.0F;                      ///< 0: none; at most 1e30 (Gemma 2, 2408.00118)
  Dropout dropout{};
  bool deterministic = false;  ///< the same bits on every run, backward too
  friend bool operator==(const Rules&, const Rules&) = default;
};

/// How a problem is to be run.
struct PlanOptions {
  std::string backend{};  ///< run this one of Report::verdicts or fail; empty: the first that supports the problem
  bool strict = false;    ///< fail rather than pass over a backend this device has
  int num_threads = 0;    ///< CPU threads; 0: as many as the process may use; at most 256 or one a processor
};

/// Everything an attention call may ask for besides q, k and v.  All options compose.
///
///     s = q kᵀ · softmax_scale;  s = softcap · tanh(s / softcap);  s += alibi + bias;  hidden entries become −inf
///     p = softmax(s), the sink being one more logit with no value;  dropout;  out = p v
///
/// The tensors, like all of a call, are on q's device.
struct AttentionOptions : Rules, PlanOptions {
  Tensor mask;           ///< bool, any broadcast of [batch, num_q_heads, seqlen_q, seqlen_kv]; true = keep
  Tensor bias;           ///< fp32 or q's dtype, any broadcast of the same shape; an entry of −inf hides
  Tensor alibi_slopes;   ///< fp32 [num_q_heads] or [batch, num_q_heads]: adds −slope·|i + offset − j| (2108.12409)
  Tensor sink;           ///< fp32 [num_q_heads]: one more logit a row, with no value
  Tensor q_lengths;      ///< int32 [batch]: rows past the length give 0
  Tensor kv_lengths;     ///< int32 [batch]: keys past the length are hidden
  Tensor cu_seqlens_q;   ///< int32 [batch + 1]: q is [total_q, num_q_heads, head_dim], and sequence b is its rows
                         ///< from cu_seqlens_q[b] to cu_seqlens_q[b + 1]
  Tensor cu_seqlens_kv;  ///< int32 [batch + 1]: the same for k and v; given together with cu_seqlens_q
  std::int64_t max_seqlen_q = 0;  ///< packed on a GPU: the longest sequence; on the CPU 0 lets the library look
  std::int64_t max_seqlen_kv = 0;
};

}  // namespace fovea
