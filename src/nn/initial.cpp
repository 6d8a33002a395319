#include "nn/initial.h"

#include "cpu/elements.h"
#include "math/philox.h"
#include "nn/layout.h"

namespace fovea::nn {
namespace {

/// In [0, 1): number i of the seed's stream.
double uniform(std::uint64_t seed, std::int64_t i) {
  const auto draw = math::dropout_stream(seed, static_cast<std::uint64_t>(i), 0);
  return (static_cast<double>(draw.key) + static_cast<double>(draw.a) * 0x1p-32) * 0x1p-32;
}

}  // namespace

void fill_by(const Tensor& x, const std::function<double(std::int64_t)>& value) {
  const Array host = Array::unset(DType::kFloat32, shape_of(x));
  cpu::for_each_element(
      host.view(), [&](std::int64_t index, std::int64_t offset) { cpu::store(host.view(), offset, value(index)); });
  copy(host.view(), x);
}

void fill_uniform(const Tensor& x, float bound, std::uint64_t seed) {
  fill_by(x, [&](std::int64_t i) { return (2.0 * uniform(seed, i) - 1.0) * static_cast<double>(bound); });
}

void fill_normal(const Tensor& x, float deviation, std::uint64_t seed) {
  constexpr int kTerms = 12;  // of variance 1/12 each
  fill_by(x, [&](std::int64_t i) {
    double sum = -kTerms / 2.0;
    for (int term = 0; term < kTerms; ++term) sum += uniform(seed, i * kTerms + term);
    return sum * static_cast<double>(deviation);
  });
}

}  // namespace fovea::nn
