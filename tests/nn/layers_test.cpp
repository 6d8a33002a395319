// The layers' promises: what PyTorch gives (recorded), gradients by finite differences where dropout draws, the same
// bits padded and packed, parameters through files, errors.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <numeric>

#include "cpu/elements.h"
#include "math/philox.h"
#include "tests/nn/cases.h"
#include "tests/support.h"
#include "tools/random.h"

namespace fovea::test {
namespace {

using namespace nn;
using tools::Random;

/// Random values, fp32, of a stream.
Array random_array(std::initializer_list<std::int64_t> shape, std::uint64_t stream, DType dtype = DType::kFloat32) {
  Array a(dtype, shape);
  const Random random(17, stream);
  cpu::for_each_element(a.view(), [&](std::int64_t i, std::int64_t offset) {
    cpu::store(a.view(), offset, random.normal(static_cast<std::uint64_t>(i)));
  });
  return a;
}

std::vector<double> values(const Array& a) { return cpu::load_all(a.view()); }

double dot(const Array& a, const Array& b) {
  const auto x = values(a), y = values(b);
  return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
}

double largest_difference(const Array& a, const Array& b) {
  const auto x = values(a), y = values(b);
  EXPECT_EQ(x.size(), y.size());
  double most = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) most = std::max(most, std::abs(x[i] - y[i]));
  return most;
}

Array ints(std::initializer_list<std::int32_t> numbers) {
  Array a(DType::kInt32, {static_cast<std::int64_t>(numbers.size())});
  std::copy(numbers.begin(), numbers.end(), static_cast<std::int32_t*>(a.view().data));
  return a;
}

// ---- PyTorch

TEST(Layers, AgreeWithTorchsInRecordedCases) {
  const std::string path = std::string(FOVEA_SOURCE) + "/tests/nn/torch_cases.safetensors";
  const auto file = files::SafetensorsFile::open(path);
  ASSERT_GE(file.metadata().size(), 20U);
  for (const auto& [name, text] : file.metadata()) {
    const auto described = nlohmann::json::parse(text);
    const Results results = run_case(path, name);
    for (const auto& [result, plain_error] : described["errors"].items()) {
      ASSERT_TRUE(results.contains(result)) << name << " gives no " << result << ": " << text;
      const auto expected = cpu::load_all(file.load(name + "/expected/" + result).view());
      const auto got = values(results.at(result));
      ASSERT_EQ(got.size(), expected.size()) << name << ' ' << result;
      double error = 0.0, largest = 0.0;
      for (std::size_t i = 0; i < got.size(); ++i) {
        error = std::max(error, std::abs(got[i] - expected[i]));
        largest = std::max(largest, std::abs(expected[i]));
      }
      // What is recorded was itself rounded to fp32.
      EXPECT_LE(error, 2.0 * plain_error.get<double>() + largest * 0x1p-24) << name << ' ' << result << ": " << text;
    }
  }
}

// ---- gradients with dropout

struct EncoderCase {
  TransformerEncoderLayer::Options options;
  bool packed = false;
};

/// d(loss) along a random direction of the input and of every parameter, against central differences.
void expect_gradients(const EncoderCase& c) {
  constexpr std::int64_t kBatch = 2, kLength = 19;
  TransformerEncoderLayer layer(c.options);
  const std::int64_t d = c.options.d_model;
  const Array x = c.packed ? random_array({kBatch * kLength, d}, 1) : random_array({kBatch, kLength, d}, 1);
  const Array ends = ints({0, 11, kBatch * kLength});
  AttentionCall call;
  call.training = true;
  call.seed = 5;
  if (c.packed) call.cu_seqlens_q = ends.view();
  const auto result = layer.forward(x.view(), call);
  const Array dout = c.packed ? random_array({kBatch * kLength, d}, 2) : random_array({kBatch, kLength, d}, 2);
  const Array dx = layer.backward(*result.state, dout.view());

  const auto slope = [&](const Tensor& moved, const Array& direction) {
    constexpr double kStep = 1e-2;
    const auto before = cpu::load_all(moved), along = values(direction);
    const auto loss = [&](double step) {
      auto at = before;
      for (std::size_t i = 0; i < at.size(); ++i) at[i] += step * along[i];
      cpu::store_all(moved, at);
      return dot(layer.forward(x.view(), call).out, dout);
    };
    const double rise = (loss(kStep) - loss(-kStep)) / (2.0 * kStep);
    cpu::store_all(moved, before);
    return rise;
  };
  const auto check = [&](const std::string& name, const Tensor& value, const Array& gradient, std::uint64_t stream) {
    Array direction(DType::kFloat32, std::span(value.shape).first(static_cast<std::size_t>(value.rank)));
    const Random random(23, stream);
    // Scaled so that the step stays small whatever the size.
    const double scale = 1.0 / std::sqrt(static_cast<double>(cpu::element_count(value)));
    cpu::for_each_element(direction.view(), [&](std::int64_t i, std::int64_t offset) {
      cpu::store(direction.view(), offset, scale * random.normal(static_cast<std::uint64_t>(i)));
    });
    const double claimed = dot(gradient, direction), seen = slope(value, direction);
    const double size = std::sqrt(dot(gradient, gradient)) * scale;
    EXPECT_NEAR(claimed, seen, 2e-2 * size + 1e-4) << name;
  };
  check("src", x.view(), dx, 3);
  std::uint64_t stream = 4;
  for (const auto& [name, parameter] : parameters(layer))
    check(name, parameter->value.view(), parameter->gradient, stream++);
}

TransformerEncoderLayer::Options dropping() {
  return {.d_model = 24,
          .nhead = 4,
          .dim_feedforward = 40,
          .dropout = 0.3F,
          .activation = Activation::kGelu,
          .batch_first = true,
          .seed = 3};
}

TEST(Gradients, WithDropoutAreThoseOfFiniteDifferences) { expect_gradients({dropping()}); }

TEST(Gradients, WithNormFirstGroupedHeadsAndRotaryAreThoseOfFiniteDifferences) {
  auto options = dropping();
  options.norm_first = true;
  options.num_kv_heads = 2;
  options.head_dim = 10;
  options.rotary = Rotary{.dim = 6};
  options.alibi = true;
  options.window_left = 7;
  expect_gradients({options});
}

TEST(Gradients, OfPackedSequencesAreThoseOfFiniteDifferences) { expect_gradients({dropping(), true}); }

TEST(Recomputation, GivesTheSameBits) {
  auto options = dropping();
  const Array x = random_array({2, 33, 24}, 1), dout = random_array({2, 33, 24}, 2);
  AttentionCall call;
  call.training = true;
  call.seed = 11;
  std::vector<Array> dx, dweight;
  for (const bool recompute : {false, true}) {
    options.recompute = recompute;
    TransformerEncoderLayer layer(options);
    const auto result = layer.forward(x.view(), call);
    dx.push_back(layer.backward(*result.state, dout.view()));
    dweight.push_back(layer.linear1.weight.gradient);
  }
  EXPECT_EQ(values(dx[0]), values(dx[1]));
  EXPECT_EQ(values(dweight[0]), values(dweight[1]));
}

// ---- dropout

TEST(LayerDropout, IsReplayedByItsSeedAndChangesWithIt) {
  const TransformerEncoderLayer layer(dropping());
  const Array x = random_array({2, 9, 24}, 1);
  AttentionCall call;
  call.training = true;
  call.seed = 1;
  const auto first = values(layer.forward(x.view(), call).out);
  EXPECT_EQ(first, values(layer.forward(x.view(), call).out));
  call.offset = 1;
  EXPECT_NE(first, values(layer.forward(x.view(), call).out));
  call.training = false;
  const auto evaluated = values(layer.forward(x.view(), call).out);
  call.seed = 2;
  EXPECT_EQ(evaluated, values(layer.forward(x.view(), call).out));
}

/// A layer of zeros whose last bias is 1: what leaves it is the last dropout itself.
TEST(LayerDropout, DrawsTheBitsThatTheContractSays) {
  constexpr std::int64_t kBatch = 4, kLength = 130, kModel = 24;
  constexpr std::uint64_t kSeed = 0x123456789abcdefU, kOffset = 40;
  auto options = dropping();
  options.norm_first = true;
  options.dropout = 0.25F;
  TransformerEncoderLayer layer(options);
  layer.visit("", [](const std::string&, Parameter& p) {
    cpu::store_all(p.value.view(), std::vector<double>(static_cast<std::size_t>(cpu::element_count(p.value.view()))));
  });
  cpu::store_all(layer.linear2.bias.value.view(), std::vector<double>(kModel, 1.0));
  const Array x({DType::kFloat32, {kBatch, kLength, kModel}});
  AttentionCall call;
  call.training = true;
  call.seed = kSeed;
  call.offset = kOffset;
  const auto out = values(layer.forward(x.view(), call).out);
  for (std::int64_t at = 0; at < std::ssize(out); ++at) {
    const std::int64_t b = at / kModel / kLength, i = at / kModel % kLength, c = at % kModel;
    const auto stream = math::dropout_stream(kSeed, kOffset + 3, static_cast<math::u32>(b));
    const auto draw = math::draws_of_patch(stream, math::patch_of(i), math::patch_of(c)).at(i, c);
    ASSERT_NEAR(out[at], draw < 49152 ? 4.0 / 3.0 : 0.0, 1e-6) << b << ' ' << i << ' ' << c;
  }
}

TEST(LayerDropout, OfAStackBeginsFourFurtherForEachLayer) {
  const TransformerEncoder encoder({.layer = dropping(), .num_layers = 3});
  const Array x = random_array({2, 9, 24}, 1);
  AttentionCall call;
  call.training = true;
  call.offset = 2;
  const auto at_once = values(encoder.forward(x.view(), call).out);
  Array state = x;
  for (const TransformerEncoderLayer& layer : encoder.layers) {
    state = layer.forward(state.view(), call).out;
    call.offset += 4;
  }
  EXPECT_EQ(at_once, values(state));
}

// ---- masks, and products of more than one tile

TEST(BooleanMasks, OfBothKindsHideWhatEitherHides) {
  constexpr std::int64_t kBatch = 2, kHeads = 2, kLength = 9;
  const MultiheadAttention layer({.embed_dim = 8, .num_heads = kHeads, .batch_first = true});
  const Array x = random_array({kBatch, kLength, 8}, 1);
  const Array attn({DType::kBool, {kLength, kLength}}), padding({DType::kBool, {kBatch, kLength}});
  const Array both({DType::kBool, {kBatch * kHeads, kLength, kLength}});
  const auto bits = [](const Array& a) { return static_cast<bool*>(a.view().data); };
  const Random random(3);
  std::uint64_t draw = 0;
  for (std::int64_t i = 0; i < kLength * kLength; ++i) bits(attn)[i] = i % kLength != 0 && random.uniform(draw++) < 0.4;
  for (std::int64_t i = 0; i < kBatch * kLength; ++i) bits(padding)[i] = i % kLength % 4 == 2;
  for (std::int64_t i = 0; i < kBatch * kHeads * kLength * kLength; ++i) {
    const std::int64_t b = i / (kHeads * kLength * kLength), key = i % kLength;
    bits(both)[i] = bits(attn)[i % (kLength * kLength)] || bits(padding)[b * kLength + key];
  }
  const auto out = [&](const AttentionCall& call) { return layer.forward(x.view(), x.view(), x.view(), call).out; };
  const Array apart = out({.key_padding_mask = padding.view(), .attn_mask = attn.view()});
  EXPECT_LT(largest_difference(apart, out({.attn_mask = both.view()})), 1e-6);
  EXPECT_GT(largest_difference(apart, out({.attn_mask = attn.view()})), 1e-3);
}

TEST(LinearLayer, OfManyTilesIsTheFormula) {
  constexpr std::int64_t kRows = 401, kIn = 530, kOut = 600;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Linear layer({.in_features = kIn, .out_features = kOut, .dtype = dtype, .seed = 3});
    const Array x = random_array({kRows, kIn}, 1, dtype), dy = random_array({kRows, kOut}, 2, dtype);
    const auto y = values(layer.forward(x.view())), dx = values(layer.backward(x.view(), dy.view()));
    const auto w = values(layer.weight.value), bias = values(layer.bias.value), vx = values(x), vdy = values(dy);
    const auto dw = values(layer.weight.gradient), dbias = values(layer.bias.gradient);
    const double step = cpu::format_of(dtype).unit_roundoff();
    const Random random(9);
    for (std::uint64_t n = 0; n < 300; ++n) {  // entries at random
      const auto r = static_cast<std::int64_t>(random.bits(3 * n) % kRows);
      const auto i = static_cast<std::int64_t>(random.bits(3 * n + 1) % kIn);
      const auto o = static_cast<std::int64_t>(random.bits(3 * n + 2) % kOut);
      double exact_y = bias[o], exact_dx = 0.0, exact_dw = 0.0, exact_dbias = 0.0;
      for (std::int64_t k = 0; k < kIn; ++k) exact_y += vx[r * kIn + k] * w[o * kIn + k];
      for (std::int64_t k = 0; k < kOut; ++k) exact_dx += vdy[r * kOut + k] * w[k * kIn + i];
      for (std::int64_t k = 0; k < kRows; ++k) {
        exact_dw += vdy[k * kOut + o] * vx[k * kIn + i];
        exact_dbias += vdy[k * kOut + o];
      }
      EXPECT_NEAR(y[r * kOut + o], exact_y, 2 * step + 1e-5);
      EXPECT_NEAR(dx[r * kIn + i], exact_dx, 3 * step + 1e-5);
      EXPECT_NEAR(dw[o * kIn + i], exact_dw, 2e-4);
      EXPECT_NEAR(dbias[o], exact_dbias, 1e-4);
    }
  }
}

