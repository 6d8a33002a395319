#pragma once

#include "cuda/kernels/device.cuh"

// Copies a bias whose rows begin anywhere to rows that begin at multiples of 16 bytes, which the copy engine can read.
namespace fovea::cuda {

/// Blocks: kBiasRows rows × kBiasRowBytes of them; then planes, of heads and sequences.
template <ForwardSpec S>
__device__ void bias_rows(const BiasRowsParams& p) {
  constexpr int kLanes = kBiasRowsThreads / kBiasRows, kPieces = kBiasRowBytes / kLanes / 16;
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int row = block / p.chunks * kBiasRows + thread / kLanes;
  const u32 first = static_cast<u32>(block % p.chunks) * kBiasRowBytes;
  const i64 plane = i64{blockIdx.z} * gridDim.y + blockIdx.y;
  if (row >= p.rows || plane >= p.planes) return;
  const char* const from =
      p.from.data + plane / p.heads * p.from.batch + plane % p.heads * p.from.head + row * p.from.query;
  char* const to = p.to + (plane * p.rows + row) * p.pitch;
#pragma unroll
  for (int x = 0; x < kPieces; ++x) {
    const u32 at = first + static_cast<u32>(x * kLanes + thread % kLanes) * 16;
    if (at < p.row_bytes)
      *reinterpret_cast<uint4*>(to + at) = gather_16(from + at, static_cast<int>(math::smaller(p.row_bytes - at, 16U)));
  }
}

}  // namespace fovea::cuda
