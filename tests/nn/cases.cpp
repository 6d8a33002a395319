#include "tests/nn/cases.h"

namespace fovea::test {
namespace {

using nlohmann::json;

template <class T>
std::optional<T> optional(const json& o, const char* key) {
  return o.contains(key) && !o[key].is_null() ? std::optional<T>(o[key].get<T>()) : std::nullopt;
}

DType dtype_of(const json& o) {
  const std::string name = o.value("dtype", "fp32");
  if (name == "fp16") return DType::kFloat16;
  return name == "bf16" ? DType::kBFloat16 : DType::kFloat32;
}

std::optional<nn::Rotary> rotary_of(const json& o) {
  if (!o.contains("rotary")) return {};
  const json& r = o["rotary"];
  return nn::Rotary{.base = r.value("base", 10000.0F),
                    .dim = r.value("dim", std::int64_t{0}),
                    .interleaved = r.value("interleaved", false)};
}

nn::MultiheadAttention::Options attention_options(const json& o) {
  return {.embed_dim = o["embed_dim"],
          .num_heads = o["num_heads"],
          .dropout = o.value("dropout", 0.0F),
          .bias = o.value("bias", true),
          .add_bias_kv = o.value("add_bias_kv", false),
          .add_zero_attn = o.value("add_zero_attn", false),
          .kdim = optional<std::int64_t>(o, "kdim"),
          .vdim = optional<std::int64_t>(o, "vdim"),
          .batch_first = o.value("batch_first", false),
          .num_kv_heads = optional<std::int64_t>(o, "num_kv_heads"),
          .head_dim = optional<std::int64_t>(o, "head_dim"),
          .window_left = optional<std::int64_t>(o, "window_left"),
          .window_right = optional<std::int64_t>(o, "window_right"),
          .alibi = o.value("alibi", false),
          .rotary = rotary_of(o),
          .dtype = dtype_of(o)};
}

nn::TransformerEncoder::Options encoder_options(const json& o) {
  nn::TransformerEncoder::Options e;
  e.layer = {.d_model = o["embed_dim"],
             .nhead = o["num_heads"],
             .dim_feedforward = o["dim_feedforward"],
             .dropout = o.value("dropout", 0.0F),
             .activation = o["activation"] == "gelu" ? nn::Activation::kGelu : nn::Activation::kRelu,
             .layer_norm_eps = o.value("layer_norm_eps", 1e-5F),
             .batch_first = o.value("batch_first", false),
             .norm_first = o.value("norm_first", false),
             .bias = o.value("bias", true),
             .num_kv_heads = optional<std::int64_t>(o, "num_kv_heads"),
             .head_dim = optional<std::int64_t>(o, "head_dim"),
             .window_left = optional<std::int64_t>(o, "window_left"),
             .window_right = optional<std::int64_t>(o, "window_right"),
             .alibi = o.value("alibi", false),
             .rotary = rotary_of(o),
             .recompute = o.value("recompute", false),
             .dtype = dtype_of(o)};
  e.num_layers = o.value("num_layers", std::int64_t{1});
  e.norm = o.value("norm", false);
  return e;
}

Causal causal_of(const json& o) {
  const std::string corner = o.value("causal", "");
  if (corner == "top_left") return Causal::kTopLeft;
  return corner == "bottom_right" ? Causal::kBottomRight : Causal::kNone;
}

class Case {
 public:
  Case(const std::string& path, const std::string& name, const Device& device, std::string saved)
      : path_(path),
        name_(name),
        saved_(std::move(saved)),
        device_(device),
        file_(files::SafetensorsFile::open(path)) {}

  Results run() {
    const json o = json::parse(file_.metadata().at(name_));
    dtype_ = dtype_of(o);
    call_.causal = causal_of(o);
    call_.key_padding_mask = mask("key_padding_mask");
    call_.attn_mask = mask("attn_mask");
    call_.cu_seqlens_q = given("cu_seqlens_q");
    call_.cu_seqlens_kv = given("cu_seqlens_kv");
    call_.need_weights = o.value("need_weights", false);
    call_.average_attn_weights = o.value("average_attn_weights", true);
    call_.training = true;
    if (o["kind"] == "mha") {
      auto options = attention_options(o);
      options.device = device_;
      attention(options);
    } else {
      auto options = encoder_options(o);
      options.layer.device = device_;
      if (o["kind"] == "layer") {
        nn::TransformerEncoderLayer layer(options.layer);
        stack(layer);
      } else {
        nn::TransformerEncoder encoder(options);
        stack(encoder);
      }
    }
    return std::move(results_);
  }

 private:
  Tensor given(const std::string& what) {
    const std::string full = name_ + "/" + what;
    if (!file_.entries().contains(full)) return {};
    return owned_.emplace_back(file_.load(full)).view();
  }

  /// On the layer's device, in its dtype: the file is fp32, with what it holds already rounded.
  Tensor in_dtype(const std::string& what) { return placed(given(what), dtype_); }
  Tensor mask(const std::string& what) {
    const Tensor t = given(what);
    return placed(t, t.dtype);
  }
  Tensor placed(const Tensor& t, DType dtype) {
    if (!t.defined()) return t;
    const auto shape = std::span(t.shape).first(static_cast<std::size_t>(t.rank));
    const nn::Array& cast = arrays_.emplace_back(dtype, shape, device_);
    nn::copy(t, cast.view());
    return cast.view();
  }

  void keep(const std::string& what, const nn::Array& value) {
    if (!value.defined()) return;
    const Tensor& v = value.view();
    nn::Array wide(DType::kFloat32, std::span(v.shape).first(static_cast<std::size_t>(v.rank)));
    nn::copy(v, wide.view());
    results_[what] = wide;
  }

  void fill(nn::Module& module) {
    nn::load(module, path_, name_ + "/weight/");
    if (!saved_.empty()) nn::save(module, saved_);
  }
  void keep_gradients(nn::Module& module) {
    for (const auto& [name, parameter] : nn::parameters(module)) keep("grad/" + name, parameter->gradient);
  }

  void attention(const nn::MultiheadAttention::Options& options) {
    nn::MultiheadAttention layer(options);
    fill(layer);
    const Tensor query = in_dtype("query");
    const Tensor key = file_.entries().contains(name_ + "/key") ? in_dtype("key") : query;
    const Tensor value = file_.entries().contains(name_ + "/value") ? in_dtype("value") : key;
    const auto result = layer.forward(query, key, value, call_);
    const auto gradients = layer.backward(*result.state, in_dtype("dout"));
    keep("out", result.out);
    keep("weights", result.weights);
    keep("dquery", gradients.query);
    keep("dkey", gradients.key);
    keep("dvalue", gradients.value);
    keep_gradients(layer);
  }

  template <class Layer>
  void stack(Layer& layer) {
    fill(layer);
    const auto result = layer.forward(in_dtype("query"), call_);
    keep("dquery", layer.backward(*result.state, in_dtype("dout")));
    keep("out", result.out);
    keep_gradients(layer);
  }

  std::string path_, name_, saved_;
  Device device_;
  files::SafetensorsFile file_;
  DType dtype_ = DType::kFloat32;
  nn::AttentionCall call_;
  std::vector<files::OwnedTensor> owned_;
  std::vector<nn::Array> arrays_;
  Results results_;
};

}  // namespace

Results run_case(const std::string& path, const std::string& name, const Device& device, const std::string& saved) {
  return Case(path, name, device, saved).run();
}

}  // namespace fovea::test
