#include "nn/ops.h"

#include <cmath>
#include <map>
#include <mutex>

#include "nn/cpu/ops.h"
#include "nn/cuda/ops.h"
#include "problem/refuse.h"

namespace fovea::nn {
// Never taken apart: threads and arrays of static storage may outlive everything here, and the driver with it.
const Ops& ops_of(const Device& device) {
  check_named("device kind", device.kind, DeviceKind::kCuda);
  if (device.kind == DeviceKind::kCpu) {
    static const Ops& cpu = *make_cpu_ops().release();
    return cpu;
  }
  static std::mutex mutex;
  static auto& gpus = *std::make_unique<std::map<int, std::unique_ptr<const Ops>>>().release();
  const std::lock_guard lock(mutex);
  std::unique_ptr<const Ops>& ops = gpus[device.index];
  if (ops == nullptr) ops = make_cuda_ops(device.index);
  return *ops;
}

AdamWRates rates_of(const AdamWStep& s) {
  const double left1 = 1.0 - std::pow(static_cast<double>(s.beta1), static_cast<double>(s.step));
  const double left2 = 1.0 - std::pow(static_cast<double>(s.beta2), static_cast<double>(s.step));
  return {.rate = static_cast<float>(s.lr / left1),
          .spread = static_cast<float>(std::sqrt(left2)),
          .decay = 1.0F - s.lr * s.weight_decay};
}

}  // namespace fovea::nn
