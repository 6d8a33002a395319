#pragma once

#include <fovea/nn/module.h>

// What parameters are before anything is learned or loaded.
namespace fovea::nn {

/// Uniform within ±bound, element by element from the seed.
void fill_uniform(const Tensor& x, float bound, std::uint64_t seed);

/// Nearly standard normal, scaled.
void fill_normal(const Tensor& x, float deviation, std::uint64_t seed);

/// value(i) for the element that is number i; made on the host, wherever x lies.
void fill_by(const Tensor& x, const std::function<double(std::int64_t)>& value);

}  // namespace fovea::nn
