#include <fovea/nn/multihead_attention.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch/views.h"
#include "nn/attention_state.h"
#include "nn/initial.h"
#include "nn/options.h"
#include "nn/parameters.h"

namespace fovea::nn {
namespace {

constexpr std::int64_t kLargestHeadDim = 512, kMostHeads = std::int64_t{1} << 40;  // whose product is far below 2^63

bool same(const Tensor& a, const Tensor& b) {
  return a.data == b.data && a.rank == b.rank && a.shape == b.shape && a.strides == b.strides;
}

MultiheadAttention::Options completed(MultiheadAttention::Options o) {
  check_at_least("embed_dim", o.embed_dim, 1);
  check_at_least("num_heads", o.num_heads, 1);
  if (o.num_heads > kMostHeads) refuse("num_heads (", o.num_heads, ") must be at most 2^40");
  check_real("dropout", o.dropout, o.dropout >= 0 && o.dropout <= 1, "0 to 1");
  check_at_least("window_left", o.window_left.value_or(0), 0);
  check_at_least("window_right", o.window_right.value_or(0), 0);
  check_dtype(o.dtype);
  if (!o.head_dim && o.embed_dim % o.num_heads != 0) {
    refuse("embed_dim (", o.embed_dim, ") must be a multiple of num_heads (", o.num_heads, "), or head_dim be given");
  }
  o.head_dim = o.head_dim.value_or(o.embed_dim / o.num_heads);
  if (*o.head_dim < 1 || *o.head_dim > kLargestHeadDim) {
    refuse("head_dim (", *o.head_dim, ") must be 1 to ", kLargestHeadDim);
  }
  o.num_kv_heads = o.num_kv_heads.value_or(o.num_heads);
  check_at_least("num_kv_heads", *o.num_kv_heads, 1);
  if (o.num_heads % *o.num_kv_heads != 0) {
    refuse("num_heads (", o.num_heads, ") must be a multiple of num_kv_heads (", *o.num_kv_heads, ")");
  }
  o.kdim = o.kdim.value_or(o.embed_dim);
  o.vdim = o.vdim.value_or(o.embed_dim);
  check_at_least("kdim", *o.kdim, 1);
  check_at_least("vdim", *o.vdim, 1);
  if (o.rotary) {
    if (o.rotary->dim == 0) o.rotary->dim = *o.head_dim;
    check_positive("rotary base", o.rotary->base);
    if (o.rotary->dim < 2 || o.rotary->dim % 2 != 0 || o.rotary->dim > *o.head_dim) {
      refuse("rotary dim (", o.rotary->dim, ") must be even, 2 to head_dim (", *o.head_dim, ")");
    }
  }
  if (o.add_bias_kv && (o.alibi || o.rotary || o.window_left || o.window_right)) {
    refuse("add_bias_kv adds a key that stands nowhere; use it without alibi, rotary and window");
  }
  return o;
}

Array slopes_of_heads(std::int64_t heads, const Device& device) {
  Array slopes = Array::unset(DType::kFloat32, {heads}, device);
  fill_by(slopes.view(),
          [&](std::int64_t h) { return std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(heads)); });
  return slopes;
}

/// Keys [batch, seqlen, heads, head_dim] with one more at the end of each sequence.
Array extended(const Tensor& keys, const Tensor& more) {
  Array longer =
      Array::unset(keys.dtype, {keys.shape[0], keys.shape[1] + 1, keys.shape[2], keys.shape[3]}, keys.device);
  const Ops& ops = ops_of(keys.device);
  ops.copy(keys, slice(longer.view(), 1, 0, keys.shape[1]));
  const Tensor last = slice(longer.view(), 1, keys.shape[1], 1);
  Tensor row = more;  // [1, 1, heads · head_dim]
  row.rank = 4;
  row.shape = last.shape;
  row.strides = {0, 0, keys.shape[3], 1};
  ops.copy(row, last);
  return longer;
}

/// The gradient of `extended`: writes that of the keys, and adds to that of the extra one.
void split_gradient(const Tensor& longer, const Tensor& dkeys, const Tensor& dmore) {
  const Ops& ops = ops_of(longer.device);
  ops.copy(slice(longer, 1, 0, dkeys.shape[1]), dkeys);
  Tensor last = slice(longer, 1, dkeys.shape[1], 1);
  last.rank = 2;
  last.shape = {longer.shape[0], longer.shape[2] * longer.shape[3]};
  last.strides = {longer.strides[0], 1};
  ops.add_rows(last, dmore);
}

}  // namespace

