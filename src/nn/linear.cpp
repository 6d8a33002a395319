#include <fovea/nn/linear.h>

#include <cmath>

#include "nn/initial.h"
#include "nn/layout.h"
#include "nn/options.h"
#include "nn/parameters.h"
#include "problem/refuse.h"

namespace fovea::nn {

Linear::Linear(const Options& options) : options_(options) {
  check_at_least("in_features", options.in_features, 1);
  check_at_least("out_features", options.out_features, 1);
  check_dtype(options.dtype);
  const float bound = 1.0F / std::sqrt(static_cast<float>(options.in_features));
  weight = Parameter(options.dtype, {options.out_features, options.in_features}, options.device);
  fill_uniform(weight.value.view(), bound, options.seed);
  if (!options.bias) return;
  bias = Parameter(options.dtype, {options.out_features}, options.device);
  fill_uniform(bias.value.view(), bound, options.seed + 1);
}

Array Linear::forward(const Tensor& x) const {
  return or_out_of_memory([&] {
    check_parameters(*this);
    check_features("x", x, options_.in_features, options_.dtype, options_.device);
    Array dense, y = like(x, options_.out_features);
    ops_of(x.device).linear(as_rows(x, dense), weight.value.view(), {.bias = bias.value.view()}, {}, rows_of(y), {});
    return y;
  });
}

Array Linear::backward(const Tensor& x, const Tensor& dy) {
  return or_out_of_memory([&] {
    check_parameters(*this);
    check_features("x", x, options_.in_features, options_.dtype, options_.device);
    check_features("dy", dy, options_.out_features, options_.dtype, options_.device);
    check_same_rows("dy", dy, "x", x);
    Array dense_x, dense_dy, dx = like(x);
    const Tensor rows = as_rows(dy, dense_dy);
    const Ops& ops = ops_of(x.device);
    ops.linear_weight_gradient(rows, as_rows(x, dense_x), weight.gradient_sum(), bias.gradient_sum());
    ops.linear_input_gradient(rows, weight.value.view(), {}, rows_of(dx));
    return dx;
  });
}

void Linear::visit(const std::string& prefix, const Visit& visit) {
  check_held(weight);
  visit(prefix + "weight", weight);
  if (bias.value.defined()) visit(prefix + "bias", bias);
}

}  // namespace fovea::nn
