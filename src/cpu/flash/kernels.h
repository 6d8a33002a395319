#pragma once

#include "cpu/flash/call.h"

namespace fovea::cpu {

namespace portable {
FlashKernels kernels();
}
#ifdef __x86_64__
namespace avx2 {
FlashKernels kernels();
}
namespace avx512 {
FlashKernels kernels();
}
#endif

}  // namespace fovea::cpu