MultiheadAttention::MultiheadAttention(const Options& options) : options_(completed(options)) {
  const Options& o = options_;
  const std::int64_t q_size = o.num_heads * *o.head_dim, kv_size = *o.num_kv_heads * *o.head_dim;
  std::uint64_t seed = o.seed;
  const auto weight = [&](Parameter& parameter, std::int64_t rows, std::int64_t columns) {
    parameter = Parameter(o.dtype, {rows, columns}, o.device);
    fill_uniform(parameter.value.view(), std::sqrt(6.0F / static_cast<float>(rows + columns)), seed++);
  };
  if (*o.kdim == o.embed_dim && *o.vdim == o.embed_dim) {
    weight(in_proj_weight, q_size + 2 * kv_size, o.embed_dim);
  } else {
    weight(q_proj_weight, q_size, o.embed_dim);
    weight(k_proj_weight, kv_size, *o.kdim);
    weight(v_proj_weight, kv_size, *o.vdim);
  }
  if (o.bias) in_proj_bias = Parameter(o.dtype, {q_size + 2 * kv_size}, o.device);
  if (o.add_bias_kv) {
    for (Parameter* parameter : {&bias_k, &bias_v}) {
      *parameter = Parameter(o.dtype, {1, 1, kv_size}, o.device);
      fill_normal(parameter->value.view(), 1.0F / std::sqrt(static_cast<float>(kv_size)), seed++);
    }
  }
  out_proj_weight = Parameter(o.dtype, {o.embed_dim, q_size}, o.device);
  fill_uniform(out_proj_weight.value.view(), 1.0F / std::sqrt(static_cast<float>(q_size)), seed++);
  if (o.bias) out_proj_bias = Parameter(o.dtype, {o.embed_dim}, o.device);
  if (o.alibi) alibi_slopes_ = slopes_of_heads(o.num_heads, o.device);
}

void MultiheadAttention::visit(const std::string& prefix, const Visit& visit) {
  check_held(out_proj_weight);
  const std::pair<const char*, Parameter*> all[] = {{"in_proj_weight", &in_proj_weight},
                                                    {"q_proj_weight", &q_proj_weight},
                                                    {"k_proj_weight", &k_proj_weight},
                                                    {"v_proj_weight", &v_proj_weight},
                                                    {"in_proj_bias", &in_proj_bias},
                                                    {"bias_k", &bias_k},
                                                    {"bias_v", &bias_v},
                                                    {"out_proj.weight", &out_proj_weight},
                                                    {"out_proj.bias", &out_proj_bias}};
  for (const auto& [name, parameter] : all) {
    if (parameter->value.defined()) visit(prefix + name, *parameter);
  }
}

// ---- the steps of forward and backward

namespace {

/// One product with a part of the input weights, which makes some columns of q, k and v.
struct Projection {
  Tensor input{};           // [rows, features]
  Tensor weight{}, bias{};  // [columns, features], [columns]
  Tensor output{};          // [rows, columns]
};

/// The weights of q, k and v, and where in the bias theirs begins.
struct InputWeights {
  Tensor q{}, k{}, v{}, kv{}, qkv{}, bias{};  // kv and qkv where one matrix holds them
  std::int64_t q_size = 0, kv_size = 0;

