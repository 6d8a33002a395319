#pragma once

#include <cstdint>

#include "cuda/driver.h"
#include "cuda/params_sm90.h"
#include "cuda/spec.h"

namespace fovea::cuda {

/// A tensor of rows as Hopper's copy engine is told of it: boxes of `box_rows` rows by one swizzled panel of 128 bytes;
/// what lies outside the tensor arrives as 0.
struct TensorExtent {
  std::int64_t columns, rows, heads, batch;
};
/// False where the engine cannot read the tensor: it wants base and strides in steps of 16 bytes.  The tensor's GPU is
/// the thread's current one.
[[nodiscard]] bool make_tensor_map(const RowView& view, Type type, const TensorExtent& extent, int box_rows,
                                   TensorMap& map);

/// The maps of one call's tensors, rows in boxes of `box_rows` and keys in boxes of `box_keys`:
/// [batch][head][row][column].  False where the engine cannot read one of them.
struct CallMaps {
  const CallParams& p;
  CurrentGpu current;  // some drivers encode for nobody else
  Type type;
  int box_rows, box_keys;
  bool packed = p.cu_seqlens_q.data != nullptr;  // sequences that are one to the engine
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
  /// Where keys are neighbours.  What is broadcast is one to the engine.
  [[nodiscard]] bool of_entries(const EntryView& view, Type of, int rows, TensorMap& map) const;
};

}  // namespace fovea::cuda
