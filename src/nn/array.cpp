#include <fovea/nn/array.h>

#include "nn/ops.h"
#include "problem/refuse.h"

namespace fovea::nn {

Array::Array(DType dtype, std::span<const std::int64_t> shape, const Device& device) {
  if (shape.empty() || shape.size() > Tensor::kMaxRank) {
    refuse("a tensor cannot have ", shape.size(), " dimensions; give 1 to ", Tensor::kMaxRank);
  }
  // A shape that overflows is refused even beside a 0, so that strides never overflow either.
  std::int64_t bytes = fovea::size_bytes(dtype);
  bool empty = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) refuse("a tensor's dimension (", extent, ") must not be negative");
    empty = empty || extent == 0;
    if (extent > 0 && __builtin_mul_overflow(bytes, extent, &bytes)) {
      refuse("a tensor of shape [", join(shape, ", "), "] is larger than any memory");
    }
  }
  size_bytes_ = empty ? 0 : static_cast<std::size_t>(bytes);
  memory_ = ops_of(device).allocate(size_bytes_);
  view_.data = memory_.get();
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view_.rank - 1; i >= 0; --i) {
    view_.shape[i] = shape[i];
    view_.strides[i] = stride;
    stride *= shape[i];
  }
}

}  // namespace fovea::nn