  [[nodiscard]] Tensor bias_part(std::int64_t first, std::int64_t count) const { return slice(bias, 0, first, count); }
};

InputWeights input_weights(const MultiheadAttention::Options& o, const Tensor& in_proj, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& bias) {
  InputWeights w{.q = q, .k = k, .v = v, .bias = bias};
  w.q_size = o.num_heads * *o.head_dim;
  w.kv_size = *o.num_kv_heads * *o.head_dim;
  if (!in_proj.defined()) return w;
  w.q = slice(in_proj, 0, 0, w.q_size);
  w.k = slice(in_proj, 0, w.q_size, w.kv_size);
  w.v = slice(in_proj, 0, w.q_size + w.kv_size, w.kv_size);
  w.kv = slice(in_proj, 0, w.q_size, 2 * w.kv_size);
  w.qkv = in_proj;
  return w;
}

/// As few products as the inputs allow.  `q` is [rows, q_size], or with one input all of q, k and v; `kv` is k and v.
std::vector<Projection> projections(const MultiheadAttention::State& s, const InputWeights& w, const Tensor& q,
                                    const Tensor& kv) {
  if (s.one_input) return {{s.query_rows, w.qkv, w.bias, q}};
  std::vector<Projection> all{{s.query_rows, w.q, w.bias_part(0, w.q_size), q}};
  if (s.key_is_value && w.kv.defined()) {
    all.push_back({s.key_rows, w.kv, w.bias_part(w.q_size, 2 * w.kv_size), kv});
  } else {
    all.push_back({s.key_rows, w.k, w.bias_part(w.q_size, w.kv_size), slice(kv, 1, 0, w.kv_size)});
    all.push_back(
        {s.value_rows, w.v, w.bias_part(w.q_size + w.kv_size, w.kv_size), slice(kv, 1, w.kv_size, w.kv_size)});
  }
  return all;
}

/// q, k and v as views of the projections' results.
struct Placed {
  Tensor q{}, k{}, v{};       // as attention takes them
  Tensor q_rows{}, k_rows{};  // [rows, heads, head_dim], for the rotary embedding
};

Placed place(const MultiheadAttention::State& s, const Tensor& q, const Tensor& kv) {
  const MultiheadAttention::Options& o = s.options;
  const std::int64_t dim = *o.head_dim, heads = o.num_heads, kv_heads = *o.num_kv_heads;
  const Tensor& from = s.one_input ? q : kv;
  const std::int64_t k_at = s.one_input ? heads * dim : 0, v_at = k_at + kv_heads * dim;
  return {.q = s.of_q.heads(slice(q, 1, 0, heads * dim), heads, dim),
          .k = s.of_kv.heads(slice(from, 1, k_at, kv_heads * dim), kv_heads, dim),
          .v = s.of_kv.heads(slice(from, 1, v_at, kv_heads * dim), kv_heads, dim),
          .q_rows = heads_of_rows(q, 0, heads, dim),
          .k_rows = heads_of_rows(from, k_at, kv_heads, dim)};
}

/// Checks the inputs, and sees them as rows and as sequences.
void take_inputs(MultiheadAttention::State& s, const Tensor& query, const Tensor& key, const Tensor& value,
                 const AttentionCall& call, bool one_weight) {
  const MultiheadAttention::Options& o = s.options;
  check_features("query", query, o.embed_dim, o.dtype, o.device, 2, 3);
  check_features("key", key, *o.kdim, o.dtype, o.device, 2, 3);
  check_features("value", value, *o.vdim, o.dtype, o.device, 2, 3);
  check_same_rows("key", key, "value", value);
  s.query = query, s.key = key, s.value = value;
  s.query_rows = as_rows(query, s.query_memory);
  s.key_is_value = same(key, value);
  s.one_input = s.key_is_value && same(query, key) && one_weight;
  s.key_rows = same(query, key) ? s.query_rows : as_rows(key, s.key_memory);
  s.value_rows = s.key_is_value ? s.key_rows : as_rows(value, s.value_memory);

  const Tensor& ends_kv = call.cu_seqlens_kv.defined() || !same(query, key) ? call.cu_seqlens_kv : call.cu_seqlens_q;
  if (call.cu_seqlens_q.defined() != ends_kv.defined())
    refuse("cu_seqlens_q and cu_seqlens_kv must both be given, or neither");
  s.of_q = Sequences::of("query", query, call.cu_seqlens_q, o.batch_first);
  s.alike = same(query, key) && same(ends_kv, call.cu_seqlens_q);
  s.of_kv = s.alike ? s.of_q : Sequences::of("key", key, ends_kv, o.batch_first);
  if (s.of_q.batch != s.of_kv.batch) {
    refuse("query has ", s.of_q.batch, " sequences but key has ", s.of_kv.batch, "; they must agree");
  }
  if (s.of_q.packed() && (call.attn_mask.defined() || call.key_padding_mask.defined() || call.need_weights)) {
    refuse("packed sequences take neither attn_mask, key_padding_mask nor need_weights; pad the batch for those");
  }
  if (o.add_bias_kv && (s.of_q.packed() || call.causal != Causal::kNone)) {
    refuse("add_bias_kv adds a key that stands nowhere; give the causal triangle as attn_mask, and pad the batch");
  }
}

/// q, k and v, with rotary embedding.
void project(MultiheadAttention::State& s, const InputWeights& w) {
  const MultiheadAttention::Options& o = s.options;
  const Ops& ops = ops_of(o.device);
  s.projected = Array::unset(o.dtype, {s.of_q.rows, w.q_size + (s.one_input ? 2 * w.kv_size : 0)}, o.device);
  if (!s.one_input) s.projected_kv = Array::unset(o.dtype, {s.of_kv.rows, 2 * w.kv_size}, o.device);
  for (const Projection& p : projections(s, w, s.projected.view(), s.projected_kv.view())) {
    ops.linear(p.input, p.weight, {.bias = p.bias}, {}, p.output, {});
  }
  const Placed placed = place(s, s.projected.view(), s.projected_kv.view());
  s.q = placed.q, s.k = placed.k, s.v = placed.v;
  if (!o.rotary) return;
  ops.rotate(placed.q_rows, *o.rotary, s.q_places.view(), false);
  ops.rotate(placed.k_rows, *o.rotary, s.kv_places.view(), false);
}

/// The options that attention is called with.
void set_options(MultiheadAttention::State& s, const AttentionCall& call) {
  const MultiheadAttention::Options& o = s.options;
  AttentionOptions& a = s.attention;
  a.causal = call.causal;
  a.window_left = o.window_left, a.window_right = o.window_right;
  s.drops_all = call.training && dispatch::keep_threshold(o.dropout) == 0;  // attention itself keeps some
  if (call.training && !s.drops_all) a.dropout = {o.dropout, call.seed, call.offset};
  const bool band = o.window_left || o.window_right || o.alibi || call.causal == Causal::kBottomRight;
  s.masks = masks_of(call, {.batch = s.of_q.batch,
                            .heads = o.num_heads,
                            .seqlen_q = s.of_q.seqlen,
                            .seqlen_kv = s.of_kv.seqlen,
                            .extra = o.add_bias_kv ? 1 : 0,
                            .lengths_serve = !band,
                            .dtype = o.dtype,
                            .device = o.device});
  a.mask = s.masks.mask, a.bias = s.masks.bias, a.kv_lengths = s.masks.kv_lengths;
  if (o.add_zero_attn) s.sink = Array(DType::kFloat32, {o.num_heads}, o.device);  // a key of score 0 without a value
  a.alibi_slopes = s.alibi_slopes.view(), a.sink = s.sink.view();
  a.cu_seqlens_q = s.of_q.cu_seqlens, a.cu_seqlens_kv = s.of_kv.cu_seqlens;
  if (s.of_q.packed()) a.max_seqlen_q = s.of_q.seqlen, a.max_seqlen_kv = s.of_kv.seqlen;
}

/// The attention weights themselves, tile of keys by tile of keys: with the columns of a unit matrix as values, out is
/// the weights, masks, dropout and all.
Array weights_of(const MultiheadAttention::State& s, bool average) {
  const MultiheadAttention::Options& o = s.options;
  const std::int64_t batch = s.of_q.batch, rows = s.of_q.seqlen, keys = s.k.shape[1], heads = o.num_heads;
  const std::int64_t all = keys + (o.add_zero_attn ? 1 : 0), tile = std::clamp<std::int64_t>(keys, 1, kLargestHeadDim);
  const Ops& ops = ops_of(o.device);
  // Without the batch dimension where query has none, as torch's.
  std::vector<std::int64_t> shape{batch, heads, rows, all};
  if (average) shape.erase(shape.begin() + 1);
  if (s.query.rank == 2) shape.erase(shape.begin());
  Array result = Array::unset(o.dtype, shape, o.device);
  // Adds columns [first, first + count) of x [batch, rows, heads, count].
  const auto put = [&](const Tensor& x, std::int64_t first, std::int64_t count) {
    Tensor to = average ? Tensor::contiguous(result.view().data, o.dtype, {batch, rows, all}, o.device)
                        : Tensor::contiguous(result.view().data, o.dtype, {batch, heads, rows, all}, o.device);
    to = slice(to, to.rank - 1, first, count);
    const Tensor from = slice(x, 3, 0, count);
    if (average) {
      ops.mean_of_heads(from, to);
    } else {
      ops.copy(from.transposed(1, 2), to);
    }
  };
  const Array unit = Array::unset(o.dtype, {std::max<std::int64_t>(keys, 1), tile}, o.device);
  const Array out = Array::unset(o.dtype, {batch, rows, heads, tile}, o.device);
  Tensor values = unit.view();
  values.rank = 4;
  values.shape = {s.k.shape[0], keys, s.k.shape[2], tile};
  values.strides = {0, tile, 0, 1};
  for (std::int64_t first = 0; first < keys; first += tile) {
    ops.diagonal(unit.view(), s.drops_all ? keys : first);  // behind the last row: no ones at all
    attend(s.q, s.k, values, s.attention, out.view(), {});
    put(out.view(), first, std::min(tile, keys - first));
  }
  if (o.add_zero_attn) {
    const Array zero = Array::unset(DType::kFloat32, {batch, heads, rows}, o.device);
    ops.weight_of_zero(s.lse.view(), zero.view());
    Tensor column = zero.view();
    column.rank = 4;
    column.shape = {batch, rows, heads, 1};
    column.strides = {heads * rows, 1, rows, 1};
    put(column, keys, 1);
  }
  return result;
}

}  // namespace

