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

bool make_tensor_map(const RowView& view, Type type, const TensorExtent& extent, int box_rows, TensorMap& map) {
  static const auto& encoder = *std::make_unique<const Encoder>().release();  // kept: threads may call at exit
  if (encoder.encode.address == nullptr || !view.aligned) return false;
  constexpr std::int64_t kSmallest = 16;  // a stride that is not asked for is any that the driver takes
  const auto stride = [](std::int64_t bytes, std::int64_t count) { return count > 1 ? bytes : kSmallest; };
  const std::array<std::int64_t, 3> wanted{stride(view.row, extent.rows), stride(view.head, extent.heads),
                                           stride(view.batch, extent.batch)};
  if (std::ranges::any_of(wanted, [](std::int64_t bytes) { return bytes < 0; })) return false;
  const auto count = [](std::int64_t n) { return static_cast<U64>(std::max<std::int64_t>(n, 1)); };
  const std::array<U64, 4> sizes{count(extent.columns), count(extent.rows), count(extent.heads), count(extent.batch)};
  const std::array<U64, 3> strides{static_cast<U64>(wanted[0]), static_cast<U64>(wanted[1]),
                                   static_cast<U64>(wanted[2])};
  const std::array<U32, 4> box{static_cast<U32>(kPanelRowBytes / bytes_of(type)), static_cast<U32>(box_rows), 1, 1},
      steps{1, 1, 1, 1};
  return encoder.encode(&map, kDataTypes.at(static_cast<std::size_t>(type)), 4U, view.data, sizes.data(),
                        strides.data(), box.data(), steps.data(), kNoInterleave, kSwizzle128, kPromote128,
                        kZeroFill) == 0;
}

bool CallMaps::of_entries(const EntryView& view, Type of, int rows, TensorMap& map) const {
  if (view.key != bytes_of(of)) return false;
  const auto extent = [](std::int64_t stride, int n) { return stride == 0 ? std::int64_t{1} : n; };
  const bool aligned = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.batch % 16 == 0 &&
                       view.head % 16 == 0 && view.query % 16 == 0;
  return make_tensor_map(
      {view.data, view.batch, view.query, view.head, aligned}, of,
      {p.seqlen_kv, extent(view.query, p.seqlen_q), extent(view.head, p.q_heads), extent(view.batch, p.batch)},
      view.query == 0 ? 1 : rows, map);
}

}  // namespace fovea::cuda
