#include <fovea/nn/transformer.h>

#include "nn/attention_state.h"
#include "nn/layout.h"
#include "nn/options.h"
#include "nn/parameters.h"

namespace fovea::nn {
namespace {

using Layer = TransformerEncoderLayer;

/// Places of dropout in a layer: what is added to a call's offset.
constexpr std::uint64_t kAfterAttention = 1, kWithinNetwork = 2, kAfterNetwork = 3, kPlaces = 4;

constexpr std::uint64_t kSeedsOfALayer = 16;  // seeds of initial values that a layer's parts use up, and more

MultiheadAttention::Options attention_options(const Layer::Options& o) {
  check_at_least("d_model", o.d_model, 1);  // by the names that the caller knows
  check_at_least("nhead", o.nhead, 1);
  check_at_least("dim_feedforward", o.dim_feedforward, 1);
  return {.embed_dim = o.d_model,
          .num_heads = o.nhead,
          .dropout = o.dropout,
          .bias = o.bias,
          .batch_first = o.batch_first,
          .num_kv_heads = o.num_kv_heads,
          .head_dim = o.head_dim,
          .window_left = o.window_left,
          .window_right = o.window_right,
          .alibi = o.alibi,
          .rotary = o.rotary,
          .dtype = o.dtype,
          .device = o.device,
          .seed = o.seed};
}

Linear::Options linear_options(const Layer::Options& o, std::int64_t in, std::int64_t out, std::uint64_t seed) {
  return {.in_features = in, .out_features = out, .bias = o.bias, .dtype = o.dtype, .device = o.device, .seed = seed};
}

LayerNorm::Options norm_options(const Layer::Options& o) {
  return {.features = o.d_model, .eps = o.layer_norm_eps, .bias = o.bias, .dtype = o.dtype, .device = o.device};
}

Dropout dropout_of(const Layer::Options& o, const AttentionCall& call, std::uint64_t place) {
  return {call.training ? o.dropout : 0.0F, call.seed, call.offset + place};
}

}  // namespace

struct TransformerEncoderLayer::State {
  Options options;  // of the layer whose forward it is
  Tensor src{};
  AttentionCall call;
  bool to_be_computed_again = false;  // nothing below is there then
  Array src_memory, places;
  std::shared_ptr<const MultiheadAttention::State> attention;
  Array attended;  // src + dropout(attention)
  Array statistics1, statistics2;
  Array normed1, normed2;  // norm_first: what attention and the network read; else norm1's result alone
  Array before, hidden;    // within the network: what the activation saw, what linear2 reads
  Array summed;            // not norm_first: what norm2 reads
};

TransformerEncoderLayer::TransformerEncoderLayer(const Options& options)
    : self_attn(attention_options(options)),
      linear1(linear_options(options, options.d_model, options.dim_feedforward, options.seed + 8)),
      linear2(linear_options(options, options.dim_feedforward, options.d_model, options.seed + 10)),
      norm1(norm_options(options)),
      norm2(norm_options(options)),
      options_(options) {
  check_named("activation", options.activation, Activation::kGelu);
}

void TransformerEncoderLayer::visit(const std::string& prefix, const Visit& visit) {
  self_attn.visit(prefix + "self_attn.", visit);
  linear1.visit(prefix + "linear1.", visit);
  linear2.visit(prefix + "linear2.", visit);
  norm1.visit(prefix + "norm1.", visit);
  norm2.visit(prefix + "norm2.", visit);
}

TransformerEncoderLayer::Result TransformerEncoderLayer::forward(const Tensor& src, const AttentionCall& call) const {
  return or_out_of_memory([&] {
    Result result = compute(src, call);
    if (options_.recompute) {
      auto inputs = std::make_shared<State>();
      inputs->options = options_;
      inputs->src = src;
      inputs->call = call;
      inputs->to_be_computed_again = true;
      result.state = std::move(inputs);
    }
    return result;
  });
}

TransformerEncoderLayer::Result TransformerEncoderLayer::compute(const Tensor& src, const AttentionCall& call) const {
  const Options& o = options_;
  check_parameters(*this);
  check_features("src", src, o.d_model, o.dtype, o.device, 2, 3);
  if (call.need_weights) refuse("need_weights asks for what an encoder layer does not give; call its self_attn");
  auto state = std::make_shared<State>();
  State& s = *state;
  s.options = o;
  s.src = src;
  s.call = call;
  const Tensor src_rows = as_rows(src, s.src_memory);
  if (o.norm_first) s.normed1 = norm1.forward(src, &s.statistics1);
  const Tensor& seen = o.norm_first ? s.normed1.view() : src;
  auto attention =
      self_attn.run(seen, seen, seen, call, {.dropout = dropout_of(o, call, kAfterAttention), .residual = src_rows});
  s.attention = std::move(attention.state);
  s.attended = attention.out;
  s.places = s.attention->q_places;

  Result result;
  if (o.norm_first) {
    s.normed2 = norm2.forward(s.attended.view(), &s.statistics2);
    result.out = feed_forward(s.normed2, s.attended, s);
  } else {
    s.normed1 = norm1.forward(s.attended.view(), &s.statistics1);
    s.summed = feed_forward(s.normed1, s.normed1, s);
    result.out = norm2.forward(s.summed.view(), &s.statistics2);
  }
  result.state = std::move(state);
  return result;
}

/// residual + dropout(linear2(dropout(activation(linear1(x))))).
Array TransformerEncoderLayer::feed_forward(const Array& x, const Array& residual, State& s) const {
  const Options& o = options_;
  const Ops& ops = ops_of(o.device);
  s.before = like(x.view(), o.dim_feedforward);
  s.hidden = like(x.view(), o.dim_feedforward);
  Array out = like(x.view());
  ops.linear(
      rows_of(x), linear1.weight.value.view(),
      {.bias = linear1.bias.value.view(), .activation = o.activation, .dropout = dropout_of(o, s.call, kWithinNetwork)},
      s.places.view(), rows_of(s.hidden), rows_of(s.before));
  ops.linear(rows_of(s.hidden), linear2.weight.value.view(),
             {.bias = linear2.bias.value.view(),
              .dropout = dropout_of(o, s.call, kAfterNetwork),
              .residual = rows_of(residual)},
             s.places.view(), rows_of(out), {});
  return out;
}

Array TransformerEncoderLayer::backward(const State& state, const Tensor& dout) {
  return or_out_of_memory([&] {
    check_parameters(*this);
    check_state(state.options, options_);
    check_features("dout", dout, options_.d_model, options_.dtype, options_.device, 2, 3);
    check_same_rows("dout", dout, "src", state.src);
    const auto again = state.to_be_computed_again ? compute(state.src, state.call).state : nullptr;
    const State& s = again == nullptr ? state : *again;
    const Ops& ops = ops_of(options_.device);

    // The gradient of src + dropout(attention), then of the attention itself.
    Array dattended;
    if (options_.norm_first) {
      const Array dnetwork = feed_forward_backward(s, dout);
      dattended = norm2.backward(s.attended.view(), s.statistics2, dnetwork.view(), dout);
    } else {
      const Array dsummed = norm2.backward(s.summed.view(), s.statistics2, dout);
      const Array dnormed = feed_forward_backward(s, dsummed.view());
      dattended = norm1.backward(s.attended.view(), s.statistics1, dnormed.view());
    }
    const Finish finish{.dropout = dropout_of(options_, s.call, kAfterAttention)};
    Array dattention = dattended;
    if (finish.changes_gradient()) {
      dattention = like(dattended.view());
      ops.finish_gradient(rows_of(dattended), finish, s.places.view(), {}, rows_of(dattention));
    }
    if (!options_.norm_first) return self_attn.gradients(*s.attention, dattention.view(), rows_of(dattended)).query;
    const Array dseen = self_attn.gradients(*s.attention, dattention.view(), {}).query;
    return norm1.backward(s.src, s.statistics1, dseen.view(), dattended.view());
  });
}

/// The gradient of the network's x through the network, and where x is the residual too (not norm_first) through that.
Array TransformerEncoderLayer::feed_forward_backward(const State& s, const Tensor& dout) {
  const Options& o = options_;
  const Ops& ops = ops_of(o.device);
  Array dout_memory;
  const Tensor dout_rows = as_rows(dout, dout_memory);
  const Finish last{.dropout = dropout_of(o, s.call, kAfterNetwork)};
  const Finish within{.activation = o.activation, .dropout = dropout_of(o, s.call, kWithinNetwork)};

  Array after_dropout;
  Tensor dlast = dout_rows;
  if (last.changes_gradient()) {
    after_dropout = like(s.attended.view());
    dlast = rows_of(after_dropout);
    ops.finish_gradient(dout_rows, last, s.places.view(), {}, dlast);
  }
  ops.linear_weight_gradient(dlast, rows_of(s.hidden), linear2.weight.gradient_sum(), linear2.bias.gradient_sum());
  const Array dhidden = like(s.hidden.view());
  ops.linear_input_gradient(dlast, linear2.weight.value.view(), {}, rows_of(dhidden));
  ops.finish_gradient(rows_of(dhidden), within, s.places.view(), rows_of(s.before), rows_of(dhidden));
  const Array& x = o.norm_first ? s.normed2 : s.normed1;
  ops.linear_weight_gradient(rows_of(dhidden), rows_of(x), linear1.weight.gradient_sum(), linear1.bias.gradient_sum());
  Array dx = like(x.view());
  ops.linear_input_gradient(rows_of(dhidden), linear1.weight.value.view(), o.norm_first ? Tensor{} : dout_rows,
                            rows_of(dx));
  return dx;
}

// ---- a stack of them

struct TransformerEncoder::State {
  std::vector<Array> outputs;  // of every layer
  std::vector<std::shared_ptr<const TransformerEncoderLayer::State>> layers;
  Array statistics;
};

TransformerEncoder::TransformerEncoder(const Options& options) : options_(options) {
  check_at_least("num_layers", options.num_layers, 1);
  for (std::int64_t l = 0; l < options.num_layers; ++l) {
    TransformerEncoderLayer::Options layer = options.layer;
    layer.seed += kSeedsOfALayer * static_cast<std::uint64_t>(l);
    or_out_of_memory([&] { layers.emplace_back(layer); });
  }
  if (options.norm) norm.emplace(norm_options(options.layer));
}

void TransformerEncoder::visit(const std::string& prefix, const Visit& visit) {
  for (std::size_t l = 0; l < layers.size(); ++l) layers[l].visit(prefix + "layers." + std::to_string(l) + ".", visit);
  if (norm) norm->visit(prefix + "norm.", visit);
}

TransformerEncoder::Result TransformerEncoder::forward(const Tensor& src, const AttentionCall& call) const {
  return or_out_of_memory([&] {
    check_at_least("num_layers", std::ssize(layers), 1);  // 0 after a move
    auto state = std::make_shared<State>();
    Result result;
    Tensor x = src;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      AttentionCall of_layer = call;
      of_layer.offset += kPlaces * l;
      auto layer = layers[l].forward(x, of_layer);
      result.out = layer.out;
      x = result.out.view();
      if (!call.training) continue;
      state->outputs.push_back(layer.out);
      state->layers.push_back(std::move(layer.state));
    }
    if (norm) result.out = norm->forward(x, &state->statistics);
    if (call.training) result.state = std::move(state);
    return result;
  });
}

Array TransformerEncoder::backward(const State& state, const Tensor& dout) {
  return or_out_of_memory([&] {
    if (state.layers.size() != layers.size()) {
      refuse("the state given to backward has ", state.layers.size(), " layers but this stack ", layers.size(),
             "; give the one that this stack's forward returned");
    }
    for (std::size_t l = 0; l < layers.size(); ++l) {  // before any gradient is added to
      check_parameters(layers[l]);
      check_state(state.layers[l]->options, layers[l].options());
    }
    Array gradient;
    Tensor d = dout;
    if (norm) {
      gradient = norm->backward(state.outputs.back().view(), state.statistics, d);
      d = gradient.view();
    }
    for (std::size_t l = layers.size(); l-- > 0;) {
      gradient = layers[l].backward(*state.layers[l], d);
      d = gradient.view();
    }
    return gradient;
  });
}

}  // namespace fovea::nn
