#pragma once

#include <memory>

#include "dispatch/backend.h"

namespace fovea::cpu {

/// The oracle as a backend, "reference": every valid problem on the CPU, slowly, in double precision.
[[nodiscard]] std::unique_ptr<Backend> make_reference_backend();

}  // namespace fovea::cpu
