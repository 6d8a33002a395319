// The layers' promises: what PyTorch gives (recorded), gradients by finite differences where dropout draws, the same
// bits padded and packed, parameters through files, errors.  On the CPU, or with FOVEA_LAYERS_DEVICE=cuda on a GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "cpu/elements.h"
#include "cuda/driver.h"
#include "math/philox.h"
#include "tests/nn/cases.h"
#include "tests/support.h"
#include "tools/random.h"

namespace fovea::test {
namespace {

using namespace nn;
using tools::Random;

const Device kDevice{std::getenv("FOVEA_LAYERS_DEVICE") == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda};

std::span<const std::int64_t> shape_of(const Tensor& t) {
  return std::span(t.shape).first(static_cast<std::size_t>(t.rank));
}

/// The same elements in another dtype, on another device.
Array converted(const Array& a, DType dtype, const Device& device) {
  Array to(dtype, shape_of(a.view()), device);
  copy(a.view(), to.view());
  return to;
}
Array placed(const Array& host) { return converted(host, host.view().dtype, kDevice); }

/// Random values, fp32, of a stream.
Array random_array(std::initializer_list<std::int64_t> shape, std::uint64_t stream, DType dtype = DType::kFloat32) {
  const Array a(dtype, shape);
  const Random random(17, stream);
  cpu::for_each_element(a.view(), [&](std::int64_t i, std::int64_t offset) {
    cpu::store(a.view(), offset, random.normal(static_cast<std::uint64_t>(i)));
  });
  return placed(a);
}

std::vector<double> values(const Tensor& t) {
  const Array host(t.dtype, shape_of(t));
  copy(t, host.view());
  return cpu::load_all(host.view());
}
std::vector<double> values(const Array& a) { return values(a.view()); }

void put(const Tensor& t, const std::vector<double>& numbers) {
  const Array host(t.dtype, shape_of(t));
  cpu::store_all(host.view(), numbers);
  copy(host.view(), t);
}

double dot(const Array& a, const Array& b) {
  const auto x = values(a), y = values(b);
  return std::inner_product(x.begin(), x.end(), y.begin(), 0.0);
}

double largest_difference(const Array& a, const Array& b) {
  const auto x = values(a), y = values(b);
  EXPECT_EQ(x.size(), y.size());
  double most = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) most = worse(most, std::abs(x[i] - y[i]));
  return most;
}

Array ints(std::initializer_list<std::int32_t> numbers) {
  Array a(DType::kInt32, {static_cast<std::int64_t>(numbers.size())});
  std::copy(numbers.begin(), numbers.end(), static_cast<std::int32_t*>(a.view().data));
  return a;
}

// ---- PyTorch

TEST(Layers, AgreeWithTorchsInRecordedCases) {
  const char* carried = std::getenv("FOVEA_TORCH_CASES");  // where the sources are not
  const std::string path =
      carried != nullptr ? carried : std::string(FOVEA_SOURCE) + "/tests/nn/torch_cases.safetensors";
  const auto file = files::SafetensorsFile::open(path);
  ASSERT_GE(file.metadata().size(), 20U);
  for (const auto& [name, text] : file.metadata()) {
    const auto described = nlohmann::json::parse(text);
    const Results results = run_case(path, name, kDevice);
    for (const auto& [result, plain_error] : described["errors"].items()) {
      ASSERT_TRUE(results.contains(result)) << name << " gives no " << result << ": " << text;
      const auto expected = cpu::load_all(file.load(name + "/expected/" + result).view());
      const auto got = values(results.at(result));
      ASSERT_EQ(got.size(), expected.size()) << name << ' ' << result;
      double error = 0.0, largest = 0.0;
      for (std::size_t i = 0; i < got.size(); ++i) {
        error = worse(error, std::abs(got[i] - expected[i]));
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
    const auto before = values(moved), along = values(direction);
    const auto loss = [&](double step) {
      auto at = before;
      for (std::size_t i = 0; i < at.size(); ++i) at[i] += step * along[i];
      put(moved, at);
      return dot(layer.forward(x.view(), call).out, dout);
    };
    const double rise = (loss(kStep) - loss(-kStep)) / (2.0 * kStep);
    put(moved, before);
    return rise;
  };
  const auto check = [&](const std::string& name, const Tensor& value, const Array& gradient, std::uint64_t stream) {
    const Array direction(DType::kFloat32, shape_of(value), kDevice);
    std::vector<double> numbers(static_cast<std::size_t>(cpu::element_count(value)));
    const Random random(23, stream);
    // Scaled so that the step stays small whatever the size.
    const double scale = 1.0 / std::sqrt(static_cast<double>(numbers.size()));
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = scale * random.normal(i);
    put(direction.view(), numbers);
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
          .device = kDevice,
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

TEST(Recomputation, GivesTheSame) {
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
  // A GPU's dq is added up in any order.
  const double most = kDevice.kind == DeviceKind::kCpu ? 0.0 : 1e-5;
  EXPECT_LE(largest_difference(dx[0], dx[1]), most);
  EXPECT_LE(largest_difference(dweight[0], dweight[1]), most);
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
    put(p.value.view(), std::vector<double>(static_cast<std::size_t>(cpu::element_count(p.value.view()))));
  });
  put(layer.linear2.bias.value.view(), std::vector<double>(kModel, 1.0));
  const Array x(DType::kFloat32, {kBatch, kLength, kModel}, kDevice);
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

TEST(LayerDropout, OfOneDropsEverythingAndItsGradients) {
  const MultiheadAttention::Options kept{.embed_dim = 24, .num_heads = 4, .batch_first = true, .device = kDevice};
  MultiheadAttention::Options dropped = kept;
  dropped.dropout = 1.0F;
  MultiheadAttention layer(dropped);
  const Array x = random_array({2, 5, 24}, 1);
  const auto evaluated = layer.forward(x.view(), x.view(), x.view());
  EXPECT_EQ(values(evaluated.out), values(MultiheadAttention(kept).forward(x.view(), x.view(), x.view()).out));
  const auto result = layer.forward(x.view(), x.view(), x.view(), {.training = true, .need_weights = true});
  for (const double d : values(result.out)) ASSERT_EQ(d, 0.0);  // what the bias of out_proj begins as
  for (const double d : values(result.weights)) ASSERT_EQ(d, 0.0);
  for (const double d : values(layer.backward(*result.state, x.view()).query)) ASSERT_EQ(d, 0.0);
  for (const double d : values(layer.in_proj_weight.gradient)) ASSERT_EQ(d, 0.0);

  TransformerEncoderLayer::Options options = dropping();
  options.dropout = 1.0F;
  options.norm_first = true;
  TransformerEncoderLayer encoder(options);
  const auto passed = encoder.forward(x.view(), {.training = true});
  EXPECT_EQ(values(passed.out), values(x));  // only what goes past both halves is left
  EXPECT_EQ(values(encoder.backward(*passed.state, x.view())), values(x));
}

TEST(BooleanMasks, OfBothKindsHideWhatEitherHides) {
  constexpr std::int64_t kBatch = 2, kHeads = 2, kLength = 9;
  const MultiheadAttention layer({.embed_dim = 8, .num_heads = kHeads, .batch_first = true, .device = kDevice});
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
  const Array a = placed(attn), p = placed(padding), all = placed(both);
  const Array apart = out({.key_padding_mask = p.view(), .attn_mask = a.view()});
  EXPECT_LT(largest_difference(apart, out({.attn_mask = all.view()})), 1e-6);
  EXPECT_GT(largest_difference(apart, out({.attn_mask = a.view()})), 1e-3);
}

TEST(LinearLayer, OfManyTilesIsTheFormula) {
  constexpr std::int64_t kRows = 401, kIn = 530, kOut = 600;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Linear layer({.in_features = kIn, .out_features = kOut, .dtype = dtype, .device = kDevice, .seed = 3});
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
  const Array padded = random_array({kBatch, kLength, kModel}, 1), drawn = random_array({kBatch, kLength, kModel}, 2);
  const auto x = values(padded);
  auto dx = values(drawn);
  std::vector<double> packed_x, packed_dx, hidden(kBatch * kLength);
  for (std::int64_t row = 0; row < kBatch * kLength; ++row) {
    const auto begin = static_cast<std::size_t>(row * kModel), end = begin + kModel;
    hidden[row] = row % kLength < lengths[row / kLength] ? 0.0 : 1.0;
    for (std::size_t i = begin; i < end; ++i) {
      if (hidden[row] != 0.0) {
        dx[i] = 0.0;  // rows of padding are nobody's
      } else {
        packed_x.push_back(x[i]);
        packed_dx.push_back(dx[i]);
      }
    }
  }
  const Array packed(DType::kFloat32, {kTotal, kModel}, kDevice), dpacked(DType::kFloat32, {kTotal, kModel}, kDevice);
  const Array dpadded(DType::kFloat32, {kBatch, kLength, kModel}, kDevice), ends = ints({0, 20, 27, 40});
  const Array ignore(DType::kBool, {kBatch, kLength}, kDevice);
  put(packed.view(), packed_x);
  put(dpacked.view(), packed_dx);
  put(dpadded.view(), dx);
  put(ignore.view(), hidden);
  AttentionCall call;
  call.training = true;
  call.seed = 9;
  call.key_padding_mask = ignore.view();
  const auto of_padded = layer.forward(padded.view(), call);
  const auto out_padded = values(of_padded.out), dx_padded = values(layer.backward(*of_padded.state, dpadded.view()));
  call.key_padding_mask = {};
  call.cu_seqlens_q = ends.view();
  const auto of_packed = layer.forward(packed.view(), call);
  const auto out_packed = values(of_packed.out), dx_packed = values(layer.backward(*of_packed.state, dpacked.view()));
  for (std::size_t from = 0, to = 0; from < out_padded.size(); ++from) {
    if (hidden[from / kModel] != 0.0) continue;
    EXPECT_NEAR(out_padded[from], out_packed[to], 1e-5);
    EXPECT_NEAR(dx_padded[from], dx_packed[to], 1e-4);
    ++to;
  }
}

TEST(FloatMasks, MayHaveAnyStrides) {
  constexpr std::int64_t kLength = 9;
  const Array x = random_array({2, kLength, 8}, 1), mask = random_array({kLength, kLength}, 2);
  const Array turned(DType::kFloat32, {kLength, kLength}, kDevice);
  copy(mask.view().transposed(0, 1), turned.view());
  for (const bool more : {false, true}) {
    const MultiheadAttention layer(
        {.embed_dim = 8, .num_heads = 2, .add_bias_kv = more, .batch_first = true, .device = kDevice});
    const auto out = [&](const Tensor& attn_mask) {
      return values(layer.forward(x.view(), x.view(), x.view(), {.attn_mask = attn_mask}).out);
    };
    EXPECT_EQ(out(mask.view().transposed(0, 1)), out(turned.view()));
  }
}

TEST(PaddedLayer, WithHolesIsTheLayerWithTheirMask) {
  constexpr std::int64_t kBatch = 2, kHeads = 2, kLength = 21;
  MultiheadAttention layer({.embed_dim = 8, .num_heads = kHeads, .batch_first = true, .device = kDevice});
  const Array x = random_array({kBatch, kLength, 8}, 1), dout = random_array({kBatch, kLength, 8}, 2);
  const Array padding(DType::kBool, {kBatch, kLength}, kDevice);
  const Array mask(DType::kBool, {kBatch * kHeads, kLength, kLength}, kDevice);
  std::vector<double> hidden(kBatch * kLength), all;
  for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] = i % 5 == 3 || i % kLength > 15 ? 1.0 : 0.0;
  for (std::int64_t i = 0; i < kBatch * kHeads * kLength; ++i) {
    const auto of_batch = hidden.begin() + i / (kHeads * kLength) * kLength;
    all.insert(all.end(), of_batch, of_batch + kLength);
  }
  put(padding.view(), hidden);
  put(mask.view(), all);
  const auto run = [&](const AttentionCall& call) {
    const auto result = layer.forward(x.view(), x.view(), x.view(), call);
    return std::pair(result.out, layer.backward(*result.state, dout.view()).query);
  };
  const auto by_padding = run({.key_padding_mask = padding.view()}), by_mask = run({.attn_mask = mask.view()});
  EXPECT_LT(largest_difference(by_padding.first, by_mask.first), 1e-6);
  EXPECT_LT(largest_difference(by_padding.second, by_mask.second), 1e-5);
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
  const MultiheadAttention layer(
      {.embed_dim = 8, .num_heads = 2, .dropout = 0.4F, .batch_first = true, .device = kDevice});
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
  Linear layer({.in_features = 3, .out_features = 2, .device = kDevice, .seed = 1});
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

TEST(AdamWStep, BeginsFromValuesThatWereWrittenSinceTheLast) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const auto make = [&](std::uint64_t seed) {
      return Linear({.in_features = 50, .out_features = 30, .dtype = dtype, .device = kDevice, .seed = seed});
    };
    Linear layer = make(1), other = make(2), expected = make(2);
    const Array x = random_array({4, 50}, 1, dtype), dy = random_array({4, 30}, 2, dtype);
    const auto step = [&](Linear& trained, AdamW& optimiser) {
      zero_gradients(trained);
      (void)trained.backward(x.view(), dy.view());
      optimiser.step();
      return values(trained.weight.value);
    };
    AdamW optimiser(layer, {.lr = 1e-2F}), of_expected(expected, {.lr = 1e-2F});
    copy(other.weight.value.view(), layer.weight.value.view());
    EXPECT_EQ(step(layer, optimiser), step(expected, of_expected)) << name(dtype) << ", before the first step";
    copy(other.weight.value.view(), layer.weight.value.view());
    const auto before = values(layer.weight.value), after = step(layer, optimiser);
    for (std::size_t i = 0; i < before.size(); ++i) ASSERT_NEAR(after[i], before[i], 2e-2) << name(dtype);
  }
}

/// Steps far below a weight's last place are not lost.
TEST(AdamWStep, KeepsWhatSixteenBitsCannotHold) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Linear layer({.in_features = 50, .out_features = 30, .dtype = dtype, .device = kDevice, .seed = 1});
    put(layer.weight.value.view(), std::vector<double>(1500, 1.0));
    AdamW optimiser(layer, {.lr = 1e-4F, .weight_decay = 0.0F});
    const Array x = random_array({4, 50}, 1, dtype), dy = random_array({4, 30}, 2, dtype);
    (void)layer.backward(x.view(), dy.view());
    for (int step = 0; step < 200; ++step) optimiser.step();
    for (const double w : values(layer.weight.value)) ASSERT_NEAR(std::abs(w - 1.0), 0.02, 0.005) << name(dtype);
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
      const Array dout(dtype, {4, 16, 24}, kDevice);
      put(dout.view(), difference);
      zero_gradients(layer);
      (void)layer.backward(*result.state, dout.view());
      optimiser.step();
    }
    EXPECT_LT(last, 0.7 * first) << name(dtype);
  }
}

