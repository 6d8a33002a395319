#pragma once

#include <fovea/nn/module.h>

#include "problem/refuse.h"

// What every layer asks of its options.
namespace fovea::nn {

inline void check_at_least(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least) refuse(name, " (", value, ") must be at least ", least);
}

inline void check_dtype(DType dtype) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16) return;
  refuse("a layer's dtype (", name(dtype), ") must be fp32, fp16 or bf16");
}

inline void check_not_negative(const char* name, float value) { check_real(name, value, value >= 0, "at least 0"); }

inline void check_positive(const char* name, float value) { check_real(name, value, value > 0, "above 0"); }

/// Refuses a state whose forward had other options.
void check_state(const auto& options_of_state, const auto& options) {
  if (options_of_state == options) return;
  refuse("the state given to backward is of another layer's forward; give the one that this layer returned");
}

}  // namespace fovea::nn
