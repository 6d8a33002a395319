// Tiled attention for one instruction set: this file is compiled once for each, with FOVEA_ISA naming the namespace.
#include "cpu/flash/backward.h"
#include "cpu/flash/forward.h"

namespace fovea::cpu::FOVEA_ISA {
namespace {

constexpr Word kBFloat16Word = kHasPairs ? Word::kPair : Word::kFloat;

template <Word kWord>
double run_multiply_adds(i64 rounds) {
#if defined(__AMX_BF16__)
  if constexpr (kWord == Word::kPair) {
    const Tiles tiles;
    for (i64 i = 0; i < rounds; ++i) TileBlock<Init::kZero, 2, 3>::multiply();
    return 2.0 * 16 * 16 * 32 * 6 * static_cast<double>(rounds);
  }
#endif
  V sums[kAccumulators];
  for (V& sum : sums) sum = splat(1.0F);
  V factor = splat(0.999F), term = splat(0.001F);
  asm volatile("" : "+m"(factor), "+m"(term), "+m"(sums));  // now unknown to the compiler, which cannot fold the loop
  for (i64 i = 0; i < rounds; ++i) {
    FOVEA_UNROLL for (int a = 0; a < kAccumulators; ++a) sums[a] =
        kWord == Word::kFloat ? sums[a] * factor + term : multiply_add<kWord>(factor, term, sums[a]);
  }
  asm volatile("" : : "m"(sums));  // the compiler must not drop the sums
  return 2.0 * kWidth * kPerWord<kWord> * kAccumulators * static_cast<double>(rounds);
}

/// Runs a pass with the words that products of this call read.
template <template <Word> class Pass, class Shape>
std::size_t run(const FlashCall& call, const Shape& shape, std::byte* workspace) {
  const auto pass = [&]<Word kWord>() {
    Pass<kWord> run(call, shape, workspace);
    if (workspace != nullptr) run.run();
    return run.workspace_bytes();
  };
  if (shape.pairs) return pass.template operator()<kBFloat16Word>();
  return pass.template operator()<Word::kFloat>();
}

}  // namespace

// No function: on a CPU without this instruction set none of this file's may run.
constinit const FlashKernels kernels = {
    .panel_rows = static_cast<int>(kPanelRows),
    .pairs = kHasPairs,
    .rows_in_place = kHasTiles ? 4 : 16,
    .forward = &run<Forward, ForwardShape>,
    .backward = &run<Backward, BackwardShape>,
    .multiply_add = &run_multiply_adds<Word::kFloat>,
    .multiply_add_pairs = &run_multiply_adds<kBFloat16Word>,
    .exp2 =
        [](float* x, i64 count) {
          [[maybe_unused]] const FlushToZero flush;
          for (i64 i = 0; i < count; i += kWidth) store(x + i, exp2(load(x + i)));
        },
};

}  // namespace fovea::cpu::FOVEA_ISA
