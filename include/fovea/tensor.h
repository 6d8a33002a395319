#pragma once

#include <fovea/error.h>
#include <fovea/export.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

namespace fovea {

/// Element types.  q, k, v and their gradients share one of the three floating types.
enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kBool, kInt32 };

/// "fp32", "fp16", "bf16", "bool", "int32".
[[nodiscard]] FOVEA_API const char* name(DType dtype) noexcept;
[[nodiscard]] FOVEA_API std::int64_t size_bytes(DType dtype) noexcept;  ///< of one element

enum class DeviceKind : std::uint8_t { kCpu, kCuda };

/// Where tensors live.  `compute_capability` (90 for sm_90) matters to a dry run without the GPU; 0 asks the driver.
struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;  ///< of the GPU; there is one CPU
  int compute_capability = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

/// "cpu", "cuda:0", "sm_90".
[[nodiscard]] FOVEA_API std::string name(const Device& device);

/// A non-owning view of up to four dimensions.  Strides are not negative, and the last dimension is contiguous.  An
/// input may have stride 0 in any other, which repeats it; mask, bias and dlse in the last one, too.  Inputs are never
/// written to.  An output must not overlap another tensor of its call: this is not checked.
struct Tensor {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;  ///< first element, aligned to its size; may be null where a dimension is 0
  DType dtype = DType::kFloat32;
  Device device{};
  int rank = 0;                                  ///< 0: no tensor at all
  std::array<std::int64_t, kMaxRank> shape{};    ///< in elements
  std::array<std::int64_t, kMaxRank> strides{};  ///< in elements

  [[nodiscard]] bool defined() const noexcept { return rank > 0; }

  /// A view of densely packed elements, last dimension fastest.  One to four dimensions; more are refused.
  [[nodiscard]] static Tensor contiguous(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                                         Device device = {}) {
    if (shape.size() > kMaxRank) {
      throw Error(ErrorCode::kInvalidArgument, "the shape of a tensor has " + std::to_string(shape.size()) +
                                                   " dimensions but may have at most four; merge some of them");
    }
    Tensor t;
    t.data = const_cast<void*>(data);
    t.dtype = dtype;
    t.device = device;
    t.rank = static_cast<int>(shape.size());
    std::size_t next = 0;
    for (const std::int64_t extent : shape) t.shape[next++] = extent;
    for (std::int64_t stride = 1; next-- > 0; stride *= t.shape[next]) t.strides[next] = stride;
    return t;
  }

  /// The same elements with two dimensions exchanged: a [batch, heads, seqlen, dim] buffer seen as
  /// [batch, seqlen, heads, dim] is `view.transposed(1, 2)`.
  [[nodiscard]] Tensor transposed(int a, int b) const noexcept {
    Tensor t = *this;
    const auto [i, j] = std::pair{static_cast<std::size_t>(a), static_cast<std::size_t>(b)};
    std::swap(t.shape[i], t.shape[j]);
    std::swap(t.strides[i], t.strides[j]);
    return t;
  }
};

}  // namespace fovea
