#include "nn/ops.h"

#include <fovea/error.h>

#include "nn/cpu/ops.h"

namespace fovea::nn {

const Ops& ops_of(const Device& device) {
  if (device.kind != DeviceKind::kCpu) {
    throw Error(ErrorCode::kUnsupported,
                "layers run on the CPU alone so far, not on " + name(device) + "; attention itself runs there");
  }
  static const std::unique_ptr<const Ops> cpu = make_cpu_ops();
  return *cpu;
}

}  // namespace fovea::nn
