#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/planned_call.h"

// Kernels load and store rows in pieces of 16 bytes at multiples of 16.  What lies otherwise is copied before a pass,
// to the end of its workspace.
namespace fovea::cuda {

/// The kernel that copies.
class CopyingRows {
 public:
  CopyingRows(const Device& device, int arch);
  [[nodiscard]] std::string describe() const { return launch_.describe(); }
  /// At most kMostCopies, all at once.
  void run(std::span<const RowCopy> copies, const Device& device, void* stream) const;

 private:
  PlannedLaunch launch_;
};
[[nodiscard]] jit::KernelRequest copy_rows_request(int arch);

/// A bias that Hopper's copy engine cannot read where it lies.
class AlignedBias {
 public:
  AlignedBias(const Problem& problem, std::size_t workspace_bytes, const Device& device);

  /// Of the whole workspace, what comes before included.
  [[nodiscard]] std::size_t workspace_bytes() const { return bytes_; }
  /// For the plan's report.
  void describe(std::vector<std::pair<std::string, std::string>>& details) const;

  /// Has p.bias lead to the copy, unless it can be read as it is.
  void make(CallParams& p, void* workspace, void* stream) const;

 private:
  Device device_;
  std::size_t begin_, bytes_;
  std::int64_t row_bytes_ = 0;
  std::optional<CopyingRows> copying_;
};
/// Whether there is one: rows without gaps are no whole pieces.
[[nodiscard]] bool copies_bias(const Problem& problem);

/// The problem that kernels run: with head dims rounded up to whole pieces, unless keys are so few that copies of rows
/// with zeros behind each cost more than they save.
[[nodiscard]] Problem padded(const Problem& problem);
/// A plan of `problem` by one of `padded(problem)`.
[[nodiscard]] std::shared_ptr<const PlannedKernel> plan_by_padded(const Problem& problem,
                                                                  std::shared_ptr<const PlannedKernel> plan,
                                                                  const Device& device, int arch);

}  // namespace fovea::cuda