// ---- losses

/// A loss and its gradient as the formula's, in double precision.
struct Loss {
  double value = 0.0;
  std::vector<double> gradient;
};

Loss squares(const std::vector<double>& x, const std::vector<double>& target) {
  Loss loss;
  const auto count = static_cast<double>(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    loss.value += (x[i] - target[i]) * (x[i] - target[i]) / count;
    loss.gradient.push_back(2.0 * (x[i] - target[i]) / count);
  }
  return loss;
}

Loss entropies(const std::vector<double>& x, const std::vector<double>& classes) {
  Loss loss;
  const std::size_t columns = x.size() / classes.size();
  const auto rows = static_cast<double>(classes.size());
  for (std::size_t r = 0; r < classes.size(); ++r) {
    double total = 0.0;
    for (std::size_t c = 0; c < columns; ++c) total += std::exp(x[r * columns + c]);
    const bool counts = classes[r] >= 0.0;
    if (counts) loss.value += (std::log(total) - x[r * columns + static_cast<std::size_t>(classes[r])]) / rows;
    for (std::size_t c = 0; c < columns; ++c) {
      const double wanted = static_cast<double>(c) == classes[r] ? 1.0 : 0.0;
      loss.gradient.push_back(counts ? (std::exp(x[r * columns + c]) / total - wanted) / rows : 0.0);
    }
  }
  return loss;
}

