#pragma once

#include <fovea/options.h>
#include <nanobind/nanobind.h>

namespace fovea::python {

namespace nb = nanobind;

/// Every option of a call that is not a tensor and seldom changes: checked once, then shared by all calls that have it.
struct CallRules : Rules, PlanOptions {
  /// Throws ValueError where a value has the wrong type; the library judges the values themselves.
  CallRules(nb::handle softmax_scale, nb::handle causal, nb::handle window_left, nb::handle window_right,
            nb::handle softcap, nb::handle dropout_p, nb::handle deterministic, nb::handle layout, nb::handle backend,
            nb::handle strict);

  bool heads_first = false;  ///< layout "bhsd": tensors are [batch, heads, seqlen, dim]
};

/// An integer argument; throws ValueError with its name.
[[nodiscard]] std::int64_t to_int64(nb::handle value, const char* name);
[[nodiscard]] std::uint64_t to_uint64(nb::handle value, const char* name);

}  // namespace fovea::python
