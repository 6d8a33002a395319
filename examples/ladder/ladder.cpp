#include "ladder.h"

#include <fovea/error.h>

#include <array>
#include <limits>

#include "cpu.h"
#include "cuda/driver.h"
#include "gpu.h"
#include "launches.h"

namespace fovea::ladder {
namespace {

constexpr std::array<Description, kRungs> kDescriptions{
    {{"the formula", "S and P are N × N matrices in memory"},
     {"FlashAttention", "tiles and online softmax, one block a head"},
     {"over the sequence", "the same, blocks of a head's queries and keys side by side"},
     {"FlashAttention-2", "queries outside, O divided once, queries split among warps"}}};

[[noreturn]] void refuse(int rung, const Problem& problem, const std::string& why) {
  throw Error(ErrorCode::kUnsupported, "rung " + std::to_string(rung) + " does not run '" + to_string(problem) +
                                           "': " + why + "; ask the library itself (fovea bench) for it");
}

/// The rungs show their ideas on the plainest of problems.
void require_plain(int rung, const Problem& problem) {
  Problem plain;
  plain.direction = problem.direction;
  plain.dtype = problem.dtype;
  plain.batch = problem.batch;
  plain.num_q_heads = plain.num_kv_heads = problem.num_q_heads;
  plain.seqlen_q = problem.seqlen_q;
  plain.seqlen_kv = problem.seqlen_kv;
  plain.head_dim = plain.head_dim_v = problem.head_dim;
  plain.causal = problem.causal;
  plain.layout = problem.layout;
  if (plain != problem) refuse(rung, problem, "the ladder takes plain and causal attention, without other options");
}

void require_fit(int rung, const Problem& problem, Direction pass, int gpu) {
  constexpr int kLongest = 1 << 29;
  if (problem.dtype == DType::kFloat32) refuse(rung, problem, "on a GPU the ladder takes fp16 and bf16");
  if (problem.head_dim != 64 && problem.head_dim != 128) {
    refuse(rung, problem,
           "on a GPU the ladder takes head dims 64 and 128, and this one is " + std::to_string(problem.head_dim));
  }
  if (problem.seqlen_q >= kLongest || problem.seqlen_kv >= kLongest || problem.batch * problem.num_q_heads >= kLongest)
    refuse(rung, problem, "lengths and heads must be below 2^29");
  const cuda::Gpu& device = cuda::gpu(gpu);
  if (device.compute_capability < kLeastCapability) {
    refuse(rung, problem,
           "it needs compute capability 8.0 or newer, and this GPU has " +
               std::to_string(device.compute_capability / 10) + "." + std::to_string(device.compute_capability % 10));
  }
  for (const Launch& launch : launches(rung, problem, pass)) {
    if (launch.blocks > std::numeric_limits<int>::max())
      refuse(rung, problem, "a kernel of it would have " + std::to_string(launch.blocks) + " blocks, more than 2^31");
    if (launch.shared_bytes > device.shared_bytes_per_block) {
      refuse(rung, problem,
             "a block of it takes " + std::to_string(launch.shared_bytes) +
                 " bytes of shared memory, and this GPU gives " + std::to_string(device.shared_bytes_per_block));
    }
  }
}

}  // namespace

Description describe(int rung) { return kDescriptions.at(static_cast<std::size_t>(rung)); }

Plan plan(int rung, const Problem& problem, Direction pass, const Device& device) {
  Report report{.problem = problem, .device = device, .backend = "rung " + std::to_string(rung)};
  report.problem.direction = pass;
  require_plain(rung, report.problem);
  const bool on_gpu = device.kind == DeviceKind::kCuda;
  if (on_gpu) {
    require_fit(rung, report.problem, pass, device.index);
  } else if (problem.dtype != DType::kFloat32) {
    refuse(rung, problem, "on a CPU the ladder takes fp32");
  }
  const auto kernel =
      on_gpu ? plan_on_gpu(rung, report.problem, pass, device.index) : plan_on_cpu(rung, report.problem, pass);
  report.details = kernel->details();
  report.workspace_bytes = kernel->workspace_bytes();
  return {std::move(report), kernel};
}

}  // namespace fovea::ladder