void expect_loss(const Array& got, const Array& gradient, const Loss& wanted, DType dtype) {
  const double unit = cpu::format_of(dtype).unit_roundoff();
  EXPECT_NEAR(values(got)[0], wanted.value, 1e-5 * wanted.value) << name(dtype);
  const auto all = values(gradient);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const double least = dtype == DType::kFloat16 ? 0x1p-24 : 0.0;
    ASSERT_NEAR(all[i], wanted.gradient[i], 2 * unit * std::abs(wanted.gradient[i]) + least + 1e-8) << name(dtype);
  }
}

TEST(Losses, AreTheFormulasWithTheirGradients) {
  constexpr std::int64_t kRows = 70, kColumns = 37;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Array x = random_array({kRows, kColumns}, 1, dtype), target = random_array({kRows, kColumns}, 2, dtype);
    const Array dx(dtype, {kRows, kColumns}, kDevice), classes(DType::kInt32, {kRows}, kDevice);
    std::vector<double> wanted(kRows);
    for (std::int64_t r = 0; r < kRows; ++r) wanted[r] = r % 9 == 4 ? -1.0 : static_cast<double>(r * 5 % kColumns);
    put(classes.view(), wanted);
    const Array distance = mean_square(x.view(), target.view(), dx.view());
    expect_loss(distance, dx, squares(values(x), values(target)), dtype);
    const Array entropy = cross_entropy(x.view(), classes.view(), dx.view());
    expect_loss(entropy, dx, entropies(values(x), wanted), dtype);
  }
  // A dimension of size 1 may have any stride.
  const Array rows = random_array({4, 8}, 1), target = random_array({4, 8}, 2), drows = random_array({4, 8}, 3);
  const Array classes4 = placed(ints({1, 7, 0, 3}));
  for (const std::int64_t stride : {0, 8, 77}) {
    const auto three = [&](const Array& a) {
      return Tensor{a.view().data, DType::kFloat32, kDevice, 3, {4, 1, 8}, {8, stride, 1}};
    };
    const Array distance = mean_square(three(rows), three(target), three(drows));
    expect_loss(distance, drows, squares(values(rows), values(target)), DType::kFloat32);
    const Array entropy = cross_entropy(three(rows), classes4.view(), three(drows));
    expect_loss(entropy, drows, entropies(values(rows), values(classes4)), DType::kFloat32);
  }
  // What stands in a row that is left out touches nothing.
  for (const double wild : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    const Array logits = random_array({2, 4}, 1), dlogits = random_array({2, 4}, 2), one = placed(ints({3, -1}));
    std::vector<double> numbers = values(logits);
    std::fill(numbers.begin() + 4, numbers.end(), wild);
    put(logits.view(), numbers);
    const Array entropy = cross_entropy(logits.view(), one.view(), dlogits.view());
    std::fill(numbers.begin() + 4, numbers.end(), 0.0);
    expect_loss(entropy, dlogits, entropies(numbers, {3.0, -1.0}), DType::kFloat32);
  }
  const Array x = random_array({3, 4}, 1), narrow = random_array({3, 3}, 1), classes(DType::kInt32, {2}, kDevice);
  EXPECT_TRUE(contains(refusal([&] { (void)mean_square(x.view(), narrow.view(), x.view()); }), "target is [3, 3]"));
  EXPECT_TRUE(contains(refusal([&] { (void)cross_entropy(x.view(), classes.view(), x.view()); }),
                       "one for each of the 3 rows"));
}

