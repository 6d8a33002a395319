#pragma once

#include <vector>

#include "cpu/reference.h"

namespace fovea::tools {

/// How far the elements of one result may be off for the roundings alone that no way of computing them avoids, densely
/// packed.  Both are 0 only where nothing visible contributes to an element.
struct Rounding {
  std::vector<double> computed;  ///< by working in fp32, in units of 2^-24
  std::vector<double> stored;  ///< by keeping weights and their gradients in the problem's dtype, in its unit roundoffs
};

struct Roundings {
  Rounding out, lse;
  Rounding dq, dk, dv, dbias, dalibi_slopes, dsink;
};

/// Follows the formula and counts every rounding of it with the size of what it rounds (docs/contract.md).  own_out:
/// the backward pass is given what a forward pass has computed, and not what is right.
[[nodiscard]] Roundings roundings(const cpu::Operands& operands, const cpu::Results& exact, bool own_out = false);

}  // namespace fovea::tools
