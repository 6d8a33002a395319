#include "gpu.h"

#include <fovea/error.h>

#include <algorithm>
#include <string>

#include "cuda/driver.h"
#include "cuda/jit/cache.h"
#include "embedded.h"
#include "launches.h"

// A rung on a GPU: its text compiled by the library's own rooms, launched kernel by kernel.
namespace fovea::ladder {
namespace {

/// A rung's pages, in the order in which they are compiled.
std::string text_of(int rung, Direction pass) {
  std::string text = std::string(text::params_h) + std::string(text::vocabulary_cuh);
  const bool backward = pass == Direction::kBackward;
  if (rung == 0) return text.append(text::rung0_cuh).append(text::rung0_backward_cuh);
  if (rung == 3) return text.append(backward ? text::rung3_backward_cuh : text::rung3_cuh);
  if (rung == 1) return text.append(backward ? text::rung1_backward_cuh : text::rung1_cuh);
  return text.append(text::rung1_cuh).append(text::rung1_backward_cuh).append(text::rung2_cuh);
}

cuda::jit::KernelRequest request(const Launch& launch, int rung, const Problem& problem, Direction pass, int arch) {
  const std::string dim = std::to_string(problem.head_dim), function = launch.function;
  const bool half = problem.dtype == DType::kFloat16;
  std::string word = function.substr(0, function.find('<'));
  if (const std::size_t at = function.find("::k"); at != std::string::npos)
    word += "_" + function.substr(at + 3, function.size() - at - 4);
  return {.name = "ladder" + std::to_string(rung) + "_" + word + (half ? "_fp16_d" : "_bf16_d") + dim,
          .unit = text_of(rung, pass) + "\nnamespace fovea::ladder {\nconstexpr Spec kSpec{.type = Type::" +
                  (half ? "kFloat16" : "kBFloat16") + ", .head_dim = " + dim +
                  "};\nextern \"C\" __global__ __launch_bounds__(" + std::to_string(launch.threads) + ", 1) void " +
                  cuda::jit::kEntryPoint + "(const __grid_constant__ Params params) {\n  " + function +
                  "(params);\n}\n}  // namespace fovea::ladder\n",
          .arch = arch,
          .threads = launch.threads,
          .shared_bytes = launch.shared_bytes};
}

class GpuRung final : public PlannedKernel {
 public:
  GpuRung(int rung, const Problem& problem, Direction pass, int gpu)
      : rung_(rung), problem_(problem), pass_(pass), launches_(launches(rung, problem, pass)) {
    const int arch = cuda::jit::arch_of(cuda::gpu(gpu).compute_capability);
    for (const Launch& launch : launches_)
      kernels_.push_back(&cuda::jit::Cache::shared().load(request(launch, rung, problem, pass, arch), gpu));
  }

  [[nodiscard]] std::size_t workspace_bytes() const override {
    Params p = describe_params(problem_);
    return lay_out(p, rung_, problem_, pass_, nullptr);
  }
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    std::vector<std::pair<std::string, std::string>> list;
    for (const cuda::jit::Kernel* kernel : kernels_)
      list.emplace_back(kernel->binary().name, std::to_string(kernel->binary().registers) + " registers");
    return list;
  }
  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    Params p = describe_params(problem_);
    attach(p, pass_, inputs, outputs);
    lay_out(p, rung_, problem_, pass_, static_cast<std::byte*>(workspace));
    for (std::size_t i = 0; i < launches_.size(); ++i) {
      if (launches_[i].blocks == 0) continue;
      kernels_[i]->launch({.x = static_cast<unsigned>(launches_[i].blocks),
                           .threads = static_cast<unsigned>(launches_[i].threads),
                           .shared_bytes = static_cast<unsigned>(launches_[i].shared_bytes)},
                          p, stream);
    }
  }

 private:
  int rung_;
  Problem problem_;
  Direction pass_;
  std::vector<Launch> launches_;
  std::vector<const cuda::jit::Kernel*> kernels_;
};

}  // namespace

std::shared_ptr<const PlannedKernel> plan_on_gpu(int rung, const Problem& problem, Direction pass, int gpu) {
  return std::make_shared<GpuRung>(rung, problem, pass, gpu);
}

std::vector<cuda::jit::KernelRequest> requests(int arch) {
  std::vector<cuda::jit::KernelRequest> all;
  if (arch < kLeastCapability) return all;
  Problem problem;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int dim : {64, 128}) {
      problem.dtype = dtype;
      problem.head_dim = dim;
      for (int rung = 0; rung < kRungs; ++rung) {
        for (const Direction pass : {Direction::kForward, Direction::kBackward}) {
          for (const Launch& launch : launches(rung, problem, pass))
            all.push_back(request(launch, rung, problem, pass, arch));
        }
      }
    }
  }
  return all;
}

}  // namespace fovea::ladder