TEST(Losses, RefuseWhatTheirKernelsWouldMisread) {
  const Array x = random_array({3, 4}, 1), wide = random_array({3, 8}, 2), classes = placed(ints({1, 0, 3, 2, 0, 1}));
  const auto entropy = [&](const Tensor& logits, const Tensor& of) {
    return refusal([&] { (void)cross_entropy(logits, of, x.view()); });
  };
  Tensor three = classes.view();
  three.shape[0] = 3;
  (void)cross_entropy(x.view(), three, x.view());
  Tensor every_other = three, absent = three, elsewhere = three;
  every_other.strides[0] = 2;
  EXPECT_TRUE(contains(entropy(x.view(), every_other), "classes is [3], its elements not one behind the other"));
  absent.data = nullptr;
  EXPECT_EQ(entropy(x.view(), absent), "classes is [3] but its data is null");
  elsewhere.device = {DeviceKind::kCuda, 7};
  EXPECT_TRUE(contains(entropy(x.view(), elsewhere), "classes is on cuda:7 but logits is on "));
  Tensor negative = three;
  negative.rank = 2;
  negative.shape = {-1, -3};
  negative.strides = {-3, 1};
  EXPECT_TRUE(contains(entropy(x.view(), negative), "classes is int32 [-1, -3]"));
  const Array whole(DType::kInt32, {3, 4}, kDevice);
  EXPECT_EQ(refusal([&] { (void)cross_entropy(whole.view(), three, whole.view()); }),
            "logits is int32 but must be fp32, fp16 or bf16");
  EXPECT_EQ(refusal([&] { (void)mean_square(whole.view(), whole.view(), whole.view()); }),
            "out is int32 but must be fp32, fp16 or bf16");
  Tensor spread = wide.view(), nowhere = x.view();
  spread.shape[1] = 4;
  spread.strides[1] = 2;
  nowhere.data = nullptr;
  EXPECT_EQ(entropy(spread, three), "logits's last dimension must be contiguous, but its stride is 2");
  EXPECT_EQ(entropy(nowhere, three), "logits is [3, 4] but its data is null");
  EXPECT_TRUE(
      contains(refusal([&] { (void)mean_square(spread, x.view(), x.view()); }), "out's last dimension must be c"));
}

