#pragma once

#include <fovea/nn/multihead_attention.h>

#include "nn/layout.h"
#include "nn/masks.h"

namespace fovea::nn {

struct MultiheadAttention::State {
  Options options;                                // of the layer whose forward it is
  Tensor query{}, key{}, value{};                 // as given
  Tensor query_rows{}, key_rows{}, value_rows{};  // [rows, features]
  Array query_memory, key_memory, value_memory;   // where the rows had to be copied
  bool one_input = false, key_is_value = false;   // one_input: and one matrix of weights makes q, k and v of it
  Sequences of_q, of_kv;
  bool alike = false;             // these are the same
  Array q_places, kv_places;      // where rotary embedding or dropout asks
  Array projected, projected_kv;  // q; k and v.  Of one input all three, in `projected`
  Array extended_k, extended_v;   // with bias_k and bias_v behind the keys
  Tensor q{}, k{}, v{};           // as attention takes them
  Array out, lse;                 // [rows, num_heads · head_dim]
  Masks masks;
  Array alibi_slopes, sink;
  bool drops_all = false;  // in training with a dropout of 1
  AttentionOptions attention;
};

struct MultiheadAttention::Tail {
  Dropout dropout{};
  Tensor residual{};  // [rows, embed_dim]
};

}  // namespace fovea::nn
