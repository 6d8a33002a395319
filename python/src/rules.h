#pragma once

#include <fovea/options.h>
#include <nanobind/nanobind.h>

namespace fovea::python {

namespace nb = nanobind;

/// Every option of a call that is not a tensor and seldom changes: checked once, then shared by all calls that have it.
struct CallRules : Rules, PlanOptions {
  /// Throws ValueError where a value has the wrong type; the library judges the values themselves.
  CallRules(nb::handle scale, nb::handle corner, nb::handle left, nb::handle right, nb::handle cap,
            nb::handle dropout_p, nb::handle same_bits, nb::handle layout, nb::handle backend_name,
            nb::handle strictly);

  bool heads_first = false;  ///< layout "bhsd": tensors are [batch, heads, seqlen, dim]
};

/// An integer argument; throws ValueError with its name.
[[nodiscard]] std::int64_t to_int64(nb::handle value, const char* name);
[[nodiscard]] std::uint64_t to_uint64(nb::handle value, const char* name);

}  // namespace fovea::python
