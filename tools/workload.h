#pragma once

#include <fovea/plan.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fovea::tools {

/// The tensors of a problem line, filled with random numbers: what `check`, `bench` and `run --problem` work on.  Every
/// place that a result must not depend on is poisoned with NaN: gaps between strides, keys past their length, and outputs.
class Workload {
 public:
  Workload(const Problem& problem, std::uint64_t seed);

  [[nodiscard]] const Problem& problem() const { return problem_; }  ///< random lengths made definite
  [[nodiscard]] const Inputs& inputs() const { return inputs_; }     ///< backward: out and lse point at outputs() of the forward
  [[nodiscard]] const Outputs& outputs() const { return outputs_; }
  void poison_outputs();  ///< NaN everywhere, gaps included

  /// Elements of a tensor of this workload as doubles, densely packed.
  [[nodiscard]] static std::vector<double> read(const Tensor& tensor);

 private:
  Problem problem_;
  Inputs inputs_;
  Outputs outputs_;
  std::vector<std::unique_ptr<std::byte[]>> storage_;
};

}  // namespace fovea::tools
