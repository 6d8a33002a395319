#pragma once

#include <fovea/plan.h>
#include <nanobind/nanobind.h>

#include "rules.h"

// One pass over Python arrays: the arrays in, the plan, the results as new arrays of the same framework.
namespace fovea::python {

/// The arrays of a call besides q, k and v: None, or a tuple of mask, bias, alibi_slopes, sink, q_lengths, kv_lengths,
/// cu_seqlens_q, cu_seqlens_kv, max_seqlen_q and max_seqlen_kv, each of them possibly None.
using Extras = nb::handle;

/// Which optional gradients are wanted, as bits.
enum Wanted : int { kBias = 1, kSlopes = 2, kSink = 4 };

/// out, or (out, lse).  `out` may be given, then it is written and returned.
[[nodiscard]] nb::object forward(nb::handle q, nb::handle k, nb::handle v, Extras extras, const CallRules& rules,
                                 nb::handle seed, nb::handle offset, bool want_lse, nb::handle out);

/// Refuses what `forward` would refuse, and does nothing else.  Outlines are looked at as far as they go: not at what
/// lengths hold, nor at who would run the call.
void check(nb::handle q, nb::handle k, nb::handle v, Extras extras, const CallRules& rules, nb::handle out);

/// Whether these are 4-d, of equal batch and heads in layout "bhsd", without an extent 0 and with contiguous last
/// dimensions: what scaled_dot_product_attention passes on as it is.
[[nodiscard]] bool regular(nb::handle q, nb::handle k, nb::handle v);

/// out of such tensors by rules without dropout, in one step; None for all others.
[[nodiscard]] nb::object forward_regular(nb::handle q, nb::handle k, nb::handle v, const CallRules& rules);

/// (dq, dk, dv, dbias, dalibi_slopes, dsink), the last three None where they are not wanted.
[[nodiscard]] nb::tuple backward(nb::handle dout, nb::handle dlse, nb::handle q, nb::handle k, nb::handle v,
                                 nb::handle out, nb::handle lse, Extras extras, const CallRules& rules, nb::handle seed,
                                 nb::handle offset, int wanted);

/// What projections of a layer's inputs leave: q, k and v of one input side by side in the last dimension of `q`; or q
/// there, and k and v in that of `kv`.  [batch, seqlen, features], [seqlen, batch, features] where not batch_first, or
/// packed [total, features]; densely packed all of them.
struct Projected {
  nb::handle q, kv;  ///< kv may be None
  std::int64_t heads = 0;
  bool batch_first = true;
};

/// (out, lse): out [..., heads · head_dim] with the rows of `q`.
[[nodiscard]] nb::tuple forward_projected(nb::handle q, nb::handle kv, std::int64_t heads, bool batch_first,
                                          Extras extras, const CallRules& rules, nb::handle seed, nb::handle offset);

/// The gradients of `q` and `kv`; None for None.
[[nodiscard]] nb::tuple backward_projected(nb::handle dout, nb::handle q, nb::handle kv, nb::handle out, nb::handle lse,
                                           std::int64_t heads, bool batch_first, Extras extras, const CallRules& rules,
                                           nb::handle seed, nb::handle offset);

/// What the plan of such a call says of itself.
[[nodiscard]] Report explain(bool backward, nb::handle q, nb::handle k, nb::handle v, Extras extras,
                             const CallRules& rules);

}  // namespace fovea::python
