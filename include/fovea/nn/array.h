#pragma once

#include <fovea/tensor.h>

#include <cstddef>
#include <memory>
#include <span>

namespace fovea::nn {

/// A densely packed tensor together with its memory, aligned to 64 bytes and zero at first.  Copies share the
/// memory; it goes with the last of them.  One that was moved from holds nothing.  Functions that take a Tensor take an
/// Array's view.  On a GPU the memory is taken and given back in the order of the default stream, in which all layers'
/// work is queued.
class FOVEA_API Array {
 public:
  Array() = default;

  /// One to four dimensions; throws Error(kInvalidArgument) for other numbers of them, a negative one or a size beyond
  /// 63 bits, Error(kOutOfMemory) where memory ran out, Error(kDevice) where the GPU or cuBLASLt is not there.
  Array(DType dtype, std::span<const std::int64_t> shape, const Device& device = {});
  Array(DType dtype, std::initializer_list<std::int64_t> shape, const Device& device = {})
      : Array(dtype, std::span(shape.begin(), shape.size()), device) {}

  /// One whose memory may hold anything, for what is about to be written.
  [[nodiscard]] static Array unset(DType dtype, std::span<const std::int64_t> shape, const Device& device = {});
  [[nodiscard]] static Array unset(DType dtype, std::initializer_list<std::int64_t> shape, const Device& device = {}) {
    return unset(dtype, std::span(shape.begin(), shape.size()), device);
  }

  [[nodiscard]] const Tensor& view() const noexcept { return held_ == nullptr ? kNone : held_->view; }
  [[nodiscard]] bool defined() const noexcept { return view().defined(); }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return held_ == nullptr ? 0 : held_->size_bytes; }

 private:
  struct Held {
    std::shared_ptr<std::byte> memory;
    std::size_t size_bytes = 0;
    Tensor view;
  };
  static constexpr Tensor kNone{};
  std::shared_ptr<const Held> held_;
};

/// to = from, in the dtype of `to` (bool: whether it is not 0), from and to any device; strides are not negative.
/// Waits for a GPU where `to` or `from` is on the host: so results are read.  Throws Error(kInvalidArgument) where the
/// shapes differ, or a tensor has no data or cannot lie in memory as it says.
FOVEA_API void copy(const Tensor& from, const Tensor& to);

/// The most bytes that layers, their arrays and their attention's workspaces held on a device at once, since the start
/// or the last call with `forget`.
[[nodiscard]] FOVEA_API std::size_t peak_bytes(const Device& device, bool forget = false);

}  // namespace fovea::nn
