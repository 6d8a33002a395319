#pragma once

#include <fovea/error.h>
#include <fovea/plan.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <vector>

#include "cuda/driver.h"
#include "workload.h"

namespace fovea::tools {

/// A plan for one direction of a problem.
[[nodiscard]] inline Plan plan_pass(const Problem& problem, Direction direction, const Device& device,
                                    const PlanOptions& options) {
  return (direction == Direction::kForward ? plan_forward : plan_backward)(problem, device, options);
}

/// A call that was not run because its GPU had failed in another one.
class GpuLost : public Error {
 public:
  using Error::Error;
};

/// Where calls run: the CPU, or a GPU through one stream.
class Place {
 public:
  explicit Place(const Device& device);  ///< throws Error where there is no such GPU

  [[nodiscard]] const Device& device() const { return device_; }
  [[nodiscard]] bool on_gpu() const { return stream_.has_value(); }
  [[nodiscard]] void* stream() const { return on_gpu() ? stream_->get() : nullptr; }
  [[nodiscard]] const cuda::Stream& gpu_stream() const { return *stream_; }

  void synchronize() const;

  /// Runs what uses the GPU, one caller at a time, and waits for it; on the CPU callers do not wait for each other.  A
  /// GPU that has failed serves nobody any more: who comes later gets a GpuLost.
  void take_turn(const std::function<void()>& work);

  /// Runs what makes a call ready, beside other callers' turns: their faults are not this call's.
  template <class Work>
  auto prepare(const Work& work) {
    try {
      return work();
    } catch (const Error& error) {
      if (error.code() == ErrorCode::kDevice) take_turn([] {});
      throw;
    }
  }

  /// How long `work` takes: by the clock, or between two events in the stream, with nothing of the operands in L2.
  [[nodiscard]] double seconds_of(const std::function<void()>& work);

  /// Bytes read plus bytes written in a second by a large copy within the GPU's memory, measured now; 0 on the CPU.
  [[nodiscard]] double copy_rate();

 private:
  Device device_;
  std::optional<cuda::Stream> stream_;
  std::mutex mutex_;
  bool failed_ = false;         // guarded by the mutex
  cuda::DeviceMemory scratch_;  // made when first timed
};

/// A plan's workspace, followed on a GPU by guard bytes.
class Workspace {
 public:
  Workspace(const Place& place, std::size_t bytes);

  [[nodiscard]] void* data() const { return begin_; }
  void fill(int byte) const;           ///< queued into the place's stream
  [[nodiscard]] bool overrun() const;  ///< waits for the stream

 private:
  const Place* place_;
  std::size_t bytes_;
  std::vector<std::byte> host_;
  cuda::DeviceMemory memory_;
  void* begin_ = nullptr;
};

/// A call's tensors where its plans run.  On the CPU they are the caller's own.  On a GPU they are copies that keep
/// strides, gaps and alignment: an input ends where its memory ends, so that compute-sanitizer sees a read past it;
/// guard bytes lie on both sides of what is written.
class PlacedCall {
 public:
  PlacedCall(const Place& place, const Inputs& inputs, const Outputs& outputs,
             const std::vector<Allocation>& allocations);

  [[nodiscard]] const Inputs& inputs() const { return inputs_; }
  [[nodiscard]] const Outputs& outputs() const { return outputs_; }

  void upload() const;  ///< the caller's bytes and fresh guards; queued into the place's stream
  void execute(const Plan& plan, const Workspace& workspace) const;
  void download() const;  ///< everything, inputs too, back into the caller's memory; waits for the stream

  /// Whether a guard has been written since the upload; waits for the stream.
  [[nodiscard]] bool overrun() const;

 private:
  struct Copy {
    Allocation host;
    cuda::DeviceMemory memory;
    std::size_t front = 0;  // bytes before the tensors'
    std::size_t back = 0;   // guard bytes after them
    [[nodiscard]] std::byte* begin() const { return static_cast<std::byte*>(memory.data()) + front; }
  };
  [[nodiscard]] Tensor moved(Tensor tensor) const;

  const Place* place_;
  Inputs inputs_;
  Outputs outputs_;
  std::vector<Copy> copies_;
};

}  // namespace fovea::tools
