#pragma once

#include <fovea/fovea.h>

namespace fovea::python {

/// Everything one pass reads but its rules and results.
struct Call {
  Direction direction = Direction::kForward;
  Inputs in{};
  std::int64_t max_seqlen_q = 0;
  std::int64_t max_seqlen_kv = 0;

  [[nodiscard]] bool packed() const { return in.cu_seqlens_q.defined(); }

  /// Nothing besides q, k and v, and results, which a problem does not depend on.
  [[nodiscard]] bool bare() const {
    return !(in.mask.defined() || in.bias.defined() || in.alibi_slopes.defined() || in.sink.defined() ||
             in.q_lengths.defined() || in.kv_lengths.defined() || in.cu_seqlens_q.defined() ||
             in.cu_seqlens_kv.defined() || max_seqlen_q != 0 || max_seqlen_kv != 0);
  }
};

/// The problem that a call poses.  Lengths stay open, so that batches of one shape share a plan.
[[nodiscard]] Problem problem_of(const Call& call, const Rules& rules);

/// A mask or bias with fewer than four dimensions gets leading ones, as everywhere in Python.
[[nodiscard]] Tensor padded(const Tensor& view);

}  // namespace fovea::python
