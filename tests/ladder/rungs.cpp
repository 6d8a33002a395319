// The rungs' device text as a CPU runs it (emulator.h): instantiated for what the tests ask.
#include "tests/ladder/rungs.h"

#include "examples/ladder/params.h"

// After it, in the order in which they are compiled for a GPU.
#include "examples/ladder/vocabulary.cuh"

#include "examples/ladder/rung0.cuh"
#include "examples/ladder/rung0_backward.cuh"
#include "examples/ladder/rung1.cuh"
#include "examples/ladder/rung1_backward.cuh"
#include "examples/ladder/rung2.cuh"
#include "examples/ladder/rung3.cuh"
#include "examples/ladder/rung3_backward.cuh"

namespace fovea::ladder {

alignas(128) char memory[kMostShared];  // the kernels' own name for it

namespace {

template <int kDim>
constexpr Spec kSpec{.type = Type::kBFloat16, .mma = Mma::kShuffles, .async_copy = false, .head_dim = kDim};

template <int kDim>
std::map<std::string, Kernel> kernels() {
  constexpr Spec kS = kSpec<kDim>;
  return {{"product<kSpec, Product::kScores>", product<kS, Product::kScores>},
          {"product<kSpec, Product::kOut>", product<kS, Product::kOut>},
          {"product<kSpec, Product::kWeightGradients>", product<kS, Product::kWeightGradients>},
          {"product<kSpec, Product::kDq>", product<kS, Product::kDq>},
          {"product<kSpec, Product::kDk>", product<kS, Product::kDk>},
          {"product<kSpec, Product::kDv>", product<kS, Product::kDv>},
          {"softmax<kSpec>", softmax<kS>},
          {"weights_again<kSpec>", weights_again<kS>},
          {"softmax_gradient<kSpec>", softmax_gradient<kS>},
          {"prepare_backward<kSpec>", prepare_backward<kS>},
          {"finish_dq<kSpec>", finish_dq<kS>},
          {"sliced_forward<kSpec>", sliced_forward<kS>},
          {"sliced_backward<kSpec>", sliced_backward<kS>},
          {"sequence_forward<kSpec>", sequence_forward<kS>},
          {"sequence_backward<kSpec>", sequence_backward<kS>},
          {"split_forward<kSpec>", split_forward<kS>},
          {"split_backward<kSpec>", split_backward<kS>}};
}

}  // namespace

Kernel emulated(const std::string& function, int head_dim) {
  return (head_dim == 64 ? kernels<64>() : kernels<128>()).at(function);
}

std::byte* emulated_shared() { return reinterpret_cast<std::byte*>(memory); }

}  // namespace fovea::ladder
