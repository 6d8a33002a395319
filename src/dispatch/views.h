#pragma once

#include <fovea/tensor.h>

#include <cmath>
#include <cstdint>

#include "math/views.h"

// The views that kernels are called with, made of the caller's tensors, which have been validated.
namespace fovea::dispatch {

/// A stride in bytes.  That of a dimension which nobody walks may be any number, and wraps.
inline i64 byte_stride(const Tensor& t, int axis) {
  return static_cast<i64>(static_cast<u64>(t.strides[axis]) * static_cast<u64>(size_bytes(t.dtype)));
}

/// [batch, seqlen, heads, dim], or packed [rows, heads, dim].
inline RowView row_view(const Tensor& t) {
  if (!t.defined()) return {};
  RowView view{static_cast<char*>(t.data), t.rank == 4 ? byte_stride(t, 0) : 0, byte_stride(t, t.rank - 3),
               byte_stride(t, t.rank - 2), reinterpret_cast<std::uintptr_t>(t.data) % 16 == 0};
  for (int axis = 0; axis + 1 < t.rank; ++axis)
    view.aligned = view.aligned && (t.shape[axis] == 1 || byte_stride(t, axis) % 16 == 0);
  return view;
}

/// [batch, heads, seqlen], or packed [heads, rows].
inline StatView stat_view(const Tensor& t) {
  if (!t.defined()) return {};
  const int head = t.rank - 2;
  return {static_cast<float*>(t.data), head == 0 ? 0 : t.strides[0], t.strides[head], t.strides[head + 1]};
}

/// [batch, heads, seqlen_q, seqlen_kv], any of them 1.
inline EntryView entry_view(const Tensor& t) {
  if (!t.defined()) return {};
  const auto stride = [&t](int axis) { return t.shape[axis] == 1 ? 0 : byte_stride(t, axis); };
  return {static_cast<char*>(t.data), stride(0), stride(1), stride(2), stride(3)};
}

/// Draws below this, of 65536, keep their entry (docs/contract.md, "Dropout bits").
inline u32 keep_threshold(float dropout) {
  return static_cast<u32>(std::lround((1.0 - static_cast<double>(dropout)) * 65536.0));
}

/// fp32 [heads], or [batch, heads].
inline HeadView head_view(const Tensor& t) {
  if (!t.defined()) return {};
  return {static_cast<float*>(t.data), t.rank == 2, t.rank == 2 ? t.strides[0] : 0};
}

}  // namespace fovea::dispatch