TEST(PackedLayer, GivesWhatThePaddedBatchGivesDropoutAndAll) {
  auto options = dropping();
  options.rotary = Rotary{};
  options.head_dim = 6;
  constexpr std::int64_t kBatch = 3, kLength = 20, kTotal = 20 + 7 + 13, kModel = 24;
  const std::int64_t lengths[kBatch] = {20, 7, 13};
  TransformerEncoderLayer layer(options);
  const Array padded = random_array({kBatch, kLength, kModel}, 1), dpadded = random_array({kBatch, kLength, kModel}, 2);
  const Array packed({DType::kFloat32, {kTotal, kModel}}), dpacked({DType::kFloat32, {kTotal, kModel}});
  const Array ignore({DType::kBool, {kBatch, kLength}});
  const Array ends = ints({0, 20, 27, 40});
  const auto for_rows = [&](const auto& row) {
    for (std::int64_t b = 0, r = 0; b < kBatch; ++b) {
      for (std::int64_t i = 0; i < lengths[b]; ++i, ++r) row(b * kLength + i, r);
    }
  };
  const auto floats = [](const Array& a) { return static_cast<float*>(a.view().data); };
  std::fill_n(static_cast<bool*>(ignore.view().data), kBatch * kLength, true);
  std::vector<char> real(kBatch * kLength);
  for_rows([&](std::int64_t from, std::int64_t to) {
    real[from] = 1;
    static_cast<bool*>(ignore.view().data)[from] = false;
    std::copy_n(floats(padded) + from * kModel, kModel, floats(packed) + to * kModel);
    std::copy_n(floats(dpadded) + from * kModel, kModel, floats(dpacked) + to * kModel);
  });
  for (std::int64_t row = 0; row < kBatch * kLength; ++row) {  // rows of padding are nobody's
    if (real[row] == 0) std::fill_n(floats(dpadded) + row * kModel, kModel, 0.0F);
  }
  AttentionCall call;
  call.training = true;
  call.seed = 9;
  call.key_padding_mask = ignore.view();
  const auto of_padded = layer.forward(padded.view(), call);
  const Array dx_padded = layer.backward(*of_padded.state, dpadded.view());
  call.key_padding_mask = {};
  call.cu_seqlens_q = ends.view();
  const auto of_packed = layer.forward(packed.view(), call);
  const Array dx_packed = layer.backward(*of_packed.state, dpacked.view());
  for_rows([&](std::int64_t from, std::int64_t to) {
    for (std::int64_t c = 0; c < kModel; ++c) {
      EXPECT_NEAR(floats(of_padded.out)[from * kModel + c], floats(of_packed.out)[to * kModel + c], 1e-5);
      EXPECT_NEAR(floats(dx_padded)[from * kModel + c], floats(dx_packed)[to * kModel + c], 1e-4);
    }
  });
}

