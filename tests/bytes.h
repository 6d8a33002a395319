#pragma once

#include <fovea/tensor.h>

#include <cstring>
#include <vector>

namespace fovea::tests {

/// The memory of a densely packed tensor, to be compared bit by bit.
inline std::vector<char> bytes_of(const Tensor& tensor) {
  std::int64_t count = size_bytes(tensor.dtype);
  for (int i = 0; i < tensor.rank; ++i) count *= tensor.shape[i];
  std::vector<char> bytes(static_cast<std::size_t>(count));
  if (!bytes.empty()) std::memcpy(bytes.data(), tensor.data, bytes.size());
  return bytes;
}

}  // namespace fovea::tests
