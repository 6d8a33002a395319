#include "nn/parameters.h"

#include "problem/refuse.h"

namespace fovea::nn {
namespace {

std::string described(const Tensor& t) {
  return t.defined() ? std::string(name(t.dtype)) + " " + shape_text(t) + " on " + name(t.device) : "absent";
}

/// Checks parameters of a layer, one by one.
template <typename Options>
class Check {
 public:
  Check(const char* of, const Options& options) : of_(of), options_(options) {}

  void operator()(const char* name, const Parameter& parameter, std::initializer_list<std::int64_t> shape,
                  bool wanted = true) const {
    Tensor like = wanted ? Tensor::contiguous(nullptr, options_.dtype, shape, options_.device) : Tensor{};
    compare(name, "", parameter.value.view(), like);
    like.dtype = DType::kFloat32;
    if (parameter.gradient.defined()) compare(name, "'s gradient", parameter.gradient.view(), like);
  }

 private:
  void compare(const char* name, const char* part, const Tensor& got, const Tensor& like) const {
    if (got.rank == like.rank && got.shape == like.shape && got.dtype == like.dtype && on_one(got.device, like.device))
      return;
    refuse(of_, name, part, " is ", described(got), " but must be ", described(like), ", as the layer was made");
  }

  const char* of_;
  const Options& options_;
};

}  // namespace

void check_held(const Parameter& parameter) {
  if (!parameter.value.defined()) refuse("the layer has been moved from; use the one that it was moved to");
}

void check_parameters(const Linear& layer, const char* of) {
  check_held(layer.weight);
  const Linear::Options& o = layer.options();
  const Check check(of, o);
  check("weight", layer.weight, {o.out_features, o.in_features});
  check("bias", layer.bias, {o.out_features}, o.bias);
}

void check_parameters(const LayerNorm& layer, const char* of) {
  check_held(layer.weight);
  const LayerNorm::Options& o = layer.options();
  const Check check(of, o);
  check("weight", layer.weight, {o.features});
  check("bias", layer.bias, {o.features}, o.bias);
}

void check_parameters(const MultiheadAttention& layer, const char* of) {
  check_held(layer.out_proj_weight);
  const MultiheadAttention::Options& o = layer.options();
  const Check check(of, o);
  const std::int64_t q_size = o.num_heads * *o.head_dim, kv_size = *o.num_kv_heads * *o.head_dim;
  const bool one = *o.kdim == o.embed_dim && *o.vdim == o.embed_dim;
  check("in_proj_weight", layer.in_proj_weight, {q_size + 2 * kv_size, o.embed_dim}, one);
  check("q_proj_weight", layer.q_proj_weight, {q_size, o.embed_dim}, !one);
  check("k_proj_weight", layer.k_proj_weight, {kv_size, *o.kdim}, !one);
  check("v_proj_weight", layer.v_proj_weight, {kv_size, *o.vdim}, !one);
  check("in_proj_bias", layer.in_proj_bias, {q_size + 2 * kv_size}, o.bias);
  check("bias_k", layer.bias_k, {1, 1, kv_size}, o.add_bias_kv);
  check("bias_v", layer.bias_v, {1, 1, kv_size}, o.add_bias_kv);
  check("out_proj.weight", layer.out_proj_weight, {o.embed_dim, q_size});
  check("out_proj.bias", layer.out_proj_bias, {o.embed_dim}, o.bias);
}

void check_parameters(const TransformerEncoderLayer& layer) {
  check_held(layer.linear1.weight), check_held(layer.linear2.weight);
  const TransformerEncoderLayer::Options& o = layer.options();
  const Check check("", o);  // not by the options of its parts, which the caller may have replaced as well
  check("linear1.weight", layer.linear1.weight, {o.dim_feedforward, o.d_model});
  check("linear1.bias", layer.linear1.bias, {o.dim_feedforward}, o.bias);
  check("linear2.weight", layer.linear2.weight, {o.d_model, o.dim_feedforward});
  check("linear2.bias", layer.linear2.bias, {o.d_model}, o.bias);
  check_parameters(layer.self_attn, "self_attn.");
  check_parameters(layer.norm1, "norm1.");
  check_parameters(layer.norm2, "norm2.");
}

}  // namespace fovea::nn
