// The layers' GPU kernels, compiled with no GPU: no spills, no warnings.
#include <gtest/gtest.h>

#include "cuda/nvrtc.h"
#include "nn/cuda/kernels.h"

namespace fovea::test {
namespace {

using nn::KernelName;

bool of_elements(KernelName name) { return name >= KernelName::kPointwise; }

TEST(LayerKernels, CompileWithoutSpills) {
  const cuda::Nvrtc* nvrtc = cuda::Nvrtc::find();
  if (nvrtc == nullptr) GTEST_SKIP() << cuda::Nvrtc::why_none();
  for (const int arch : {75, 90}) {
    if (!nvrtc->knows(arch)) continue;
    for (std::size_t i = 0; i < nn::kKernelNames; ++i) {
      const auto name = static_cast<KernelName>(i);
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        if (of_elements(name) && dtype != DType::kFloat32) continue;  // of any dtype at once
        const cuda::jit::Binary binary = *cuda::jit::Cache::shared().binary(nn::kernel_request(name, dtype, arch));
        EXPECT_EQ(binary.spill_bytes, 0) << binary.name;
        EXPECT_EQ(binary.warnings, "") << binary.name;
        // Two blocks of 256 threads and more on a multiprocessor.
        EXPECT_LE(binary.registers, 96) << binary.name;
        RecordProperty(binary.name + "_sm" + std::to_string(arch), binary.registers);
      }
    }
  }
}

}  // namespace
}  // namespace fovea::test