// ---- memory

TEST(Memory, OfTrainingGrowsWithTheLengthAndNotItsSquare) {
  auto options = dropping();
  options.recompute = true;
  const auto peak_of = [&](std::int64_t length) {
    TransformerEncoderLayer layer(options);
    const Array x = random_array({1, length, 24}, 1);
    (void)peak_bytes(kDevice, true);
    const auto result = layer.forward(x.view(), AttentionCall{.causal = Causal::kTopLeft, .training = true});
    (void)layer.backward(*result.state, x.view());
    return static_cast<double>(peak_bytes(kDevice));
  };
  const double always = peak_of(8);  // on a GPU also the matrix products' workspace of 32 MiB
  std::vector<double> most;
  for (const std::int64_t length : {1000, 2000, 4000}) most.push_back(peak_of(length) - always);
  EXPECT_GT(most[2] - most[1], 4000.0 * 24 * sizeof(float));  // so that it measures something
  // Not the differences: results of split keys take a GPU as much for each of these lengths.
  EXPECT_LT(most[1], 2.2 * most[0]);
  EXPECT_LT(most[2], 2.2 * most[1]);
  EXPECT_LT(most[2], 4000.0 * 4000);  // not a byte for each entry
}

// ---- bounds and errors

TEST(Layers, OfNoRowsGiveNoRows) {
  TransformerEncoderLayer layer(dropping());
  const Array x(DType::kFloat32, {2, 0, 24}, kDevice);
  AttentionCall call;
  call.training = true;
  const auto result = layer.forward(x.view(), call);
  EXPECT_EQ(result.out.view().shape[1], 0);
  EXPECT_EQ(layer.backward(*result.state, result.out.view()).view().shape[2], 24);
}

