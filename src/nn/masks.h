#pragma once

#include <fovea/nn/multihead_attention.h>

#include "nn/layout.h"

// torch's masks in attention's terms.
namespace fovea::nn {

/// What a call's masks became: views of the caller's memory where that serves, else arrays of their own.
struct Masks {
  Array mask_memory, bias_memory, lengths_memory;
  Tensor mask{};        ///< bool, true = keep, a broadcast of [batch, heads, seqlen_q, seqlen_kv + extra]
  Tensor bias{};        ///< the same broadcast, fp32 or the layer's dtype
  Tensor kv_lengths{};  ///< int32 [batch], of padding at the ends: in place of a mask, or besides it
};

/// What the layer knows of the attention that it asks for.
struct MaskSizes {
  std::int64_t batch = 0, heads = 0, seqlen_q = 0, seqlen_kv = 0;
  std::int64_t extra = 0;      ///< keys that the layer adds itself, visible to all
  bool lengths_serve = false;  ///< nothing else of the call depends on the true lengths
  DType dtype = DType::kFloat32;
  Device device{};
};

/// Throws Error(kInvalidArgument) where a mask has another shape or dtype than the call's may have.
[[nodiscard]] Masks masks_of(const AttentionCall& call, const MaskSizes& sizes);

}  // namespace fovea::nn
