#pragma once

#include <fovea/nn/transformer.h>

// What layers ask of their parameters, which are the caller's to replace.
namespace fovea::nn {

/// A parameter that every layer of its kind has is absent only where it went with a move.
void check_held(const Parameter& parameter);

/// Throws Error(kInvalidArgument) unless all parameters have the shapes, dtype and device that the layer was made with,
/// their gradients, too: sizes of products are taken from its options.  `of`: "self_attn.".
void check_parameters(const Linear& layer, const char* of = "");
void check_parameters(const LayerNorm& layer, const char* of = "");
void check_parameters(const MultiheadAttention& layer, const char* of = "");
void check_parameters(const TransformerEncoderLayer& layer);

}  // namespace fovea::nn
