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

}  // namespace
}  // namespace fovea::test
