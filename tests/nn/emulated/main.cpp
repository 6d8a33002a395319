// The layers' tests on the emulated GPU: its kernels come from a pack whose cubins are their names, and attention,
// which is not emulated, is the CPU's over the same memory.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "cpu/elements.h"
#include "cuda/jit/pack.h"
#include "nn/cuda/kernels.h"
#include "nn/ops.h"

namespace fovea::nn {
namespace {

Tensor on_cpu(Tensor t) {
  t.device = {};
  return t;
}

AttentionOptions on_cpu(AttentionOptions options) {
  for (Tensor* t : {&options.mask, &options.bias, &options.alibi_slopes, &options.sink, &options.q_lengths,
                    &options.kv_lengths, &options.cu_seqlens_q, &options.cu_seqlens_kv}) {
    t->device = {};
  }
  return options;
}

}  // namespace

// In place of src/nn/attend.cpp.
void attend(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, const Tensor& out,
            const Tensor& lse) {
  if (cpu::element_count(out) == 0) return;
  attention_forward(on_cpu(q), on_cpu(k), on_cpu(v), on_cpu(options), on_cpu(out), on_cpu(lse));
}

void attend_gradient(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     const Tensor& dout, const AttentionOptions& options, const Gradients& gradients) {
  if (cpu::element_count(q) + cpu::element_count(k) == 0) return;
  attention_backward(on_cpu(q), on_cpu(k), on_cpu(v), on_cpu(out), on_cpu(lse), on_cpu(dout), on_cpu(options),
                     {.dq = on_cpu(gradients.dq), .dk = on_cpu(gradients.dk), .dv = on_cpu(gradients.dv)});
}

}  // namespace fovea::nn

namespace {

using namespace fovea;

void write_pack(const std::filesystem::path& path) {
  std::vector<cuda::jit::Binary> binaries;
  for (std::size_t i = 0; i < nn::kKernelNames; ++i) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const auto request = nn::kernel_request(static_cast<nn::KernelName>(i), dtype, 90);
      cuda::jit::Binary& binary = binaries.emplace_back();
      binary.key = content_key(request);
      binary.name = binary.cubin = request.name;
      binary.arch = request.arch;
      binary.compiler = "none";
    }
  }
  cuda::jit::Pack::write(path, binaries);
}

}  // namespace

int main(int count, char** words) {
  ::testing::InitGoogleTest(&count, words);
  const std::string pack =
      std::filesystem::temp_directory_path() / ("fovea-emulated-" + std::to_string(::getpid()) + ".pack");
  write_pack(pack);
  ::setenv("FOVEA_PACK", pack.c_str(), 1);
  ::setenv("FOVEA_JIT", "off", 1);
  const int status = RUN_ALL_TESTS();
  std::filesystem::remove(pack);
  return status;
}
