#pragma once

#include <cstdint>

#include "cuda/driver.h"
#include "cuda/params_sm90.h"
#include "cuda/spec.h"

namespace fovea::cuda {

/// The sizes of a tensor of rows, for Hopper's copy engine (TMA).
struct TensorExtent {
  std::int64_t columns, rows, heads, batch;
};
/// Describes a tensor to the copy engine: boxes of `box_rows` rows by one swizzled panel of 128 bytes, 0 outside the
/// tensor.  False where the engine cannot read it: base and strides must be multiples of 16 bytes.  The tensor's GPU
/// must be the thread's current one.
[[nodiscard]] bool make_tensor_map(const RowView& view, Type type, const TensorExtent& extent, int box_rows,
                                   TensorMap& map);

/// The maps of one call's tensors, rows in boxes of `box_rows` and keys in boxes of `box_keys`:
/// [batch][head][row][column].  False where the engine cannot read one of them.
struct CallMaps {
  const CallParams& p;
  CurrentGpu current;  // which some drivers need for encoding
  Type type;
  int box_rows, box_keys;
  bool packed = p.cu_seqlens_q.data != nullptr;  // all sequences are then one tensor to the engine
  int batch = packed ? 1 : p.batch;

  [[nodiscard]] bool of_rows(const RowView& view, int columns, TensorMap& map) const {
    return of_rows(view, columns, box_rows, map);
  }
  [[nodiscard]] bool of_rows(const RowView& view, int columns, int rows, TensorMap& map) const {
    return make_tensor_map(view, type, {columns, packed ? p.total_q : p.seqlen_q, p.q_heads, batch}, rows, map);
  }
  [[nodiscard]] bool of_keys(const RowView& view, int columns, TensorMap& map) const {
    return make_tensor_map(view, type, {columns, packed ? p.total_kv : p.seqlen_kv, p.kv_heads, batch}, box_keys, map);
  }
  /// Keys must be neighbours in memory.  A broadcast dimension has size 1.
  [[nodiscard]] bool of_entries(const EntryView& view, Type of, int rows, TensorMap& map) const;
};

}  // namespace fovea::cuda
