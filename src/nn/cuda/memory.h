#pragma once

#include <cstddef>
#include <memory>

// A GPU's memory for layers, in the order of its default stream: taken and given back without waiting for the device.
namespace fovea::nn {

/// From the pool that layers have on this GPU, which keeps what is given back; aligned to 256 bytes.  Throws
/// Error(kOutOfMemory) with the size where memory ran out.
[[nodiscard]] std::shared_ptr<std::byte> allocate_on_gpu(int gpu, std::size_t bytes);

/// The most bytes of the pool that were in use at once, since the last call with `forget`.
[[nodiscard]] std::size_t peak_on_gpu(int gpu, bool forget);

}  // namespace fovea::nn