// ---- half precision

TEST(HalfLayers, StayNearFp32) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    auto options = dropping();
    const TransformerEncoderLayer exact(options);
    options.dtype = dtype;
    const TransformerEncoderLayer rounded(options);
    AttentionCall call;
    call.training = true;
    const Array x = random_array({2, 40, 24}, 1), x16 = random_array({2, 40, 24}, 1, dtype);
    const double most = largest_difference(exact.forward(x.view(), call).out, rounded.forward(x16.view(), call).out);
    EXPECT_LT(most, dtype == DType::kFloat16 ? 2e-2 : 1.5e-1);
    EXPECT_GT(most, 0.0);
  }
}

// ---- weights

TEST(AttentionWeights, AreTilesOfWhatTheLayerUsed) {
  const MultiheadAttention layer({.embed_dim = 8, .num_heads = 2, .dropout = 0.4F, .batch_first = true});
  constexpr std::int64_t kKeys = 700;  // more than one tile
  const Array q = random_array({1, 5, 8}, 1), k = random_array({1, kKeys, 8}, 2);
  AttentionCall call;
  call.need_weights = true;
  auto weights = layer.forward(q.view(), k.view(), k.view(), call).weights;
  ASSERT_EQ(weights.view().shape[2], kKeys);
  const auto sums = [&] {
    const auto all = values(weights);
    std::vector<double> rows(5);
    for (std::size_t i = 0; i < all.size(); ++i) rows[i / kKeys] += all[i];
    return rows;
  };
  for (const double sum : sums()) EXPECT_NEAR(sum, 1.0, 1e-5);
  call.training = true;
  weights = layer.forward(q.view(), k.view(), k.view(), call).weights;
  const auto dropped = values(weights);
  EXPECT_GT(std::count(dropped.begin(), dropped.end(), 0.0), kKeys / 4);
}

