#include "nn/cuda/kernels.h"

#include <fovea/error.h>

#include "cuda/jit/render.h"

namespace fovea::nn {
namespace {

struct Text {
  const char *function, *header, *params;
};
constexpr const char *kRows = "nn/cuda/kernels/rows.cuh", *kElements = "nn/cuda/kernels/elements.cuh";
constexpr std::array<Text, kKernelNames> kTexts{{{"finish", kRows, "FinishParams"},
                                                 {"finish_gradient", kRows, "FinishParams"},
                                                 {"norm", kRows, "NormParams"},
                                                 {"norm_gradient", kRows, "NormParams"},
                                                 {"column_sums", kRows, "ColumnSumParams"},
                                                 {"add_up", kRows, "AddUpParams"},
                                                 {"rotate", kRows, "RotateParams"},
                                                 {"squares", kRows, "LossParams"},
                                                 {"entropies", kRows, "LossParams"},
                                                 {"adamw", kRows, "AdamWParams"},
                                                 {"pointwise", kElements, "PointwiseParams"},
                                                 {"place_rows", kElements, "PlaceParams"},
                                                 {"lengths", kElements, "LengthsParams"},
                                                 {"put", kElements, "PutParams"},
                                                 {"move_rows", kElements, "MoveRowsParams"}}};
static_assert(kTexts.back().function != nullptr);

int arch_of_gpu(int gpu) {
  const int capability = cuda::gpu(gpu).compute_capability, arch = cuda::jit::arch_of(capability);
  if (arch != 0) return arch;
  throw Error(ErrorCode::kUnsupported, "cuda:" + std::to_string(gpu) + " is of compute capability " +
                                           std::to_string(capability) +
                                           ", for which there are no kernels; layers run "
                                           "on those from 75 on");
}

}  // namespace

cuda::jit::KernelRequest kernel_request(KernelName name, DType dtype, int arch) {
  const Text& text = kTexts.at(static_cast<std::size_t>(name));
  const cuda::jit::Template kernel{.function = text.function,
                                   .header = text.header,
                                   .spec = "LayerSpec",
                                   .params = text.params,
                                   .threads = cuda::kLayerThreads};
  return cuda::jit::render(kernel, cuda::LayerSpec{static_cast<cuda::Type>(dtype)}, arch);
}

Kernels::Kernels(int gpu) : gpu_(gpu), arch_(arch_of_gpu(gpu)) {}

const cuda::jit::Kernel& Kernels::of(KernelName name, DType dtype) const {
  auto& slot = loaded_.at(static_cast<std::size_t>(name)).at(static_cast<std::size_t>(dtype));
  const cuda::jit::Kernel* kernel = slot.load(std::memory_order_acquire);
  if (kernel == nullptr) {  // the cache makes it once, whoever comes first
    kernel = &cuda::jit::Cache::shared().load(kernel_request(name, dtype, arch_), gpu_);
    slot.store(kernel, std::memory_order_release);
  }
  return *kernel;
}

}  // namespace fovea::nn
