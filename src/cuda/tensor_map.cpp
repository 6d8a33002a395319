#include "cuda/tensor_map.h"

#include <algorithm>
#include <array>

#include "cuda/library.h"
#include "cuda/spec_sm90.h"

namespace fovea::cuda {
namespace {

constexpr std::array kDataTypes{7, 6, 9};  // CUtensorMapDataType of fp32, fp16, bf16
constexpr int kNoInterleave = 0, kSwizzle128 = 3, kPromote128 = 2, kZeroFill = 0;

using U32 = std::uint32_t;
using U64 = std::uint64_t;

/// The driver computes 128 bytes; nothing reaches the GPU.
struct Encoder {
  Library library{"libcuda.so.1"};
  LibraryFunction<int(void*, int, U32, void*, const U64*, const U64*, const U32*, const U32*, int, int, int, int)>
      encode{library, "cuTensorMapEncodeTiled"};
};

}  // namespace

bool make_tensor_map(char* data, Type type, std::int64_t columns, std::span<const TensorAxis> axes, TensorMap& map) {
  static const auto& encoder = *std::make_unique<const Encoder>().release();  // kept: threads may call at exit
  if (encoder.encode.address == nullptr) return false;
  constexpr std::size_t kMostAxes = 4;
  constexpr std::int64_t kSmallest = 16;  // a stride that is not asked for is any that the driver takes
  std::array<U64, kMostAxes + 1> sizes{static_cast<U64>(std::max<std::int64_t>(columns, 1))};
  std::array<U64, kMostAxes> strides{};
  std::array<U32, kMostAxes + 1> box{static_cast<U32>(kPanelRowBytes / bytes_of(type))}, steps{1};
  for (std::size_t x = 0; x < axes.size(); ++x) {
    const TensorAxis& axis = axes[x];
    const std::int64_t stride = axis.size > 1 ? axis.stride : kSmallest;
    if (stride < 0) return false;
    sizes.at(x + 1) = static_cast<U64>(std::max<std::int64_t>(axis.size, 1));
    strides.at(x) = static_cast<U64>(stride);
    box.at(x + 1) = static_cast<U32>(axis.box);
    steps.at(x + 1) = 1;
  }
  return encoder.encode(&map, kDataTypes.at(static_cast<std::size_t>(type)), static_cast<U32>(axes.size() + 1), data,
                        sizes.data(), strides.data(), box.data(), steps.data(), kNoInterleave, kSwizzle128, kPromote128,
                        kZeroFill) == 0;
}

bool CallMaps::of_entries(const EntryView& view, Type of, int rows, TensorMap& map) const {
  if (view.key != bytes_of(of)) return false;
  const auto axis = [](std::int64_t stride, int n, int box) {
    return TensorAxis{stride == 0 ? std::int64_t{1} : n, stride, box};
  };
  const bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.batch % 16 == 0 &&
                       view.head % 16 == 0 && view.query % 16 == 0;
  const std::array<TensorAxis, 3> axes{axis(view.query, p.seqlen_q, view.query == 0 ? 1 : rows),
                                       axis(view.head, p.q_heads, 1), axis(view.batch, p.batch, 1)};
  return aligned && make_tensor_map(view.data, of, p.seqlen_kv, axes, map);
}

}  // namespace fovea::cuda
