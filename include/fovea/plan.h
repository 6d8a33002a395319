#pragma once

#include <fovea/problem.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace fovea {

/// Which random numbers a dropout uses.
struct DropoutDraws {
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
};

/// What a plan reads.  Shapes with B = batch, H = num_q_heads, G = num_kv_heads; packed problems drop the batch axis
/// and put total_q, total_kv in place of the lengths.  q, k, v, out and dout are Problem::dtype.  A tensor the problem
/// does not name stays undefined.  Those of the other direction, here and in Outputs, are not looked at: one pair
/// of structs may serve both plans.
struct Inputs {
  Tensor q{};              ///< [B, seqlen_q, H, head_dim]
  Tensor k{};              ///< [B, seqlen_kv, G, head_dim]
  Tensor v{};              ///< [B, seqlen_kv, G, head_dim_v]
  Tensor mask{};           ///< bool, broadcast of [B, H, seqlen_q, seqlen_kv] as Problem::mask says
  Tensor bias{};           ///< Problem::bias_dtype, likewise
  Tensor alibi_slopes{};   ///< fp32 [H] or [B, H]
  Tensor sink{};           ///< fp32 [H]
  Tensor q_lengths{};      ///< int32 [B]
  Tensor kv_lengths{};     ///< int32 [B]
  Tensor cu_seqlens_q{};   ///< int32 [B + 1]
  Tensor cu_seqlens_kv{};  ///< int32 [B + 1]
  Tensor out{};            ///< backward: the forward's out
  Tensor lse{};            ///< backward: the forward's lse
  Tensor dout{};           ///< backward: [B, seqlen_q, H, head_dim_v]
  Tensor dlse{};           ///< backward, optional: fp32 [B, H, seqlen_q], the gradient that came in through lse
  /// With dropout, optional: takes the place of the problem's seed and offset, so that one plan serves all steps.
  std::optional<DropoutDraws> dropout_draws{};
};

/// What a plan writes, every element of it.
struct Outputs {
  Tensor out{};  ///< forward: [B, seqlen_q, H, head_dim_v], dtype of q
  Tensor lse{};  ///< forward, optional: fp32 [B, H, seqlen_q], natural logarithm (packed: [H, total_q])
  Tensor dq{};   ///< backward: shape and dtype of q
  Tensor dk{};
  Tensor dv{};
  Tensor dbias{};          ///< backward, optional: shape and dtype of bias, summed over its broadcast dimensions
  Tensor dalibi_slopes{};  ///< backward, optional: fp32, shape of alibi_slopes
  Tensor dsink{};          ///< backward, optional: fp32 [H]
};

/// One backend's answer to a problem.
struct Verdict {
  std::string backend{};
  bool available = true;               ///< this device could run the backend at all
  std::vector<std::string> reasons{};  ///< why not; empty: it supports the problem
};

/// Which backend runs a problem, how, and why the others do not.
struct Report {
  Problem problem{};
  Device device{};
  std::string backend{};                                       ///< that runs it; empty where none does
  std::vector<std::pair<std::string, std::string>> details{};  ///< instruction set, tiles, threads, ...
  std::size_t workspace_bytes = 0;
  std::vector<Verdict> verdicts{};  ///< every backend asked, in order of preference
};

/// The report as several lines of text.
[[nodiscard]] FOVEA_API std::string to_string(const Report& report);

class PlannedKernel;  // src/dispatch/backend.h

/// A problem made ready to run: slow once, then `execute` any number of times, from any number of threads, each with a
/// workspace of its own.  `execute` never compiles, allocates device memory or synchronises a stream, so that a CUDA
/// graph may capture it.  Immutable; copies share what was prepared.
class FOVEA_API Plan {
 public:
  Plan(Report report, std::shared_ptr<const PlannedKernel> kernel);  ///< the library's: see plan_forward

  [[nodiscard]] const Report& report() const noexcept { return report_; }
  [[nodiscard]] const Problem& problem() const noexcept { return report_.problem; }
  [[nodiscard]] std::size_t workspace_bytes() const noexcept { return report_.workspace_bytes; }

  /// Runs on the tensors, which must be those of the problem: Error(kInvalidArgument) says which is not, before
  /// anything is written.  `workspace` holds workspace_bytes() on the plan's device, aligned to 64 bytes; its content
  /// does not matter.  Null lets a CPU plan allocate it.  `stream` is a CUstream (cudaStream_t) of the plan's GPU, null
  /// its default stream: work is queued there, and tensors and workspace must live until it is over.  The CPU ignores
  /// it and returns when all is done.
  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace = nullptr, void* stream = nullptr) const;

 private:
  Report report_;
  std::shared_ptr<const PlannedKernel> kernel_;
};

/// Chooses a backend and prepares it.  Error(kInvalidArgument) where the problem breaks the contract,
/// Error(kUnsupported) with every reason where no allowed backend runs it.  Its own direction does not matter.
[[nodiscard]] FOVEA_API Plan plan_forward(const Problem& problem, const Device& device = {}, const PlanOptions& = {});
[[nodiscard]] FOVEA_API Plan plan_backward(const Problem& problem, const Device& device = {}, const PlanOptions& = {});

/// The report alone: a dry run that needs no data, and no GPU where the device names a compute capability.  `backend`
/// is empty where nobody would run it; else errors as above.  A problem of both directions is answered for the forward.
[[nodiscard]] FOVEA_API Report explain(const Problem& problem, const Device& device = {}, const PlanOptions& = {});

}  // namespace fovea
