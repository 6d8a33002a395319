#pragma once

#include <cstdint>

#include "cuda/params_sm90.h"
#include "cuda/spec.h"

namespace fovea::cuda {

/// A tensor of 16-bit rows as Hopper's copy engine is told of it: boxes of `box_rows` rows by one swizzled panel of 64
/// columns; what lies outside the tensor arrives as 0.
struct TensorExtent {
  std::int64_t columns, rows, heads, batch;
};
/// False where the engine cannot read the tensor: it wants base and strides in steps of 16 bytes.  The tensor's GPU is
/// the thread's current one.
[[nodiscard]] bool make_tensor_map(const RowView& view, Type type, const TensorExtent& extent, int box_rows,
                                   TensorMap& map);

}  // namespace fovea::cuda
