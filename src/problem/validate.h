#pragma once

#include <fovea/plan.h>

#include <cstdint>
#include <vector>

namespace fovea {

/// Throws Error(kInvalidArgument) unless the tensors are those of the problem: shapes, dtypes, device, contiguous last
/// dimension, no two elements of an output in one place; on the CPU also the values of lengths and cu_seqlens.  Tensors
/// of the other direction are ignored.  Nothing is checked again after this.
void validate_forward(const Problem& problem, const Device& device, const Inputs& inputs, const Outputs& outputs);
void validate_backward(const Problem& problem, const Device& device, const Inputs& inputs, const Outputs& outputs);

/// What a tensor is used for, and so what its strides may be.
enum class Use {
  kInput,      // last dimension contiguous
  kBroadcast,  // an input whose last dimension may also have stride 0
  kStrided,    // an input that is copied first: any
  kOutput,     // contiguous last dimension, and no two elements in one place
};

/// Throws Error(kInvalidArgument) where the elements of a tensor, whose shape has been checked, cannot lie as its data
/// and strides say.
FOVEA_API void check_memory(const char* name, const Tensor& tensor, Use use);

/// The values of an int32 [count] tensor on the CPU; of cu_seqlens the differences, one a sequence.
[[nodiscard]] std::vector<std::int64_t> read_lengths(const char* name, const Tensor& tensor, std::int64_t count);
[[nodiscard]] std::vector<std::int64_t> read_cu_seqlens(const char* name, const Tensor& tensor, std::int64_t batch,
                                                        std::int64_t total);

}  // namespace fovea
