#pragma once

#include <fovea/tensor.h>

#include <cstddef>
#include <memory>
#include <span>

namespace fovea::nn {

/// A densely packed tensor together with its memory, aligned to 64 bytes and zero at first.  Copies share the
/// memory; it goes with the last of them.  Functions that take a Tensor take an Array's view.
class FOVEA_API Array {
 public:
  Array() = default;

  /// One to four dimensions; throws Error(kInvalidArgument) for other numbers of them, a negative one or a size beyond
  /// 63 bits, Error(kOutOfMemory) where memory ran out, Error(kUnsupported) on a device that has no layers yet.
  Array(DType dtype, std::span<const std::int64_t> shape, const Device& device = {});
  Array(DType dtype, std::initializer_list<std::int64_t> shape, const Device& device = {})
      : Array(dtype, std::span(shape.begin(), shape.size()), device) {}

  [[nodiscard]] const Tensor& view() const noexcept { return view_; }
  [[nodiscard]] bool defined() const noexcept { return view_.defined(); }
  [[nodiscard]] std::size_t size_bytes() const noexcept { return size_bytes_; }

 private:
  std::shared_ptr<std::byte> memory_;
  std::size_t size_bytes_ = 0;
  Tensor view_;
};

}  // namespace fovea::nn
