// Tiled attention for one instruction set: this file is compiled once for each, with FOVEA_ISA naming the namespace.
#include "cpu/flash/backward.h"
#include "cpu/flash/forward.h"

namespace fovea::cpu::FOVEA_ISA {
namespace {

double multiply_add(i64 rounds) {
  V sums[kAccumulators];
  for (V& sum : sums) sum = splat(1.0F);
  V factor = splat(0.999F), term = splat(0.001F);
  asm volatile(""
               : "+m"(factor), "+m"(term), "+m"(sums));  // values the compiler cannot know, so it cannot fold the loop
  for (i64 i = 0; i < rounds; ++i) {
    FOVEA_UNROLL for (int a = 0; a < kAccumulators; ++a) sums[a] = sums[a] * factor + term;
  }
  asm volatile("" : : "m"(sums));  // the sums are wanted by nobody else
  return 2.0 * kWidth * kAccumulators * static_cast<double>(rounds);
}

}  // namespace

FlashKernels kernels() {
  return {
      .panel_rows = static_cast<int>(kPanelRows),
      .forward_workspace = &Forward::sizes,
      .forward = [](const FlashCall& call, const ForwardShape& shape,
                    std::byte* workspace) { Forward(call, shape, workspace).run(); },
      .backward_workspace = &Backward::sizes,
      .backward = [](const FlashCall& call, const BackwardShape& shape,
                     std::byte* workspace) { Backward(call, shape, workspace).run(); },
      .multiply_add = &multiply_add,
  };
}

}  // namespace fovea::cpu::FOVEA_ISA
