#pragma once

#include <fovea/plan.h>

#include <array>
#include <cstdint>
#include <vector>

namespace fovea::cpu {

/// Every result of a problem, densely packed in the shapes of `Outputs`; gradients only where the problem goes
/// backward.
struct Results {
  std::vector<double> out, lse;
  std::vector<double> dq, dk, dv, dbias, dalibi_slopes, dsink;
};

/// Where one sequence of the batch lies, and how much of it counts.
struct SequenceRows {
  std::int64_t first_q, slot_q, len_q;     ///< rows [first_q, first_q + slot_q) of q, of which len_q count
  std::int64_t first_kv, slot_kv, len_kv;  ///< likewise of k and v
};

/// A mask or bias: a dense 4-d array, any of whose dimensions may be broadcast.
struct Matrix {
  bool present = false;
  std::vector<double> values;
  std::array<std::int64_t, 4> strides{};  ///< 0 where broadcast
  [[nodiscard]] std::size_t at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    return static_cast<std::size_t>(b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3]);
  }
};

/// The inputs of a problem as doubles, densely packed, and the contract's rules of what they mean.  Rows of q, out and
/// dout are numbered by `q_row`, those of k and v by `kv_row`.
struct Operands {
  Operands(const Problem& problem, const Inputs& inputs);

  Problem problem;
  std::vector<SequenceRows> sequences;  ///< [batch]
  std::vector<double> q, k, v, alibi_slopes, sink, dout, dlse;
  Matrix mask, bias;

  [[nodiscard]] std::int64_t q_row(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return (sequences[b].first_q + i) * problem.num_q_heads + h;
  }
  [[nodiscard]] std::int64_t kv_row(std::int64_t b, std::int64_t h, std::int64_t j) const;  ///< h is the query head
  [[nodiscard]] std::int64_t lse_at(std::int64_t b, std::int64_t h, std::int64_t i) const;
  [[nodiscard]] std::int64_t slope_at(std::int64_t b, std::int64_t h) const;

  [[nodiscard]] double scale() const;
  [[nodiscard]] bool visible(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;
  [[nodiscard]] double distance(std::int64_t b, std::int64_t i, std::int64_t j) const;  ///< that ALiBi multiplies
  /// What dropout multiplies the entry by: 0, or one over the kept probability.
  [[nodiscard]] double dropout(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;

 private:
  std::vector<std::array<std::uint32_t, 4>> streams_;  // [batch, num_q_heads], where there is dropout
};

/// THE ORACLE: attention and its gradients in double precision, O(N²), straight from the formula of docs/contract.md.
/// It shares no code with what it judges: it includes nothing of src/math and decides visibility, dropout and corners
/// itself. Backward it recomputes everything from q, k, v; `inputs.out` and `inputs.lse` are not read.
[[nodiscard]] Results reference(const Operands& operands);
[[nodiscard]] Results reference(const Problem& problem, const Inputs& inputs);

/// Philox of Salmon et al., SC 2011.
[[nodiscard]] std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> counter,
                                                         std::array<std::uint32_t, 2> key);
[[nodiscard]] std::array<std::uint32_t, 2> philox2x32_7(std::array<std::uint32_t, 2> counter, std::uint32_t key);

}  // namespace fovea::cpu
