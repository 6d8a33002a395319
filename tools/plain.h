#pragma once

#include "cpu/reference.h"

namespace fovea::tools {

/// The unfused formula in the problem's own dtype, as one writes it with whole matrices and automatic differentiation:
/// S, P, dP and dS stand in memory head by head, every elementwise result is rounded to the dtype, matrix products and
/// softmax work in fp32 and round once.  lse comes from scores in fp32, because the contract promises fp32 statistics.
/// The peer of the error rule (docs/contract.md), nothing else: it takes visibility and dropout from the oracle.
[[nodiscard]] cpu::Results plain(const cpu::Operands& operands);

}  // namespace fovea::tools