TEST(Layers, OfAnEmptyBatchGiveAnEmptyBatch) {
  const Array x(DType::kFloat32, {0, 3, 24}, kDevice), padding(DType::kBool, {0, 3}, kDevice);
  const Array mask(DType::kFloat32, {3, 3}, kDevice), rows(DType::kFloat32, {0, 24}, kDevice), no_ends = ints({0});
  for (const bool norm_first : {false, true}) {
    TransformerEncoderLayer::Options options = dropping();
    options.norm_first = norm_first;
    TransformerEncoder stack({.layer = options, .num_layers = 2, .norm = true});
    for (const AttentionCall& given : {AttentionCall{}, AttentionCall{.key_padding_mask = padding.view()},
                                       AttentionCall{.key_padding_mask = padding.view(), .attn_mask = mask.view()},
                                       AttentionCall{.cu_seqlens_q = no_ends.view()}}) {
      AttentionCall call = given;
      call.training = true;
      const Array& empty = call.cu_seqlens_q.defined() ? rows : x;
      const auto result = stack.forward(empty.view(), call);
      EXPECT_EQ(result.out.view().shape, empty.view().shape);
      EXPECT_EQ(stack.backward(*result.state, result.out.view()).view().shape, empty.view().shape);
    }
    stack.visit("", [](const std::string& name, Parameter& p) {
      if (!p.gradient.defined()) return;
      for (const double d : values(p.gradient)) ASSERT_EQ(d, 0.0) << name;
    });
  }
  MultiheadAttention layer({.embed_dim = 24,
                            .num_heads = 4,
                            .add_bias_kv = true,
                            .add_zero_attn = true,
                            .batch_first = true,
                            .device = kDevice});
  for (const bool average : {false, true}) {
    const auto result = layer.forward(
        x.view(), x.view(), x.view(),
        {.key_padding_mask = padding.view(), .training = true, .need_weights = true, .average_attn_weights = average});
    EXPECT_EQ(result.weights.view().shape[0], 0);
    EXPECT_EQ(result.weights.view().shape[result.weights.view().rank - 1], 5);
    EXPECT_EQ(layer.backward(*result.state, x.view()).query.view().shape, x.view().shape);
  }
}

