#pragma once

#include <fovea/plan.h>

namespace fovea {

/// Throws Error(kInvalidArgument) unless the tensors are those of the problem: shapes, dtypes, device, contiguous last
/// dimension, no zero strides in what is written; on the CPU also the values of lengths and cu_seqlens.  After this nobody
/// checks again.
void validate_forward(const Problem& problem, const Device& device, const Inputs& inputs, const Outputs& outputs);
void validate_backward(const Problem& problem, const Device& device, const Inputs& inputs, const Outputs& outputs);

}  // namespace fovea
