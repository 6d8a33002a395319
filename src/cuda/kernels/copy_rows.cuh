#pragma once

#include "cuda/kernels/device.cuh"

// Copies rows that begin anywhere to rows that begin at multiples of 16 bytes, for kernels that load and store such
// pieces, or back.
namespace fovea::cuda {

/// A piece of 16 bytes at a multiple of 4, of which the first `bytes`, whole words, exist; the others are 0.
FOVEA_DEVICE uint4 gather_words(const char* from, int bytes) {
  const auto word = [&](int w) { return 4 * w < bytes ? *reinterpret_cast<const u32*>(from + 4 * w) : 0; };
  return {word(0), word(1), word(2), word(3)};
}
FOVEA_DEVICE void scatter_words(char* to, const uint4& x, int bytes) {
  const u32 words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int w = 0; w < 4; ++w)
    if (4 * w < bytes) *reinterpret_cast<u32*>(to + 4 * w) = words[w];
}

/// Blocks: x: kCopiedRows rows × kCopiedBytes of them; y: planes, of heads and sequences; z: which copy.
template <ForwardSpec S>
__device__ void copy_rows(const CopyRowsParams& p) {
  await_kernel_ahead();
  let_next_kernel_begin();
  constexpr int kLanes = kCopyThreads / kCopiedRows, kPieces = kCopiedBytes / kLanes / 16;
  const RowCopy& copy = p.copies[blockIdx.z];
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int row = block / copy.chunks * kCopiedRows + thread / kLanes;
  const int first = block % copy.chunks * kCopiedBytes + thread % kLanes * 16;
  if (row >= copy.rows) return;
  for (int plane = static_cast<int>(blockIdx.y); plane < copy.planes; plane += static_cast<int>(gridDim.y)) {
    const auto at = [&](const RowView& view) {
      return view.data + plane / copy.heads * view.batch + plane % copy.heads * view.head + row * view.row + first;
    };
    const char* const from = at(copy.from);
    char* const to = at(copy.to);
    uint4 pieces[kPieces];  // asked for all at once
#pragma unroll
    for (int x = 0; x < kPieces; ++x) {
      const int offset = x * kLanes * 16, bytes = copy.bytes - first - offset;
      pieces[x] = {};
      if (bytes > 0)
        pieces[x] = copy.in_words && !(copy.from.aligned && bytes >= 16)
                        ? gather_words(from + offset, bytes)
                        : read_piece(from + offset, bytes, copy.from.aligned);
    }
#pragma unroll
    for (int x = 0; x < kPieces; ++x) {
      const int offset = x * kLanes * 16, bytes = copy.written - first - offset;
      if (bytes <= 0) continue;
      if (copy.in_words && !(copy.to.aligned && bytes >= 16)) {
        scatter_words(to + offset, pieces[x], bytes);
      } else {
        write_piece(to + offset, pieces[x], bytes, copy.to.aligned);
      }
    }
  }
}

}  // namespace fovea::cuda
