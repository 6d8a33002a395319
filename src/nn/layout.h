#pragma once

#include "nn/ops.h"

// How layers see what they are given: rows of features, and rows as sequences of heads.
namespace fovea::nn {

/// Throws Error(kInvalidArgument) unless x has the features, dtype and device, in `least` to `most` dimensions.
void check_features(const char* name, const Tensor& x, std::int64_t features, DType dtype, const Device& device,
                    int least = 1, int most = Tensor::kMaxRank);

/// As many extents as x has dimensions.
[[nodiscard]] inline std::span<const std::int64_t> shape_of(const Tensor& x) {
  return std::span(x.shape).first(static_cast<std::size_t>(x.rank));
}

/// Whether the elements lie one behind the other, the last dimension fastest.
[[nodiscard]] bool dense(const Tensor& x);

/// The same elements as [rows, features]: a view where the rows are evenly spaced, else a copy that `owner` keeps.
[[nodiscard]] Tensor as_rows(const Tensor& x, Array& owner);

/// The whole of a dense array as [rows, features].
[[nodiscard]] Tensor rows_of(const Array& x);

/// Throws Error(kInvalidArgument) unless a and b differ in their last dimension at most.
void check_same_rows(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b);

/// Another array of x's shape, or with `features` in the last dimension.
[[nodiscard]] Array like(const Tensor& x, std::int64_t features);
[[nodiscard]] inline Array like(const Tensor& x) { return like(x, x.shape[x.rank - 1]); }

/// [first, first + count) along one dimension.
[[nodiscard]] inline Tensor slice(const Tensor& x, int axis, std::int64_t first, std::int64_t count) {
  Tensor t = x;
  if (!x.defined()) return t;
  t.data = static_cast<std::byte*>(x.data) + first * x.strides[axis] * size_bytes(x.dtype);
  t.shape[axis] = count;
  return t;
}

/// Columns of rows as heads, whatever sequence they are of: [rows, heads, head_dim].
[[nodiscard]] Tensor heads_of_rows(const Tensor& rows, std::int64_t first_column, std::int64_t heads,
                                   std::int64_t head_dim);

/// Which rows of [rows, features] are which sequence.
struct Sequences {
  std::int64_t rows = 0, batch = 1, seqlen = 0;
  bool interleaved = false;  ///< row r is of sequence r % batch: [seqlen, batch, features]
  Tensor cu_seqlens{};       ///< defined: packed; on x's device
  Array memory{};            ///< of cu_seqlens, where that is a GPU

  [[nodiscard]] bool packed() const { return cu_seqlens.defined(); }

  /// Of x as a layer takes it.  Throws Error(kInvalidArgument) where cu_seqlens and x do not fit.
  [[nodiscard]] static Sequences of(const char* name, const Tensor& x, const Tensor& cu_seqlens, bool batch_first);

  /// [rows, heads · head_dim] as attention takes it: [batch, seqlen, heads, head_dim], or packed [rows, heads, dim].
  [[nodiscard]] Tensor heads(const Tensor& x, std::int64_t heads, std::int64_t head_dim) const;

  [[nodiscard]] Array places(const Device& device) const;
};

}  // namespace fovea::nn
