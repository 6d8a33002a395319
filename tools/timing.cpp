#include "timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "attention_call.h"

namespace fovea::tools {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Bytes of a tensor's own elements: a dimension of stride 0 holds one.
double bytes_of(const Tensor& tensor) {
  if (!tensor.defined()) return 0.0;
  double bytes = static_cast<double>(size_bytes(tensor.dtype));
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.strides[i] != 0 || tensor.shape[i] == 0) bytes *= static_cast<double>(tensor.shape[i]);
  }
  return bytes;
}

}  // namespace

double Timing::quantile(double share) const {
  if (seconds.empty()) return 0.0;
  const double place = share * static_cast<double>(seconds.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, seconds.size() - 1);
  return std::lerp(seconds[below], seconds[above], place - static_cast<double>(below));
}

std::vector<Timing> measure(std::span<const std::function<double()>> contenders, const Effort& effort,
                            const std::function<void(double)>& progress) {
  constexpr std::size_t kFewest = 3;
  std::vector<Timing> timings(contenders.size());
  double longest = 0.0;
  for (std::size_t i = 0; i < contenders.size(); ++i) {
    timings[i].seconds.push_back(contenders[i]());
    longest = std::max(longest, timings[i].seconds.front());
  }
  if (effort.repeats == 0 && longest > effort.seconds) return timings;
  for (Timing& timing : timings) timing.seconds.clear();

  const double budget = effort.seconds * static_cast<double>(contenders.size());
  const double start = now();
  for (std::size_t done = 0;; ++done) {
    const double spent = (now() - start) / budget;
    const double share = effort.repeats > 0 ? static_cast<double>(done) / effort.repeats
                                            : std::min(spent, static_cast<double>(done) / kFewest);
    if (share >= 1.0) break;
    if (progress) progress(share);
    for (std::size_t i = 0; i < contenders.size(); ++i) timings[i].seconds.push_back(contenders[i]());
  }
  for (Timing& timing : timings) std::ranges::sort(timing.seconds);
  return timings;
}

double traffic_bytes(Direction pass, const Inputs& inputs, const Outputs& outputs) {
  double bytes = 0.0;
  const bool backward = pass == Direction::kBackward;
  for (const auto& [name, member] : kInputNames) {
    const bool only_backward = member == &Inputs::dout || member == &Inputs::dlse;
    if (backward || !only_backward) bytes += bytes_of(inputs.*member);
  }
  for (const auto& [name, member] : kOutputNames) {
    const bool of_forward = member == &Outputs::out || member == &Outputs::lse;  // the backward reads them
    if (backward || of_forward) bytes += bytes_of(outputs.*member);
  }
  return bytes;
}

double flops_of(Problem problem, Direction pass) {
  problem.direction = pass;
  return flops(problem);
}

}  // namespace fovea::tools
