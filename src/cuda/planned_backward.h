#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cuda/backward_tuning.h"
#include "cuda/planned_call.h"

namespace fovea::cuda {

/// What the backward plans of all GPU backends do around their main kernel: mask words and row statistics before it;
/// dq, the gradients of slopes and sink, and that of the bias after it.
class BackwardCall {
 public:
  /// order: of the mask's words that the main kernel reads.
  BackwardCall(const Problem& problem, const BackwardShape& shape, const Device& device, int arch,
               WordOrder order = WordOrder::kRows);

  [[nodiscard]] std::size_t workspace_bytes() const {
    return (bias_words_ ? *bias_words_ : mask_words_).workspace_bytes();
  }
  [[nodiscard]] const BackwardShape& shape() const { return shape_; }
  /// The kernels around the main one.
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const;

  [[nodiscard]] BackwardParams params(const Inputs& inputs, const Outputs& outputs, void* workspace) const;
  void before(BackwardParams& p, void* workspace, void* stream) const;
  /// Behind the main kernel, where groups of heads were shared out: dk and dv; from then on p has the groups as given.
  void add_parts(BackwardParams& p, void* stream) const;
  /// has_bias_gradient: the main kernel's family has made it, or its parts where there are several of each tile.
  void after(BackwardParams p, const Outputs& outputs, void* workspace, void* stream,
             bool has_bias_gradient = false) const;
  /// Blocks of the main kernel, which may be none.
  [[nodiscard]] int main_blocks(const BackwardParams& p) const {
    return (p.key_lines + p.dq_parts) * (shape_.turns + p.dq_lag);
  }

 private:
  BackwardShape shape_;
  MaskWords mask_words_;
  std::optional<MaskWords> bias_words_;  // for the bias gradient, where the main kernel wants another order
  PlannedLaunch rows_;
  std::optional<PlannedLaunch> queries_, group_sums_, sums_, bias_, bias_sums_;
  BackwardParams params_{};
};

}  // namespace fovea::cuda