MultiheadAttention::Result MultiheadAttention::forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                       const AttentionCall& call) const {
  return or_out_of_memory([&] { return run(query, key, value, call, {}); });
}

MultiheadAttention::Result MultiheadAttention::run(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   const AttentionCall& call, const Tail& tail) const {
  check_parameters(*this);
  const Options& o = options_;
  auto state = std::make_shared<State>();
  State& s = *state;
  s.options = o, s.alibi_slopes = alibi_slopes_;  // held: the layer may go before its state
  take_inputs(s, query, key, value, call, in_proj_weight.value.defined());
  if (o.rotary || tail.dropout.probability > 0.0F) s.q_places = s.of_q.places(o.device);
  if (o.rotary) s.kv_places = s.alike ? s.q_places : s.of_kv.places(o.device);
  project(s, input_weights(o, in_proj_weight.value.view(), q_proj_weight.value.view(), k_proj_weight.value.view(),
                           v_proj_weight.value.view(), in_proj_bias.value.view()));
  if (o.add_bias_kv) {
    s.extended_k = extended(s.k, bias_k.value.view());
    s.extended_v = extended(s.v, bias_v.value.view());
    s.k = s.extended_k.view(), s.v = s.extended_v.view();
  }
  set_options(s, call);
  s.out = Array::unset(o.dtype, {s.of_q.rows, o.num_heads * *o.head_dim}, o.device);
  s.lse = s.of_q.packed() ? Array::unset(DType::kFloat32, {o.num_heads, s.of_q.rows}, o.device)
                          : Array::unset(DType::kFloat32, {s.of_q.batch, o.num_heads, s.of_q.seqlen}, o.device);
  attend(s.q, s.k, s.v, s.attention, s.of_q.heads(s.out.view(), o.num_heads, *o.head_dim), s.lse.view());
  if (s.drops_all) ops_of(o.device).clear(s.out.view().data, s.out.size_bytes());

  Result result;
  result.out = like(query);
  ops_of(o.device).linear(s.out.view(), out_proj_weight.value.view(),
                          {.bias = out_proj_bias.value.view(), .dropout = tail.dropout, .residual = tail.residual},
                          s.q_places.view(), rows_of(result.out), {});
  if (call.need_weights) result.weights = weights_of(s, call.average_attn_weights);
  result.state = std::move(state);
  return result;
}

