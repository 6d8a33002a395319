#pragma once

#include <fovea/plan.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/reference.h"

namespace fovea::tools {

enum class Data {
  /// Dense and aligned to 64 bytes: what `bench` and `run --problem` time.  Backward, inputs().out and inputs().lse are
  /// outputs().out and outputs().lse: run the forward pass first.
  kPlain,
  /// What `check` tries backends with.  Odd gaps between rows and heads; NaN in every place that no result may depend
  /// on:
  /// gaps, rows and keys past their lengths and, for half of the seeds, all that a band, a mask or a bias of −inf hides
  /// everywhere; now and then a visible NaN, which must not be swallowed, stride-0 dimensions and tensors left out.
  /// Backward, inputs().out and inputs().lse are the oracle's, rounded, so that the backward pass is judged on its own.
  kHostile,
};

/// Host memory in which tensors of a call lie, gaps and all.
struct Allocation {
  std::byte* begin = nullptr;
  std::size_t bytes = 0;
  bool written = false;  ///< by the call
};

/// The tensors of a problem line, filled with random numbers that depend on the seed and the sizes alone.
class Workload {
 public:
  explicit Workload(const Problem& problem, std::uint64_t seed, Data data = Data::kPlain);

  [[nodiscard]] const Problem& problem() const { return problem_; }  ///< random lengths made definite
  [[nodiscard]] const Inputs& inputs() const { return inputs_; }
  [[nodiscard]] const Outputs& outputs() const { return outputs_; }
  [[nodiscard]] std::vector<Allocation> allocations() const;
  void poison_outputs();  ///< NaN everywhere, gaps included

  /// Hostile workloads only: the operands as the oracle reads them, and what it makes of them.
  [[nodiscard]] const cpu::Operands& operands() const { return *operands_; }
  [[nodiscard]] const cpu::Results& exact() const { return *exact_; }

  /// Elements of a tensor as doubles, densely packed.
  [[nodiscard]] static std::vector<double> read(const Tensor& tensor);

  /// What a run has written that it had no right to: "an input", "a gap of an output"; empty if nothing.
  [[nodiscard]] std::string damage() const;

 private:
  struct Buffer : Allocation {
    std::unique_ptr<std::byte[]> memory;
    std::uint64_t checksum = 0;  // of what is not to be written
    std::vector<Tensor> views;
  };
  class Maker;

  Problem problem_;
  Inputs inputs_;
  Outputs outputs_;
  std::vector<Buffer> buffers_;
  std::optional<cpu::Operands> operands_;
  std::optional<cpu::Results> exact_;
};

/// A problem of the same options and head dims for which the oracle has time: of the two sequences with the most rows,
/// and keys, the first `longest` ones.
[[nodiscard]] Problem shortened(Problem problem, std::int64_t longest);

}  // namespace fovea::tools
