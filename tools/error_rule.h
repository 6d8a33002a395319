#pragma once

#include <fovea/plan.h>

#include <span>
#include <string>
#include <vector>

#include "cpu/reference.h"
#include "roundings.h"

namespace fovea::tools {

/// Where a result stands against the error rule of docs/contract.md.
struct Figure {
  std::string name;     ///< "dq"
  double ratio = 0.0;   ///< its error over that of its peers, by the stricter of the two norms
  std::string failure;  ///< one sentence where the rule is broken; otherwise empty
};

/// At most this much larger than that of its peers may an error be.
inline constexpr double kMostRatio = 2.0;

/// One result tensor of a problem: how its peers and a run name it.
struct ResultKind {
  const char* name;
  bool forward;  ///< of the forward pass
  std::vector<double> cpu::Results::*values;
  Rounding Roundings::*rounding;
  Tensor Outputs::*tensor;
};

[[nodiscard]] std::span<const ResultKind> result_kinds();

/// What results of a problem are held against.
struct Peers {
  /// own_out: see `roundings`.
  explicit Peers(const cpu::Operands& operands, cpu::Results results, bool own_out = false);
  DType dtype;
  cpu::Results exact, plain;
  Roundings unavoidable;
};

/// Judges what a run has left in `result`, a tensor of the given kind.
[[nodiscard]] Figure judge(const ResultKind& kind, const Peers& peers, const Tensor& result);

}  // namespace fovea::tools