MultiheadAttention::InputGradients MultiheadAttention::backward(const State& state, const Tensor& dout) {
  return or_out_of_memory([&] { return gradients(state, dout, {}); });
}

MultiheadAttention::InputGradients MultiheadAttention::gradients(const State& s, const Tensor& dout,
                                                                 const Tensor& plus) {
  check_parameters(*this);
  const Options& o = options_;
  check_state(s.options, o);
  check_features("dout", dout, o.embed_dim, o.dtype, o.device, 2, 3);
  check_same_rows("dout", dout, "query", s.query);
  const Ops& ops = ops_of(o.device);

  // Out projection.
  Array dout_memory;
  const Tensor dout_rows = as_rows(dout, dout_memory);
  ops.linear_weight_gradient(dout_rows, s.out.view(), out_proj_weight.gradient_sum(), out_proj_bias.gradient_sum());
  const Array dattention = like(s.out.view());
  ops.linear_input_gradient(dout_rows, out_proj_weight.value.view(), {}, dattention.view());
  if (s.drops_all) ops.clear(dattention.view().data, dattention.size_bytes());

  // Attention.
  const Array dprojected = like(s.projected.view());
  const Array dprojected_kv = s.one_input ? Array() : like(s.projected_kv.view());
  const Placed d = place(s, dprojected.view(), dprojected_kv.view());
  Array dk_longer, dv_longer;
  if (o.add_bias_kv) {
    dk_longer = like(s.k);
    dv_longer = like(s.v);
  }
  attend_gradient(
      s.q, s.k, s.v, s.of_q.heads(s.out.view(), o.num_heads, *o.head_dim), s.lse.view(),
      s.of_q.heads(dattention.view(), o.num_heads, *o.head_dim), s.attention,
      {.dq = d.q, .dk = o.add_bias_kv ? dk_longer.view() : d.k, .dv = o.add_bias_kv ? dv_longer.view() : d.v});
  if (o.add_bias_kv) {
    split_gradient(dk_longer.view(), d.k, bias_k.gradient_sum());
    split_gradient(dv_longer.view(), d.v, bias_v.gradient_sum());
  }
  if (o.rotary) {
    ops.rotate(d.q_rows, *o.rotary, s.q_places.view(), true);
    ops.rotate(d.k_rows, *o.rotary, s.kv_places.view(), true);
  }

  // In projections: the same products for gradients of weights and of inputs.
  const InputWeights w = input_weights(o, in_proj_weight.value.view(), q_proj_weight.value.view(),
                                       k_proj_weight.value.view(), v_proj_weight.value.view(), {});
  const InputWeights dw =
      input_weights(o, in_proj_weight.gradient_sum(), q_proj_weight.gradient_sum(), k_proj_weight.gradient_sum(),
                    v_proj_weight.gradient_sum(), in_proj_bias.gradient_sum());
  const auto products = projections(s, w, dprojected.view(), dprojected_kv.view());
  const auto sums = projections(s, dw, dprojected.view(), dprojected_kv.view());
  InputGradients result;
  for (std::size_t i = 0; i < products.size(); ++i) {
    const Projection& p = products[i];
    ops.linear_weight_gradient(p.output, p.input, sums[i].weight, sums[i].bias);
    // Into the first of the arguments that are this input; what is there already is added.
    const Tensor& input = i == 0 ? s.query : i == 1 ? s.key : s.value;
    Array& into = i == 0 || same(input, s.query) ? result.query : i == 1 || s.key_is_value ? result.key : result.value;
    const Tensor before = into.defined() ? rows_of(into) : i == 0 ? plus : Tensor{};
    Array sum_of_inputs = like(input);
    ops.linear_input_gradient(p.output, p.weight, before, rows_of(sum_of_inputs));
    into = sum_of_inputs;
  }
  return result;
}

}  // namespace fovea::nn