TEST(Layers, RefuseWhatCannotBeInOneSentence) {
  const auto attention = [](MultiheadAttention::Options o) {
    return refusal([&] { const MultiheadAttention layer(o); });
  };
  EXPECT_EQ(attention({.embed_dim = 10, .num_heads = 4}),
            "embed_dim (10) must be a multiple of num_heads (4), or head_dim be given");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .num_kv_heads = 3}),
            "num_heads (4) must be a multiple of num_kv_heads (3)");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .rotary = Rotary{.dim = 3}}),
            "rotary dim (3) must be even, 2 to head_dim (2)");
  EXPECT_EQ(attention({.embed_dim = 8, .num_heads = 4, .dtype = DType::kInt32}),
            "a layer's dtype (int32) must be fp32, fp16 or bf16");

  const MultiheadAttention layer({.embed_dim = 8, .num_heads = 2, .batch_first = true, .device = kDevice});
  const Array x = random_array({2, 3, 8}, 1), narrow = random_array({2, 3, 7}, 1), other = random_array({1, 3, 8}, 1);
  const Array mask(DType::kBool, {3, 4}, kDevice), half(DType::kFloat16, {2, 3, 8}, kDevice), numbers = ints({0, 4, 3});
  const auto call = [&](const Array& q, const Array& kv, const AttentionCall& c) {
    return refusal([&] { (void)layer.forward(q.view(), kv.view(), kv.view(), c); });
  };
  EXPECT_TRUE(contains(call(narrow, x, {}), "query is [2, 3, 7] but must have 8 features"));
  EXPECT_TRUE(contains(call(half, x, {}), "query is fp16 but the layer is fp32"));
  Tensor elsewhere = x.view();
  elsewhere.device = {.kind = kDevice.kind == DeviceKind::kCpu ? DeviceKind::kCuda : DeviceKind::kCpu, .index = 3};
  EXPECT_EQ(refusal([&] { (void)layer.forward(elsewhere, elsewhere, elsewhere); }),
            "query is on " + name(elsewhere.device) + " but the layer is on " + name(kDevice));
  elsewhere.device.kind = kDevice.kind;
  const Array square(DType::kBool, {3, 3}, kDevice);
  Tensor far_mask = square.view();
  far_mask.device = elsewhere.device;
  const auto far = [&] { (void)layer.forward(x.view(), x.view(), x.view(), {.attn_mask = far_mask}); };
  if (kDevice.kind == DeviceKind::kCpu) {  // of which there is one, whatever its index
    EXPECT_NO_THROW((void)layer.forward(elsewhere, elsewhere, elsewhere));
    EXPECT_NO_THROW(far());
  } else {
    EXPECT_EQ(refusal(far), "attn_mask is on " + name(far_mask.device) + " but the layer is on " + name(kDevice));
  }
  EXPECT_TRUE(contains(call(x, other, {}), "query has 2 sequences but key has 1"));
  EXPECT_TRUE(contains(call(x, x, {.attn_mask = mask.view()}), "attn_mask is [3, 4] but must be [3, 3] or [4, 3, 3]"));
  EXPECT_TRUE(contains(call(x, x, {.key_padding_mask = mask.view()}), "key_padding_mask is [3, 4] but must be [2, 3]"));
  EXPECT_TRUE(contains(call(x, x, {.cu_seqlens_q = numbers.view()}), "packed sequences are [total, features]"));
  const Array rows = random_array({3, 8}, 1);
  EXPECT_TRUE(contains(call(rows, rows, {.cu_seqlens_q = numbers.view()}), "decreases at sequence 1"));
  if (cuda::why_no_driver().empty()) return;
  EXPECT_TRUE(
      contains(words(ErrorCode::kDevice,
                     [] { const Linear l({.in_features = 1, .out_features = 1, .device = {DeviceKind::kCuda}}); }),
               cuda::why_no_driver()));
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
  MultiheadAttention narrow({.embed_dim = 24, .num_heads = 4, .batch_first = true, .device = kDevice});
  MultiheadAttention wide({.embed_dim = 24, .num_heads = 4, .batch_first = true, .head_dim = 7, .device = kDevice});
  const auto of_attention = narrow.forward(x.view(), x.view(), x.view(), call);
  EXPECT_TRUE(contains(refusal([&] { (void)wide.backward(*of_attention.state, x.view()); }), "of another layer's"));
}

}  // namespace
}  // namespace fovea::test
