// What the Python layers use of a GPU beside the C++ layers' own pieces, on the emulated one: its memory is the host's.
#include <dlfcn.h>
#include <fovea/nn/array.h>
#include <gtest/gtest.h>

#include "nn/cuda/cublas_lt.h"
#include "nn/cuda/kernels.h"

namespace fovea::nn {
namespace {

constexpr Device kGpu{DeviceKind::kCuda};

float* floats(const Array& array) { return static_cast<float*>(array.view().data); }

TEST(Products, GiveTheSumsOfTheLeftOperandsColumns) {
  constexpr int kRows = 5, kOut = 3, kIn = 2;
  const Array dy(DType::kFloat32, {kRows, kOut}, kGpu), x(DType::kFloat32, {kRows, kIn}, kGpu);
  const Array dw(DType::kFloat32, {kOut, kIn}, kGpu), sums(DType::kFloat32, {kOut}, kGpu);
  for (int i = 0; i < kRows * kOut; ++i) floats(dy)[i] = static_cast<float>(i);
  for (int i = 0; i < kRows * kIn; ++i) floats(x)[i] = static_cast<float>(i % 3);
  const CublasLt products(0);
  ASSERT_TRUE(
      products.multiply({.a = dy.view(), .b = x.view(), .d = dw.view(), .transpose_a = true, .a_sums = sums.view()}));
  for (int out = 0; out < kOut; ++out) {
    float sum = 0.0F, first = 0.0F;
    for (int row = 0; row < kRows; ++row) {
      sum += floats(dy)[row * kOut + out];
      first += floats(dy)[row * kOut + out] * floats(x)[row * kIn];
    }
    EXPECT_EQ(floats(sums)[out], sum);
    EXPECT_EQ(floats(dw)[out * kIn], first);
  }
}

TEST(Products, AreAskedForAgainWhereTheChoiceOfAnAlgorithmHasFailed) {
  const Array a(DType::kFloat32, {1, 2}, kGpu), b(DType::kFloat32, {2, 1}, kGpu), d(DType::kFloat32, {1, 1}, kGpu);
  for (int i = 0; i < 2; ++i) floats(a)[i] = 3.0F, floats(b)[i] = 2.0F;
  const CublasLt products(0);
  const MatrixProduct product{.a = a.view(), .b = b.view(), .d = d.view()};
  void* const library = dlopen("libcublasLt.so.13", RTLD_NOW);
  ASSERT_NE(library, nullptr);
  reinterpret_cast<void (*)()>(dlsym(library, "fail_next_heuristic"))();
  EXPECT_THROW((void)products.multiply(product), Error);
  ASSERT_TRUE(products.multiply(product));
  EXPECT_EQ(floats(d)[0], 12.0F);
  dlclose(library);
}

TEST(MoveRows, TakesTheRowsOfItsIndexAndZerosWhereThatIsNegative) {
  constexpr int kFrom = 3, kTo = 11, kFeatures = 8;
  const Array from(DType::kFloat32, {kFrom, kFeatures}, kGpu), to(DType::kFloat32, {kTo, kFeatures}, kGpu);
  const Array index(DType::kInt32, {kTo}, kGpu);
  for (int i = 0; i < kFrom * kFeatures; ++i) floats(from)[i] = static_cast<float>(i + 1);
  for (int row = 0; row < kTo; ++row) static_cast<int*>(index.view().data)[row] = row % 4 - 1;
  std::fill_n(floats(to), kTo * kFeatures, -1.0F);
  const cuda::MoveRowsParams p{.from = static_cast<const char*>(from.view().data),
                               .to = static_cast<char*>(to.view().data),
                               .index = static_cast<const int*>(index.view().data),
                               .rows = kTo,
                               .pieces = 2};
  Kernels(0).launch(KernelName::kMoveRows, DType::kFloat32, 2, p);
  for (int row = 0; row < kTo; ++row) {
    for (int c = 0; c < kFeatures; ++c) {
      const float wanted = row % 4 == 0 ? 0.0F : floats(from)[(row % 4 - 1) * kFeatures + c];
      EXPECT_EQ(floats(to)[row * kFeatures + c], wanted) << row;
    }
  }
}

}  // namespace
}  // namespace fovea::nn
