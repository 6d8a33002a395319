#pragma once

#include <fovea/nn/layer_norm.h>
#include <fovea/nn/linear.h>
#include <fovea/nn/multihead_attention.h>

#include <vector>

namespace fovea::nn {

enum class Activation : std::uint8_t { kNone, kRelu, kGelu };  ///< gelu is the exact one, x·Φ(x) (1606.08415)

/// Self-attention and a two-layer network, each with dropout, residual and norm, as torch.nn.TransformerEncoderLayer.
///
/// Parameters: self_attn.*, linear1.*, linear2.*, norm1.*, norm2.*
class FOVEA_API TransformerEncoderLayer : public Module {
 public:
  struct Options {
    std::int64_t d_model = 0;
    std::int64_t nhead = 0;
    std::int64_t dim_feedforward = 2048;
    float dropout = 0.1F;  ///< of attention weights, of its result, within and after the network
    Activation activation = Activation::kRelu;
    float layer_norm_eps = 1e-5F;
    bool batch_first = false;
    bool norm_first = false;
    bool bias = true;
    // What follows is beyond torch's; MultiheadAttention::Options explains each.
    std::optional<std::int64_t> num_kv_heads{};
    std::optional<std::int64_t> head_dim{};
    std::optional<std::int64_t> window_left{};
    std::optional<std::int64_t> window_right{};
    bool alibi = false;
    std::optional<Rotary> rotary{};
    bool recompute = false;  ///< keep only the layer's input between forward and backward, and compute the rest again
    DType dtype = DType::kFloat32;
    Device device{};
    std::uint64_t seed = 0;
    friend bool operator==(const Options&, const Options&) = default;
  };

  explicit TransformerEncoderLayer(const Options& options);

  struct State;
  struct Result {
    Array out;                           ///< like src
    std::shared_ptr<const State> state;  ///< src, masks and cu_seqlens must outlive it
  };

  /// src [B, S, d_model] where batch_first, [S, B, d_model] where not, [S, d_model], or packed [total, d_model].
  /// call.attn_mask is torch's src_mask, call.key_padding_mask its src_key_padding_mask.
  [[nodiscard]] Result forward(const Tensor& src, const AttentionCall& call = {}) const;

  /// The gradient of src; adds to the parameters' gradients.
  [[nodiscard]] Array backward(const State& state, const Tensor& dout);

  void visit(const std::string& prefix, const Visit& visit) override;
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  MultiheadAttention self_attn;
  Linear linear1, linear2;
  LayerNorm norm1, norm2;

 private:
  [[nodiscard]] Result compute(const Tensor& src, const AttentionCall& call) const;
  [[nodiscard]] Array feed_forward(const Array& x, const Array& residual, State& s) const;
  [[nodiscard]] Array feed_forward_backward(const State& s, const Tensor& dout);

  Options options_;
};

/// A stack of encoder layers, as torch.nn.TransformerEncoder.  Parameters: layers.0.*, layers.1.*, …, norm.*
class FOVEA_API TransformerEncoder : public Module {
 public:
  struct Options {
    TransformerEncoderLayer::Options layer{};
    std::int64_t num_layers = 1;
    bool norm = false;  ///< one more norm at the end
  };

  explicit TransformerEncoder(const Options& options);

  struct State;
  struct Result {
    Array out;
    std::shared_ptr<const State> state;
  };

  /// As a layer's.  Layer l draws its dropout at call.offset + 4·l … + 3.  Where call.training is false only what the
  /// next layer needs is kept, and there is no state.
  [[nodiscard]] Result forward(const Tensor& src, const AttentionCall& call = {}) const;
  [[nodiscard]] Array backward(const State& state, const Tensor& dout);

  void visit(const std::string& prefix, const Visit& visit) override;
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  std::vector<TransformerEncoderLayer> layers;
  std::optional<LayerNorm> norm;

 private:
  Options options_;
};

}  // namespace fovea::nn
