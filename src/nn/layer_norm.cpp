#include <fovea/nn/layer_norm.h>

#include "nn/initial.h"
#include "nn/layout.h"
#include "nn/options.h"
#include "nn/parameters.h"

namespace fovea::nn {

LayerNorm::LayerNorm(const Options& options) : options_(options) {
  check_at_least("features", options.features, 1);
  check_positive("eps", options.eps);
  check_dtype(options.dtype);
  weight = Parameter(options.dtype, {options.features}, options.device);
  fill_by(weight.value.view(), [](std::int64_t) { return 1.0; });
  if (options.bias) bias = Parameter(options.dtype, {options.features}, options.device);
}

Array LayerNorm::forward(const Tensor& x, Array* statistics) const {
  return or_out_of_memory([&] {
    check_parameters(*this);
    check_features("x", x, options_.features, options_.dtype, options_.device);
    Array dense, y = like(x);
    const Tensor rows = as_rows(x, dense);
    if (statistics != nullptr) *statistics = Array::unset(DType::kFloat32, {rows.shape[0], 2}, x.device);
    ops_of(x.device).norm(rows, weight.value.view(), bias.value.view(), options_.eps, rows_of(y),
                          statistics == nullptr ? Tensor{} : statistics->view());
    return y;
  });
}

Array LayerNorm::backward(const Tensor& x, const Array& statistics, const Tensor& dy, const Tensor& plus) {
  return or_out_of_memory([&] {
    check_parameters(*this);
    check_features("x", x, options_.features, options_.dtype, options_.device);
    check_features("dy", dy, options_.features, options_.dtype, options_.device);
    check_same_rows("dy", dy, "x", x);
    Array dense_x, dense_dy, dense_plus, dx = like(x);
    const Tensor rows = as_rows(x, dense_x);
    const Tensor& known = statistics.view();
    if (known.dtype != DType::kFloat32 || known.rank != 2 || known.shape[0] != rows.shape[0] || known.shape[1] != 2) {
      refuse("statistics is ", fovea::name(known.dtype), " ", shape_text(known), " but must be forward's, fp32 [",
             rows.shape[0], ", 2]");
    }
    check_device("statistics", known.device, "the layer is on", options_.device);
    if (plus.defined()) {
      check_features("plus", plus, options_.features, options_.dtype, options_.device);
      check_same_rows("plus", plus, "x", x);
    }
    ops_of(x.device).norm_gradient(rows, weight.value.view(), statistics.view(), as_rows(dy, dense_dy),
                                   plus.defined() ? as_rows(plus, dense_plus) : Tensor{}, rows_of(dx),
                                   weight.gradient_sum(), bias.gradient_sum());
    return dx;
  });
}

void LayerNorm::visit(const std::string& prefix, const Visit& visit) {
  check_held(weight);
  visit(prefix + "weight", weight);
  if (bias.value.defined()) visit(prefix + "bias", bias);
}

}  // namespace fovea::nn