// ---- parameters through files

TEST(Parameters, GoThroughSafetensorsUnderTorchsNames) {
  const std::string path = std::filesystem::temp_directory_path() / "fovea_layers_test.safetensors";
  TransformerEncoder::Options options{.layer = dropping(), .num_layers = 2, .norm = true};
  TransformerEncoder made(options);
  save(made, path);
  const auto file = files::SafetensorsFile::open(path);
  EXPECT_EQ(file.entries().size(), 2U * 12 + 2);
  EXPECT_TRUE(file.entries().contains("layers.1.self_attn.in_proj_weight"));
  EXPECT_TRUE(file.entries().contains("layers.0.self_attn.out_proj.bias"));
  options.layer.seed = 99;
  TransformerEncoder other(options);
  const Array x = random_array({1, 6, 24}, 1);
  EXPECT_NE(values(made.forward(x.view()).out), values(other.forward(x.view()).out));
  load(other, path);
  EXPECT_EQ(values(made.forward(x.view()).out), values(other.forward(x.view()).out));
  options.layer.dim_feedforward = 41;
  TransformerEncoder wider(options);
  EXPECT_TRUE(contains(refusal([&] { load(wider, path); }),
                       "'layers.0.linear1.weight' is [40, 24] but the module's is [41, 24]"));
  EXPECT_TRUE(
      contains(refusal([&] { load(made, path, "model."); }), "tensor 'model.layers.0.self_attn.in_proj_weight'"));
  std::filesystem::remove(path);
}

