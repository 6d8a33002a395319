#pragma once

#include <fovea/nn/module.h>
#include <fovea/options.h>

#include <memory>
#include <optional>

namespace fovea::nn {

/// Rotary position embedding (2104.09864): pair c of a head's first `dim` elements turns by position · base^(−2c/dim).
struct Rotary {
  float base = 10000.0F;     ///< above 0
  std::int64_t dim = 0;      ///< even, at most head_dim; 0: head_dim
  bool interleaved = false;  ///< pairs are (2c, 2c + 1); else (c, c + dim/2)
  friend bool operator==(const Rotary&, const Rotary&) = default;
};

/// What a forward of an attention layer is told besides its inputs.  Names and polarity are torch's: True = ignore.
/// B = batch, H = num_heads, Sq and Skv the lengths of query and key.
struct AttentionCall {
  Tensor key_padding_mask{};  ///< bool [B, Skv], true = ignore this key; or fp32 or the layer's dtype, added to scores
  Tensor attn_mask{};  ///< bool, true = ignore, or fp32 or the layer's dtype, added: [Sq, Skv] or [B·H, Sq, Skv]
  Causal causal = Causal::kNone;     ///< torch's is_causal is kTopLeft; no mask is needed with it
  Tensor cu_seqlens_q{};             ///< int32 [B + 1] on the CPU: packed sequences, query is [total_q, embed_dim]
  Tensor cu_seqlens_kv{};            ///< the same for key and value; for self-attention the same tensor, or none
  bool training = false;             ///< dropout happens only in training
  std::uint64_t seed = 0;            ///< with `offset` names all dropout of this forward; the same two replay it
  std::uint64_t offset = 0;          ///< attention draws at `offset`, an encoder layer at offset … offset + 3
  bool need_weights = false;         ///< of MultiheadAttention: its weights too, by tiles, in O(B·H·Sq·Skv) memory
  bool average_attn_weights = true;  ///< over heads
};

/// Multi-head attention (1706.03762), as torch.nn.MultiheadAttention, never leaving the fused path: whatever the
/// options, no matrix of scores is held.  A row that sees no key gives the bias of out_proj, where torch gives NaN.
///
/// Parameters, all in `dtype`, with D = head_dim, H = num_heads, G = num_kv_heads:
///   in_proj_weight [(H + 2G)·D, embed_dim]     where kdim and vdim are embed_dim, else
///   q_proj_weight [H·D, embed_dim], k_proj_weight [G·D, kdim], v_proj_weight [G·D, vdim]
///   in_proj_bias [(H + 2G)·D], bias_k and bias_v [1, 1, G·D], out_proj.weight [embed_dim, H·D], out_proj.bias
class FOVEA_API MultiheadAttention : public Module {
 public:
  struct Options {
    std::int64_t embed_dim = 0;
    std::int64_t num_heads = 0;
    float dropout = 0.0F;  ///< of attention weights, 0 to 1
    bool bias = true;
    bool add_bias_kv = false;    ///< one more key and value, learned; not with packed sequences
    bool add_zero_attn = false;  ///< one more key and value, zero
    std::optional<std::int64_t> kdim{};
    std::optional<std::int64_t> vdim{};
    bool batch_first = false;
    // What follows is beyond torch's.
    std::optional<std::int64_t> num_kv_heads{};  ///< grouped heads (2305.13245); divides num_heads
    std::optional<std::int64_t> head_dim{};      ///< 1 to 512; else embed_dim / num_heads
    std::optional<std::int64_t> window_left{};   ///< as fovea::Rules'
    std::optional<std::int64_t> window_right{};
    bool alibi = false;  ///< slopes 2^(−8(h + 1)/H) (2108.12409)
    std::optional<Rotary> rotary{};
    DType dtype = DType::kFloat32;  ///< fp32, fp16 or bf16; of inputs and outputs too
    Device device{};
    std::uint64_t seed = 0;  ///< of the initial values, distributed as torch's
    friend bool operator==(const Options&, const Options&) = default;
  };

  explicit MultiheadAttention(const Options& options);

  /// What backward needs of a forward.  Views of its inputs, masks and cu_seqlens are in it: these must live as long.
  struct State;
  struct Result {
    Array out;  ///< shape of query with embed_dim features
    /// Where call.need_weights: [B, Sq, Skv], or [B, H, Sq, Skv] where not averaged, without B where query has none;
    /// after dropout, with a column more for add_bias_kv, and for add_zero_attn (shown before dropout: it has no
    /// value).
    Array weights;
    std::shared_ptr<const State> state;
  };

  /// query [B, Sq, embed_dim], key [B, Skv, kdim], value [B, Skv, vdim] where batch_first, [Sq, B, …] where not;
  /// without the batch dimension one sequence, or with cu_seqlens packed ones.  Self-attention: the same tensor thrice.
  [[nodiscard]] Result forward(const Tensor& query, const Tensor& key, const Tensor& value,
                               const AttentionCall& call = {}) const;

  struct InputGradients {
    Array query;  ///< where two or three inputs are the same tensor, the sum stands with the first of them
    Array key;
    Array value;
  };
  /// Adds to the parameters' gradients.  `state` is of this layer's forward, or of one with the same options.
  [[nodiscard]] InputGradients backward(const State& state, const Tensor& dout);

  void visit(const std::string& prefix, const Visit& visit) override;
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  Parameter in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias, bias_k, bias_v;
  Parameter out_proj_weight, out_proj_bias;

 private:
  friend class TransformerEncoderLayer;

  /// What the product with out_proj goes through before it is stored; an encoder layer's dropout and residual.
  struct Tail;
  [[nodiscard]] Result run(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionCall& call,
                           const Tail& tail) const;
  /// `plus`, where defined, is added to the gradient of query.
  [[nodiscard]] InputGradients gradients(const State& s, const Tensor& dout, const Tensor& plus);

  Options options_;
  Array alibi_slopes_;  // fp32 [num_heads], where options.alibi
};

}  // namespace fovea::nn
