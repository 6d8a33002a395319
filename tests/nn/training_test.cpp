// What a training loop may count on besides the numbers of a step.  On the CPU, or with FOVEA_LAYERS_DEVICE=cuda on a
// GPU.
#include <fovea/nn/nn.h>
#include <gtest/gtest.h>
#include <tbb/task_arena.h>

#include <cmath>
#include <cstdlib>
#include <optional>
#include <vector>

#include "tests/support.h"

namespace fovea::test {
namespace {

using namespace nn;

const Device kDevice{std::getenv("FOVEA_LAYERS_DEVICE") == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda};

/// A view of fp32 numbers on the host, shaped as the array is.
Tensor on_host(std::vector<float>& numbers, const Array& like) {
  numbers.resize(like.size_bytes() / sizeof(float));
  Tensor host = like.view();
  host.data = numbers.data();
  host.device = {};
  return host;
}

std::vector<float> values(const Array& a) {
  std::vector<float> numbers;
  copy(a.view(), on_host(numbers, a));
  return numbers;
}

/// sin(first), sin(first + 1), …
Array waves(std::initializer_list<std::int64_t> shape, float first = 0.0F) {
  Array a(DType::kFloat32, shape, kDevice);
  std::vector<float> numbers;
  const Tensor host = on_host(numbers, a);
  for (float& number : numbers) number = std::sin(first++);
  copy(host, a.view());
  return a;
}

TEST(Copy, ToBoolTellsWhetherANumberIsNotZero) {
  const float numbers[] = {0.0F, 0.5F, -1.0F, 2.0F, 256.0F, NAN};
  const Array bools(DType::kBool, {6}, kDevice), on_device(DType::kFloat32, {6}, kDevice);
  copy(Tensor::contiguous(numbers, DType::kFloat32, {6}), on_device.view());
  copy(on_device.view(), bools.view());
  Array host(DType::kBool, {6});
  copy(bools.view(), host.view());
  const auto* bytes = static_cast<const std::uint8_t*>(host.view().data);
  EXPECT_EQ(std::vector<std::uint8_t>(bytes, bytes + 6), (std::vector<std::uint8_t>{0, 1, 1, 1, 1, 1}));
}

TEST(Copy, OfIntegersKeepsThoseThatNoFloatIs) {
  std::vector<std::int32_t> numbers{16777217, 0, -16777219, 0, 2147483647, 0};
  const Array every(DType::kInt32, {6}, kDevice), second(DType::kInt32, {3}, kDevice);
  copy(Tensor::contiguous(numbers.data(), DType::kInt32, {6}), every.view());
  Tensor strided = every.view();
  strided.shape[0] = 3, strided.strides[0] = 2;
  copy(strided, second.view());
  std::vector<std::int32_t> got(3);
  copy(second.view(), Tensor::contiguous(got.data(), DType::kInt32, {3}));
  EXPECT_EQ(got, (std::vector<std::int32_t>{16777217, -16777219, 2147483647}));
}

TEST(AdamWStep, OfAParameterIsTheFirstWhereItsFirstGradientIs) {
  Linear layer({.in_features = 1, .out_features = 1, .device = kDevice});
  AdamW optimiser(layer, {.lr = 0.125F, .weight_decay = 0.0F});
  layer.bias.gradient = waves({1}, 1.5F);
  for (int step = 0; step < 9; ++step) optimiser.step();
  const float before = values(layer.weight.value)[0];
  layer.weight.gradient = waves({1, 1}, 1.5F);
  optimiser.step();
  EXPECT_NEAR(values(layer.weight.value)[0], before - 0.125F, 1e-5F);  // the whole rate, as every first step
}

TEST(State, OutlivesItsLayer) {
  const MultiheadAttention::Options options{
      .embed_dim = 8, .num_heads = 4, .batch_first = true, .alibi = true, .device = kDevice};
  const Array x = waves({2, 5, 8}), dout = waves({2, 5, 8}, 7.0F);
  std::optional<MultiheadAttention> layer(options);
  const auto result = layer->forward(x.view(), x.view(), x.view());
  const auto expected = values(layer->backward(*result.state, dout.view()).query);
  layer.reset();
  std::vector<Array> in_its_place(50);  // whoever comes next into the memory of what the layer held
  for (Array& next : in_its_place) next = waves({4});
  MultiheadAttention alike(options);
  const auto got = values(alike.backward(*result.state, dout.view()).query);
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], expected[i], 1e-5F);
}

TEST(Threads, AreAsManyAsTheCallerMayUseNow) {
  if (kDevice.kind != DeviceKind::kCpu) GTEST_SKIP() << "of the CPU's";
  const MultiheadAttention layer({.embed_dim = 64, .num_heads = 2, .batch_first = true});
  const Array x = waves({2, 333, 64});
  // Every thread of attention has scratch of its own.
  const auto peak_within = [&](int threads) {
    return tbb::task_arena(threads).execute([&] {
      (void)peak_bytes(kDevice, true);
      (void)layer.forward(x.view(), x.view(), x.view());
      return peak_bytes(kDevice);
    });
  };
  const std::size_t of_many = peak_within(8), of_one = peak_within(1);
  EXPECT_LT(of_one, of_many);
  EXPECT_EQ(peak_within(8), of_many);
}

}  // namespace
}  // namespace fovea::test
