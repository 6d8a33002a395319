#pragma once

#include "math/fn.h"

// Where a kernel finds what its caller's tensors hold.  Plain values; data null: not given, or not wanted.
namespace fovea {

using math::i64;
using math::u32;
using math::u64;

/// Rows of head_dim elements; strides in bytes.  Packed problems have batch stride 0.  `aligned`: every row begins at a
/// multiple of 16 bytes.
struct RowView {
  char* data = nullptr;
  i64 batch = 0, row = 0, head = 0;
  bool aligned = false;
};

/// fp32 statistics, lse and its like; strides in elements.
struct StatView {
  float* data = nullptr;
  i64 batch = 0, head = 0, row = 0;
};

/// A mask or bias; strides in bytes, 0 where broadcast.
struct EntryView {
  char* data = nullptr;
  i64 batch = 0, head = 0, query = 0, key = 0;
};
/// A bias below this is −infinity in units of log2, and hides; the lowest numbers of float32 and bfloat16 are below it.
inline constexpr float kLowestBias = -2.3586575e38F;

/// One fp32 value a head: ALiBi slopes, sinks, their gradients; `batch` is the stride where each batch has its own.
struct HeadView {
  float* data = nullptr;
  bool per_batch = false;
  i64 batch = 0;
};

}  // namespace fovea
