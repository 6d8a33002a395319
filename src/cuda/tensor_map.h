#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "cuda/driver.h"
#include "cuda/params_sm90.h"
#include "cuda/spec.h"

namespace fovea::cuda {

/// A dimension of a tensor beside its columns: bytes from one to the next, and how many a box has.
struct TensorAxis {
  std::int64_t size, stride;
  int box = 1;
};
/// Describes a tensor to Hopper's copy engine (TMA), innermost axes first: boxes by one swizzled panel of 128 bytes, 0
/// outside the tensor.  False where the engine cannot read it: base and strides must be multiples of 16 bytes.  The
/// tensor's GPU must be the thread's current one.
[[nodiscard]] bool make_tensor_map(char* data, Type type, std::int64_t columns, std::span<const TensorAxis> axes,
                                   TensorMap& map);

/// The maps of one call's tensors, rows in boxes of `box_rows` and keys in boxes of `box_keys`:
/// [batch][head][row][column].  False where the engine cannot read one of them.
struct CallMaps {
  const CallParams& p;
  CurrentGpu current;  // which some drivers need for encoding
  Type type;
  int box_rows, box_keys;
  bool packed = p.cu_seqlens_q.data != nullptr;  // all sequences are then one tensor to the engine
  int batch = packed ? 1 : p.batch, kv_heads = p.kv_heads;

  [[nodiscard]] bool of_rows(const RowView& view, int columns, TensorMap& map) const {
    return of_rows(view, columns, box_rows, map);
  }
  [[nodiscard]] bool of_rows(const RowView& view, int columns, int rows, TensorMap& map) const {
    return of(view, columns, {packed ? p.total_q : p.seqlen_q, view.row, rows}, p.q_heads, map);
  }
  [[nodiscard]] bool of_keys(const RowView& view, int columns, TensorMap& map) const {
    return of(view, columns, {packed ? p.total_kv : p.seqlen_kv, view.row, box_keys}, kv_heads, map);
  }
  /// Rows of `heads` heads in boxes, as if they were 2^bits: [batch][first of these heads][row][head][column].
  [[nodiscard]] bool of_packed_rows(const RowView& view, int columns, int rows, int heads, int bits,
                                    TensorMap& map) const {
    const std::array<TensorAxis, 4> axes{{{heads, view.head, 1 << bits},
                                          {packed ? p.total_q : p.seqlen_q, view.row, rows >> bits},
                                          {p.q_heads - heads + 1, view.head},
                                          {batch, view.batch}}};
    return view.aligned && make_tensor_map(view.data, type, columns, axes, map);
  }
  /// Keys must be neighbours in memory.  A broadcast dimension has size 1.
  [[nodiscard]] bool of_entries(const EntryView& view, Type of, int rows, TensorMap& map) const;

 private:
  [[nodiscard]] bool of(const RowView& view, int columns, const TensorAxis& rows, int heads, TensorMap& map) const {
    const std::array<TensorAxis, 3> axes{{rows, {heads, view.head}, {batch, view.batch}}};
    return view.aligned && make_tensor_map(view.data, type, columns, axes, map);
  }
};

}  // namespace fovea::cuda
