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
  asm volatile(""
               : "+m"(factor), "+m"(term), "+m"(sums));  // values the compiler cannot know, so it cannot fold the loop
  for (i64 i = 0; i < rounds; ++i) {
    FOVEA_UNROLL for (int a = 0; a < kAccumulators; ++a) sums[a] =
        kWord == Word::kFloat ? sums[a] * factor + term : multiply_add<kWord>(factor, term, sums[a]);
  }
  asm volatile("" : : "m"(sums));  // the sums are wanted by nobody else
  return 2.0 * kWidth * kPerWord<kWord> * kAccumulators * static_cast<double>(rounds);
}

/// Calls f with the words that products of this call read, as a constant.
template <Word kWord>
struct WordConstant {
  static constexpr Word kValue = kWord;
};
template <class F>
auto with_word(const FlashCall& call, const F& f) {
  if (call.type == Element::kBFloat16) return f(WordConstant<kBFloat16Word>{});
  return f(WordConstant<Word::kFloat>{});
}

}  // namespace

FlashKernels kernels() {
  return {
      .panel_rows = static_cast<int>(kPanelRows),
      .pairs = kHasPairs,
      .forward_workspace =
          [](const FlashCall& call, const ForwardShape& shape) {
            return with_word(call, [&](auto word) { return Forward<word.kValue>::sizes(call, shape); });
          },
      .forward =
          [](const FlashCall& call, const ForwardShape& shape, std::byte* workspace) {
            with_word(call, [&](auto word) { Forward<word.kValue>(call, shape, workspace).run(); });
          },
      .backward_workspace =
          [](const FlashCall& call, const BackwardShape& shape) {
            return with_word(call, [&](auto word) { return Backward<word.kValue>::sizes(call, shape); });
          },
      .backward =
          [](const FlashCall& call, const BackwardShape& shape, std::byte* workspace) {
            with_word(call, [&](auto word) { Backward<word.kValue>(call, shape, workspace).run(); });
          },
      .multiply_add = &run_multiply_adds<Word::kFloat>,
      .multiply_add_pairs = &run_multiply_adds<kBFloat16Word>,
      .exp2 =
          [](float* x, i64 count) {
            for (i64 i = 0; i < count; i += kWidth) store(x + i, exp2(load(x + i)));
          },
  };
}

}  // namespace fovea::cpu::FOVEA_ISA
