#pragma once

#include <span>
#include <string>
#include <vector>

#include "plain.h"
#include "workload.h"

namespace fovea::tools {

/// Where a result stands against the error rule of docs/error_rule.md.
struct Figure {
  std::string name;     ///< "dq"
  double ratio = 0.0;   ///< its error over that of its peers, by the stricter of the two norms
  std::string failure;  ///< one sentence where the rule is broken; otherwise empty
};

/// At most this much larger than that of its peers may an error be.
inline constexpr double kMostRatio = 2.0;

/// One result tensor of a problem: how the oracle, the plain formula and a run name it.
struct ResultKind {
  const char* name;
  bool forward;  ///< of the forward pass
  cpu::Exact cpu::ReferenceResult::*exact;
  std::vector<double> PlainResult::*plain;
  Tensor Outputs::*tensor;
  int roundings;    ///< operations of the formula behind the logits, each of which rounds once
  int for_dropout;  ///< and how many more there are with dropout,
  int for_softcap;  ///< with softcap
};

[[nodiscard]] std::span<const ResultKind> result_kinds();

/// Judges what a run has left in `result`, a tensor of the given kind.
[[nodiscard]] Figure judge(const ResultKind& kind, const Problem& problem, const cpu::Exact& exact,
                           const std::vector<double>& plain, const Tensor& result);

}  // namespace fovea::tools