// ---- training

TEST(AdamWStep, IsTheFormulas) {
  Linear layer({.in_features = 3, .out_features = 2, .seed = 1});
  const AdamW::Options o{.lr = 0.1F, .weight_decay = 0.5F};
  AdamW optimiser(layer, o);
  auto w = values(layer.weight.value);
  std::vector<double> m(w.size()), v(w.size());
  for (int step = 1; step <= 3; ++step) {
    zero_gradients(layer);
    const Array x = random_array({4, 3}, static_cast<std::uint64_t>(step)), dy = random_array({4, 2}, 7);
    (void)layer.backward(x.view(), dy.view());
    const auto g = values(layer.weight.gradient);
    optimiser.step();
    for (std::size_t i = 0; i < w.size(); ++i) {
      w[i] *= 1.0 - 0.1 * 0.5;
      m[i] = 0.9 * m[i] + 0.1 * g[i];
      v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
      w[i] -= 0.1 * (m[i] / (1 - std::pow(0.9, step))) / (std::sqrt(v[i] / (1 - std::pow(0.999, step))) + 1e-8);
      EXPECT_NEAR(values(layer.weight.value)[i], w[i], 1e-5);
    }
  }
}

TEST(Training, MakesTheLossSmaller) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    auto options = dropping();
    options.dropout = 0.1F;
    options.dtype = dtype;
    TransformerEncoderLayer layer(options);
    AdamW optimiser(layer, {.lr = 3e-3F});
    const Array x = random_array({4, 16, 24}, 1, dtype), wanted = random_array({4, 16, 24}, 2);
    const auto target = values(wanted);
    double first = 0.0, last = 0.0;
    for (int step = 0; step < 40; ++step) {
      AttentionCall call;
      call.training = true;
      call.seed = static_cast<std::uint64_t>(step);
      const auto result = layer.forward(x.view(), call);
      auto difference = values(result.out);
      last = 0.0;
      for (std::size_t i = 0; i < difference.size(); ++i) {
        difference[i] -= target[i];
        last += difference[i] * difference[i];
      }
      if (step == 0) first = last;
      const Array dout(dtype, {4, 16, 24});
      cpu::store_all(dout.view(), difference);
      zero_gradients(layer);
      (void)layer.backward(*result.state, dout.view());
      optimiser.step();
    }
    EXPECT_LT(last, 0.7 * first) << name(dtype);
  }
}

