#pragma once

#include "pass.h"

// All of an attention layer on a GPU in one call, its products by cuBLASLt, so that a few microseconds pass between two
// kernels rather than a dispatch of the framework.
namespace fovea::python {

/// What a layer's call has besides its tensors.  `index`, where padding is left out, is what `pack` gave, on the GPU:
/// query is then [batch, seqlen, features] and the key as well.
struct LayerCall {
  std::int64_t heads = 0;
  bool batch_first = true;
  nb::handle extras;
  const CallRules& rules;
  nb::handle seed, offset;
  nb::handle index;
};

/// Gradients that are wanted, as bits.
enum LayerGradients : int { kQuery = 1, kKey = 2, kInWeight = 4, kInBias = 8, kOutWeight = 16, kOutBias = 32 };

/// (y, query's rows, q, kv, out, lse) in fp16 and bf16; key, kv and biases may be None.  None where these tensors, this
/// GPU or its cuBLASLt cannot be served so.
[[nodiscard]] nb::object forward_layer(nb::handle query, nb::handle key, nb::handle in_weight, nb::handle in_bias,
                                       nb::handle out_weight, nb::handle out_bias, const LayerCall& call);

/// The gradients in the order of the bits, None where they are not wanted; `query` is the rows that forward gave.
/// None in place of all of them as before.
[[nodiscard]] nb::object backward_layer(nb::handle dy, nb::handle query, nb::handle key, nb::handle in_weight,
                                        nb::handle out_weight, nb::handle q, nb::handle kv, nb::handle out,
                                        nb::handle lse, const LayerCall& call, int wanted);

/// Why a GPU runs no layer in this way, for any tensors; "" where it does.
[[nodiscard]] std::string why_no_layer(int gpu);

/// Where the rows of a batch stand without its padding; waits for a GPU.  `ignore` is bool [batch, seqlen], dense.
/// Gives int32 [batch + 1 + rows + batch · seqlen] on its device (cu_seqlens, the place of each row, the row of each
/// place or −1), the number of rows, the shortest and the longest sequence.
[[nodiscard]] nb::tuple pack(nb::handle ignore);

}  // namespace fovea::python
