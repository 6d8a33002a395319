// What layers refuse, in one sentence and before anything is read or written.  On the CPU, or with
// FOVEA_LAYERS_DEVICE=cuda on a GPU.
#include <fovea/nn/adamw.h>
#include <fovea/nn/transformer.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>

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
  EXPECT_EQ(refusal([&] { copy(absent, a.view()); }), "the tensor to copy from has no data");
  EXPECT_EQ(refusal([&] { copy(a.view(), absent); }), "the tensor to copy to has no data");
  EXPECT_TRUE(contains(refusal([&] { copy(negative, negative); }), "[-2, 3]; a dimension must not be negative"));
  EXPECT_TRUE(contains(refusal([&] { copy(deep, deep); }), "has 5 dimensions"));
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

}  // namespace
}  // namespace fovea::test