// ---- bounds and errors

TEST(Layers, OfNoRowsGiveNoRows) {
  TransformerEncoderLayer layer(dropping());
  const Array x({DType::kFloat32, {2, 0, 24}});
  AttentionCall call;
  call.training = true;
  const auto result = layer.forward(x.view(), call);
  EXPECT_EQ(result.out.view().shape[1], 0);
  EXPECT_EQ(layer.backward(*result.state, result.out.view()).view().shape[2], 24);
}

TEST(Layers, RefuseWhatCannotBeInOneSentence) {
  const auto attention = [](MultiheadAttention::Options o) {
    return refusal([&] { const MultiheadAttention layer(o); });
  };
  EXPECT_EQ(attention({.embed_dim = 10, .num_heads = 4}),
            "embed_dim (10) must be a multiple of num_heads (4), or head_dim be given");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .dropout = 1.0F}),
            "dropout (1) must be at least 0 and less than 1");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .num_kv_heads = 3}),
            "num_heads (4) must be a multiple of num_kv_heads (3)");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .rotary = Rotary{.dim = 3}}),
            "rotary dim (3) must be even, 2 to head_dim (2)");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .dtype = DType::kInt32}),
            "a layer's dtype (int32) must be fp32, fp16 or bf16");

  const MultiheadAttention layer({.embed_dim = 8, .num_heads = 2, .batch_first = true});
  const Array x = random_array({2, 3, 8}, 1), narrow = random_array({2, 3, 7}, 1), other = random_array({1, 3, 8}, 1);
  const Array mask({DType::kBool, {3, 4}}), numbers = ints({0, 4, 3}), half({DType::kFloat16, {2, 3, 8}});
  const auto call = [&](const Array& q, const Array& kv, const AttentionCall& c) {
    return refusal([&] { (void)layer.forward(q.view(), kv.view(), kv.view(), c); });
  };
  EXPECT_TRUE(contains(call(narrow, x, {}), "query is [2, 3, 7] but must have 8 features"));
  EXPECT_TRUE(contains(call(half, x, {}), "query is fp16 but the layer is fp32"));
  EXPECT_TRUE(contains(call(x, other, {}), "query has 2 sequences but key has 1"));
  EXPECT_TRUE(contains(call(x, x, {.attn_mask = mask.view()}), "attn_mask is [3, 4] but must be [3, 3] or [4, 3, 3]"));
  EXPECT_TRUE(contains(call(x, x, {.key_padding_mask = mask.view()}), "key_padding_mask is [3, 4] but must be [2, 3]"));
  EXPECT_TRUE(contains(call(x, x, {.cu_seqlens_q = numbers.view()}), "packed sequences are [total, features]"));
  const Array rows = random_array({3, 8}, 1);
  EXPECT_TRUE(contains(call(rows, rows, {.cu_seqlens_q = numbers.view()}), "decreases at sequence 1"));
  EXPECT_TRUE(
      contains(words(ErrorCode::kUnsupported,
                     [] { const Linear l({.in_features = 1, .out_features = 1, .device = {DeviceKind::kCuda}}); }),
               "layers run on the CPU alone so far"));
}

