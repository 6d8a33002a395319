// What layers refuse, in one sentence and before anything is read or written.  On the CPU, or with
// FOVEA_LAYERS_DEVICE=cuda on a GPU.
#include <fovea/nn/adamw.h>
#include <fovea/nn/loss.h>
#include <fovea/nn/transformer.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <utility>

#include "nn/layout.h"
#include "problem/refuse.h"
#include "tests/support.h"

namespace fovea::test {
namespace {

using namespace nn;

const Device kDevice{std::getenv("FOVEA_LAYERS_DEVICE") == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda};

TEST(Copy, RefusesWhatCannotBeWalked) {
  const Array a(DType::kFloat32, {2, 3}, kDevice);
  Tensor absent = a.view(), negative = a.view(), deep = a.view();
  absent.data = nullptr;
  negative.shape[0] = -2;
  deep.rank = 5;
  EXPECT_EQ(refusal([] { copy({}, {}); }), "the tensor to copy from has 0 dimensions but must have 1 to 4");
  EXPECT_EQ(refusal([&] { copy(absent, a.view()); }), "the tensor to copy from is [2, 3] but its data is null");
  EXPECT_EQ(refusal([&] { copy(a.view(), absent); }), "the tensor to copy to is [2, 3] but its data is null");
  EXPECT_TRUE(contains(refusal([&] { copy(negative, negative); }), "[-2, 3]; a dimension must not be negative"));
  EXPECT_TRUE(contains(refusal([&] { copy(deep, deep); }), "has 5 dimensions"));
  Tensor back = a.view(), odd = a.view(), strange = a.view();
  back.strides[0] = -3;
  odd.data = static_cast<char*>(odd.data) + 1;
  strange.dtype = static_cast<DType>(9);
  EXPECT_TRUE(contains(refusal([&] { copy(a.view(), back); }), "copy to's stride of dimension 0 (-3) must not be"));
  EXPECT_TRUE(contains(refusal([&] { copy(odd, a.view()); }), "copy from's data must be aligned to the 4 bytes"));
  EXPECT_TRUE(contains(refusal([&] { copy(strange, a.view()); }), "copy from's dtype (9) must be one of"));
  absent.shape[1] = 0;
  EXPECT_NO_THROW(copy(absent, absent));
}

/// What the second layer's backward says of the state that the first one's forward gave.
std::string why_not(MultiheadAttention::Options one, MultiheadAttention::Options other) {
  one.device = other.device = kDevice;
  const Array x(one.dtype, {2, 4, one.embed_dim}, kDevice), dout(other.dtype, {2, 4, other.embed_dim}, kDevice);
  const auto forward = MultiheadAttention(one).forward(x.view(), x.view(), x.view());
  return refusal([&] { (void)MultiheadAttention(other).backward(*forward.state, dout.view()); });
}
std::string why_not(TransformerEncoderLayer::Options one, TransformerEncoderLayer::Options other) {
  one.device = other.device = kDevice;
  const Array x(one.dtype, {2, 4, one.d_model}, kDevice), dout(other.dtype, {2, 4, other.d_model}, kDevice);
  const auto forward = TransformerEncoderLayer(one).forward(x.view(), {.training = true});
  return refusal([&] { (void)TransformerEncoderLayer(other).backward(*forward.state, dout.view()); });
}

TEST(States, OfAnotherLayerAreRefused) {
  using Attention = MultiheadAttention::Options;
  const Attention attention{.embed_dim = 16, .num_heads = 2, .batch_first = true};
  const auto refused = [](const auto& plain, const auto& change) {
    auto other = plain;
    change(other);
    for (const std::string& sentence : {why_not(plain, other), why_not(other, plain)}) {
      EXPECT_TRUE(contains(sentence, "is of another layer's forward"));
    }
  };
  refused(attention, [](Attention& o) { o.add_bias_kv = true; });
  refused(attention, [](Attention& o) { o.rotary = Rotary{}; });
  refused(attention, [](Attention& o) { o.dtype = DType::kBFloat16; });
  refused(attention, [](Attention& o) { o.embed_dim = 32, o.head_dim = 8; });
  using Layer = TransformerEncoderLayer::Options;
  const Layer layer{.d_model = 16, .nhead = 2, .dim_feedforward = 8, .dropout = 0.0F, .batch_first = true};
  refused(layer, [](Layer& o) { o.dropout = 0.5F; });
  refused(layer, [](Layer& o) { o.norm_first = true; });
  refused(layer, [](Layer& o) { o.dtype = DType::kBFloat16; });
  refused(layer, [](Layer& o) { o.recompute = true; });
}

TEST(States, OfAnotherStackAreRefusedBeforeAnyGradientIsAddedTo) {
  TransformerEncoder::Options options{
      .layer = {.d_model = 8, .nhead = 2, .dim_feedforward = 6, .device = kDevice}, .num_layers = 2, .norm = true};
  const Array x(DType::kFloat32, {2, 3, 8}, kDevice);
  const auto forward = TransformerEncoder(options).forward(x.view(), {.training = true});
  options.layer.activation = Activation::kGelu;
  TransformerEncoder other(options);
  EXPECT_TRUE(contains(refusal([&] { (void)other.backward(*forward.state, x.view()); }), "of another layer's forward"));
  for (const auto& [name, parameter] : parameters(other)) EXPECT_FALSE(parameter->gradient.defined()) << name;
}

TEST(Statistics, ThatForwardDidNotGiveAreRefused) {
  LayerNorm norm({.features = 3, .device = kDevice});
  const Array x(DType::kFloat32, {2, 3}, kDevice);
  const auto why_no = [&](const Array& statistics) {
    return refusal([&] { (void)norm.backward(x.view(), statistics, x.view()); });
  };
  EXPECT_EQ(why_no(Array(DType::kFloat32, {2, 1}, kDevice)),
            "statistics is fp32 [2, 1] but must be forward's, fp32 [2, 2]");
  EXPECT_TRUE(contains(why_no(Array(DType::kFloat16, {2, 2}, kDevice)), "statistics is fp16 [2, 2]"));
  EXPECT_TRUE(contains(why_no({}), "statistics is fp32 []"));
}

TEST(AdamWRates, BelowZeroOrNotANumberAreRefused) {
  Linear layer({.in_features = 3, .out_features = 2, .device = kDevice});
  EXPECT_EQ(refusal([&] { const AdamW adamw(layer, {.lr = -0.1F}); }), "lr (-0.1) must be at least 0");
  EXPECT_EQ(refusal([&] { const AdamW adamw(layer, {.weight_decay = std::numeric_limits<float>::quiet_NaN()}); }),
            "weight_decay (nan) must be at least 0");
  AdamW adamw(layer, {.lr = 0.0F, .weight_decay = 0.0F});
  EXPECT_EQ(refusal([&] { adamw.set_learning_rate(-1.0F); }), "lr (-1) must be at least 0");
}

TEST(AdamWParameters, ThatBecameOthersAreRefusedBeforeAnyStep) {
  Linear layer({.in_features = 4, .out_features = 3, .device = kDevice});
  AdamW adamw(layer);
  const Array x(DType::kFloat32, {2, 4}, kDevice), dy(DType::kFloat32, {2, 3}, kDevice);
  (void)layer.backward(x.view(), dy.view());
  const auto refused = [&](const std::string& has_become) {
    EXPECT_EQ(refusal([&] { adamw.step(); }), "a parameter of shape [3, 4] has become " + has_become + " on " +
                                                  name(kDevice) + " since its AdamW was made; make another AdamW");
  };
  const Array before = layer.weight.value;
  layer.weight.value = Array(DType::kFloat32, {3, 400}, kDevice);
  refused("fp32 [3, 400]");
  layer.weight.value = Array(DType::kBFloat16, {3, 4}, kDevice);
  refused("bf16 [3, 4]");
  layer.weight.value = before;
  const Array gradient = std::exchange(layer.weight.gradient, Array(DType::kFloat32, {4, 3}, kDevice));
  EXPECT_TRUE(contains(refusal([&] { adamw.step(); }), "the gradient of a parameter of shape [3, 4] is fp32 [4, 3]"));
  layer.weight.gradient = gradient;
  adamw.step();
}

TEST(Parameters, ThatTheLayerWasNotMadeWithAreRefused) {
  const Array x(DType::kFloat32, {2, 3, 8}, kDevice);
  const auto other = [](std::initializer_list<std::int64_t> shape, DType dtype = DType::kFloat32) {
    return Array(dtype, shape, kDevice);
  };
  // Puts `with` into the place of what a layer holds, and back where the calls were refused.
  const auto refused = [](Array& held, const Array& with, const std::string& sentence, const auto&... calls) {
    const Array before = std::exchange(held, with);
    for (const std::function<void()>& call : {std::function<void()>(calls)...}) {
      EXPECT_EQ(refusal(call), sentence + " on " + name(kDevice) + ", as the layer was made");
    }
    held = before;
  };
  const std::string on = " on " + name(kDevice) + " but must be ";

  Linear linear({.in_features = 8, .out_features = 4, .device = kDevice});
  const Array dy(DType::kFloat32, {2, 3, 4}, kDevice);
  const auto forward = [&] { (void)linear.forward(x.view()); };
  const auto backward = [&] { (void)linear.backward(x.view(), dy.view()); };
  refused(linear.weight.value, other({1, 8}), "weight is fp32 [1, 8]" + on + "fp32 [4, 8]", forward, backward);
  refused(linear.weight.value, other({4, 8}, DType::kBFloat16), "weight is bf16 [4, 8]" + on + "fp32 [4, 8]", forward);
  refused(linear.weight.gradient, other({8, 4}), "weight's gradient is fp32 [8, 4]" + on + "fp32 [4, 8]", backward);
  refused(linear.bias.value, other({1}), "bias is fp32 [1]" + on + "fp32 [4]", forward);
  refused(linear.bias.value, {}, "bias is absent but must be fp32 [4]", forward);
  Linear plain({.in_features = 8, .out_features = 4, .bias = false, .device = kDevice});
  plain.bias.value = other({4});
  EXPECT_EQ(refusal([&] { (void)plain.forward(x.view()); }), "bias is fp32 [4]" + on + "absent, as the layer was made");

  LayerNorm norm({.features = 8, .device = kDevice});
  const auto norm_forward = [&] { (void)norm.forward(x.view()); };
  const auto norm_backward = [&] { (void)norm.backward(x.view(), {}, x.view()); };
  refused(norm.weight.value, other({7}), "weight is fp32 [7]" + on + "fp32 [8]", norm_forward, norm_backward);
  refused(norm.bias.value, other({7}), "bias is fp32 [7]" + on + "fp32 [8]", norm_forward);

  for (const std::int64_t kdim : {8, 6}) {
    MultiheadAttention attention(
        {.embed_dim = 8, .num_heads = 2, .add_bias_kv = true, .kdim = kdim, .batch_first = true, .device = kDevice});
    const Array keys(DType::kFloat32, {2, 3, kdim}, kDevice);
    const auto of = attention.forward(x.view(), keys.view(), x.view(), {.training = true});
    attention.visit("", [&](const std::string& name, Parameter& parameter) {
      refused(
          parameter.value, other({1, 1}), name + " is fp32 [1, 1]" + on + "fp32 " + shape_text(parameter.value.view()),
          [&] { (void)attention.forward(x.view(), keys.view(), x.view()); },
          [&] { (void)attention.backward(*of.state, x.view()); });
    });
  }

  TransformerEncoder stack({.layer = {.d_model = 8, .nhead = 2, .dim_feedforward = 6, .device = kDevice}});
  TransformerEncoderLayer& layer = stack.layers[0];
  const auto of_stack = stack.forward(x.view(), {.training = true});
  layer.visit("", [&](const std::string& name, Parameter& parameter) {
    refused(
        parameter.value, other({1, 1}), name + " is fp32 [1, 1]" + on + "fp32 " + shape_text(parameter.value.view()),
        [&] { (void)stack.forward(x.view()); }, [&] { (void)stack.backward(*of_stack.state, x.view()); });
  });
  layer.linear1 = Linear({.in_features = 8, .out_features = 7, .device = kDevice});
  EXPECT_TRUE(contains(refusal([&] { (void)layer.forward(x.view()); }), "linear1.weight is fp32 [7, 8]"));
}

TEST(MovedFrom, ArraysHoldNothing) {
  Array from(DType::kFloat32, {2, 3}, kDevice), to = std::move(from);
  // NOLINTBEGIN(bugprone-use-after-move,clang-analyzer-cplusplus.Move): that is what this is about.
  EXPECT_FALSE(from.defined());
  EXPECT_EQ(from.view().data, nullptr);
  EXPECT_EQ(from.size_bytes(), 0U);
  EXPECT_EQ(refusal([&] { copy(from.view(), to.view()); }),
            "the tensor to copy from has 0 dimensions but must have 1 to 4");
  from = std::move(to);
  EXPECT_FALSE(to.defined());
  EXPECT_EQ(from.size_bytes(), 24U);
}

TEST(MovedFrom, LayersAreRefused) {
  const Array x(DType::kFloat32, {2, 3, 8}, kDevice);
  const auto refused = [&](const auto& call) {
    EXPECT_EQ(refusal(call), "the layer has been moved from; use the one that it was moved to");
  };
  Linear linear({.in_features = 8, .out_features = 8, .device = kDevice});
  const Linear other_linear = std::move(linear);
  refused([&] { (void)linear.forward(x.view()); });
  refused([&] { (void)linear.backward(x.view(), x.view()); });
  LayerNorm norm({.features = 8, .device = kDevice});
  const LayerNorm other_norm = std::move(norm);
  refused([&] { (void)norm.forward(x.view()); });
  refused([&] { (void)norm.backward(x.view(), {}, x.view()); });
  MultiheadAttention attention({.embed_dim = 8, .num_heads = 2, .batch_first = true, .device = kDevice});
  const auto of_attention = attention.forward(x.view(), x.view(), x.view());
  const MultiheadAttention other_attention = std::move(attention);
  refused([&] { (void)attention.forward(x.view(), x.view(), x.view()); });
  refused([&] { (void)attention.backward(*of_attention.state, x.view()); });
  TransformerEncoder stack({.layer = {.d_model = 8, .nhead = 2, .dim_feedforward = 8, .device = kDevice}});
  const auto of_stack = stack.forward(x.view(), {.training = true});
  const Linear network = std::move(stack.layers[0].linear2);
  refused([&] { (void)stack.forward(x.view()); });
  refused([&] { (void)stack.backward(*of_stack.state, x.view()); });
  refused([&] { save(stack, testing::TempDir() + "moved.safetensors"); });
  refused([&] { const AdamW adamw(stack); });
  const TransformerEncoder other_stack = std::move(stack);
  EXPECT_EQ(refusal([&] { (void)stack.forward(x.view()); }), "num_layers (0) must be at least 1");
  // NOLINTEND(bugprone-use-after-move,clang-analyzer-cplusplus.Move)
}

TEST(Masks, OfRanksThatNoTensorHasAreRefused) {
  const MultiheadAttention layer({.embed_dim = 8, .num_heads = 2, .batch_first = true, .device = kDevice});
  const Array x(DType::kFloat32, {2, 3, 8}, kDevice), mask(DType::kBool, {3, 3}, kDevice);
  for (const int rank : {5, 1000}) {
    AttentionCall call{.attn_mask = mask.view()};
    call.attn_mask.rank = rank;
    EXPECT_EQ(refusal([&] { (void)layer.forward(x.view(), x.view(), x.view(), call); }),
              "attn_mask is [3, 3, 0, 0] but must be [3, 3] or [4, 3, 3]");
  }
}

TEST(Weights, ThatAnEncoderLayerDoesNotGiveAreRefused) {
  const TransformerEncoder stack({.layer = {.d_model = 8, .nhead = 2, .dim_feedforward = 6, .device = kDevice}});
  const Array x(DType::kFloat32, {2, 3, 8}, kDevice);
  EXPECT_EQ(refusal([&] { (void)stack.forward(x.view(), {.need_weights = true}); }),
            "need_weights asks for what an encoder layer does not give; call its self_attn");
}

TEST(Tensors, ThatLieAsNoneMayAreRefused) {
  const Array x(DType::kFloat32, {2, 3, 8}, kDevice), mask(DType::kFloat32, {3, 3}, kDevice),
      classes(DType::kInt32, {6});
  const Linear linear({.in_features = 8, .out_features = 8, .device = kDevice});
  const MultiheadAttention attention({.embed_dim = 8, .num_heads = 2, .batch_first = true, .device = kDevice});
  const auto backwards = [](Tensor t) {
    t.strides[0] = -t.strides[0];
    return t;
  };
  const auto odd = [](Tensor t) {
    t.data = static_cast<std::byte*>(t.data) + 1;
    return t;
  };
  const auto refused = [&](const std::string& name, const Tensor& t, const auto& call) {
    EXPECT_EQ(refusal([&] { call(odd(t)); }), name + "'s data must be aligned to the 4 bytes of its elements");
    const std::string stride = name + "'s stride of dimension 0 (-" + std::to_string(t.strides[0]);
    EXPECT_EQ(refusal([&] { call(backwards(t)); }), stride + ") must not be negative");
  };
  refused("x", x.view(), [&](const Tensor& t) { (void)linear.forward(t); });
  refused("key", x.view(), [&](const Tensor& t) { (void)attention.forward(x.view(), t, t); });
  refused("attn_mask", mask.view(),
          [&](const Tensor& t) { (void)attention.forward(x.view(), x.view(), x.view(), {.attn_mask = t}); });
  refused("key_padding_mask", slice(mask.view(), 0, 0, 2),
          [&](const Tensor& t) { (void)attention.forward(x.view(), x.view(), x.view(), {.key_padding_mask = t}); });
  Tensor rows = x.view();
  rows.rank = 2;
  rows.shape = {6, 8};
  rows.strides = {8, 1};
  refused("query's cu_seqlens", slice(classes.view(), 0, 0, 2),
          [&](const Tensor& t) { (void)attention.forward(rows, rows, rows, {.cu_seqlens_q = t, .cu_seqlens_kv = t}); });
}

TEST(Tensors, OfMoreDimensionsOrClassesThanThereMayBeAreRefused) {
  const Array x(DType::kFloat32, {3, 4}, kDevice), classes(DType::kInt32, {3}, kDevice);
  const auto why_not = [&](const Tensor& t) { return refusal([&] { (void)cross_entropy(x.view(), t, x.view()); }); };
  Tensor deep = classes.view(), vast = classes.view();
  deep.rank = 5;
  deep.shape = {1, 1, 1, 3};
  EXPECT_TRUE(contains(why_not(deep), "classes is int32 [1, 1, 1, 3] but must be int32, one for each of the 3 rows"));
  vast.rank = 2;
  vast.shape = {5, 7378697629483820647};  // 2^65 + 3 elements
  EXPECT_TRUE(contains(why_not(vast), "classes is int32 [5, 7378697629483820647] but must be int32"));
}

TEST(Tensors, OfEndsWhoseDifferencesOnly64BitsHoldAreRefused) {
  const MultiheadAttention attention({.embed_dim = 8, .num_heads = 2, .device = kDevice});
  const Array rows(DType::kFloat32, {3, 8}, kDevice), ends(DType::kInt32, {5});
  constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min(), kMost = -(kLeast + 1);
  const std::int32_t around[] = {0, kMost, kLeast, -1, 3};  // whose differences are all positive in 32 bits
  std::copy(std::begin(around), std::end(around), static_cast<std::int32_t*>(ends.view().data));
  EXPECT_TRUE(contains(
      refusal([&] { (void)attention.forward(rows.view(), rows.view(), rows.view(), {.cu_seqlens_q = ends.view()}); }),
      "query's cu_seqlens decreases at sequence 1"));
}

TEST(Tensors, OfFourDimensionsAreRefusedWhereTwoOrThreeAreMeant) {
  const Array x(DType::kFloat32, {2, 3, 5, 8}, kDevice);
  const MultiheadAttention attention({.embed_dim = 8, .num_heads = 2, .device = kDevice});
  const TransformerEncoderLayer layer({.d_model = 8, .nhead = 2, .dim_feedforward = 6, .device = kDevice});
  const std::string rest = " is [2, 3, 5, 8] but must have 8 features in the last of 2 to 3 dimensions";
  EXPECT_EQ(refusal([&] { (void)attention.forward(x.view(), x.view(), x.view()); }), "query" + rest);
  EXPECT_EQ(refusal([&] { (void)layer.forward(x.view()); }), "src" + rest);
}

TEST(Names, ThatAFileCannotHoldAreRefused) {
  const std::string path = testing::TempDir() + "names.safetensors";
  Linear layer({.in_features = 3, .out_features = 2, .device = kDevice});
  EXPECT_EQ(refusal([&] { save(layer, path, "\xff."); }),
            "the tensor's name '\\xff.weight' is not UTF-8, as the format wants it");
  class Twice : public Module {
   public:
    explicit Twice(Linear& layer) : layer_(layer) {}
    void visit(const std::string& prefix, const Visit& visit) override {
      layer_.visit(prefix, visit);
      layer_.visit(prefix, visit);
    }

   private:
    Linear& layer_;
  } twice(layer);
  EXPECT_EQ(refusal([&] { save(twice, path); }), path + ": two tensors are called 'weight'");
}

TEST(Options, OutOfRangeAreRefusedWhereTheLayerIsMade) {
  const auto refused = [](const auto& change) {
    MultiheadAttention::Options o{.embed_dim = 8, .num_heads = 2, .device = kDevice};
    change(o);
    return refusal([&] { const MultiheadAttention layer(o); });
  };
  EXPECT_EQ(refused([](auto& o) { o.window_left = -1; }), "window_left (-1) must be at least 0");
  EXPECT_EQ(refused([](auto& o) { o.window_right = -2; }), "window_right (-2) must be at least 0");
  EXPECT_EQ(refused([](auto& o) { o.dropout = 1.5F; }), "dropout (1.5) must be 0 to 1");
  EXPECT_EQ(refused([](auto& o) { o.dropout = -0.5F; }), "dropout (-0.5) must be 0 to 1");
  EXPECT_EQ(refused([](auto& o) { o.rotary = Rotary{.base = -1.0F}; }), "rotary base (-1) must be above 0");
  EXPECT_EQ(refused([](auto& o) { o.kdim = 0; }), "kdim (0) must be at least 1");
  EXPECT_EQ(refused([](auto& o) { o.head_dim = 513; }), "head_dim (513) must be 1 to 512");
  EXPECT_EQ(refused([](auto& o) { o.num_heads = std::int64_t{1} << 55, o.head_dim = 512; }),
            "num_heads (36028797018963968) must be at most 2^40");
  EXPECT_EQ(refused([](auto& o) { o.num_kv_heads = 0; }), "num_kv_heads (0) must be at least 1");
  EXPECT_EQ(refused([](auto& o) { o.device.kind = static_cast<DeviceKind>(9); }),
            "device kind (9) must be one of the values that have names");
  const auto refused_layer = [](const TransformerEncoderLayer::Options& o) {
    return refusal([&] { const TransformerEncoderLayer layer(o); });
  };
  EXPECT_EQ(refused_layer({.nhead = 2}), "d_model (0) must be at least 1");
  EXPECT_EQ(refused_layer({.d_model = 8}), "nhead (0) must be at least 1");
  EXPECT_EQ(refused_layer({.d_model = 8, .nhead = 2, .dim_feedforward = 0}), "dim_feedforward (0) must be at least 1");
  EXPECT_EQ(refused_layer({.d_model = 8, .nhead = 2, .activation = static_cast<Activation>(9), .device = kDevice}),
            "activation (9) must be one of the values that have names");
}

}  // namespace
}  // namespace fovea::test