TEST(Layers, RefuseTheStateOfAnother) {
  auto options = dropping();
  const Array x = random_array({1, 5, 24}, 1);
  AttentionCall call;
  call.training = true;
  TransformerEncoderLayer layer(options);
  options.dim_feedforward = 41;
  TransformerEncoderLayer wider(options);
  TransformerEncoder stack({.layer = dropping(), .num_layers = 2}), longer({.layer = dropping(), .num_layers = 3});
  const auto of_layer = layer.forward(x.view(), call);
  EXPECT_TRUE(
      contains(refusal([&] { (void)wider.backward(*of_layer.state, x.view()); }), "of another layer's forward"));
  const auto of_stack = stack.forward(x.view(), call);
  EXPECT_TRUE(contains(refusal([&] { (void)longer.backward(*of_stack.state, x.view()); }), "has 2 layers"));
  MultiheadAttention narrow({.embed_dim = 24, .num_heads = 4, .batch_first = true});
  MultiheadAttention wide({.embed_dim = 24, .num_heads = 4, .batch_first = true, .head_dim = 7});
  const auto of_attention = narrow.forward(x.view(), x.view(), x.view(), call);
  EXPECT_TRUE(contains(refusal([&] { (void)wide.backward(*of_attention.state, x.view()); }), "of another layer's"));
}

}  // namespace
}  // namespace fovea::test
