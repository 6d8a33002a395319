#pragma once

#include "cuda/kernels/mma.cuh"
#include "nn/cuda/params.h"

// What layers do to single elements, whatever their dtype: masks, copies, places of rows.
namespace fovea::cuda {

/// One element as fp32, by fovea::DType: fp32, fp16, bf16, bool, int32.
FOVEA_DEVICE float load(const LayerView& view, i64 at) {
  switch (view.dtype) {
    case 0:
      return read<Type::kFloat32>(view.data + 4 * at);
    case 1:
      return read<Type::kFloat16>(view.data + 2 * at);
    case 2:
      return read<Type::kBFloat16>(view.data + 2 * at);
    case 3:
      return view.data[at] != 0 ? 1.0F : 0.0F;
    default:
      return static_cast<float>(reinterpret_cast<const int*>(view.data)[at]);
  }
}

FOVEA_DEVICE void store(const LayerView& view, i64 at, float x) {
  switch (view.dtype) {
    case 0:
      return write<Type::kFloat32>(view.data + 4 * at, x);
    case 1:
      return write<Type::kFloat16>(view.data + 2 * at, x);
    case 2:
      return write<Type::kBFloat16>(view.data + 2 * at, x);
    case 3:
      view.data[at] = x != 0.0F ? 1 : 0;
      return;
    default:
      reinterpret_cast<int*>(view.data)[at] = static_cast<int>(x);
  }
}

template <LayerSpec S>
FOVEA_DEVICE void pointwise(const PointwiseParams& p) {
  const i64 index = i64{blockIdx.x} * kLayerThreads + threadIdx.x;
  if (index >= p.count) return;
  i64 place[4], to = 0, a = 0, b = 0, rest = index;
  for (int axis = 3; axis >= 0; --axis) {
    place[axis] = rest % p.shape[axis];
    rest /= p.shape[axis];
    to += place[axis] * p.to.strides[axis];
    a += place[axis] * p.a.strides[axis];
    b += place[axis] * p.b.strides[axis];
  }
  float x = 0.0F;
  switch (p.op) {
    case Pointwise::kCopy:
      if (p.a.dtype == 4 && p.to.dtype == 4) {  // int32, of which fp32 has not all
        reinterpret_cast<int*>(p.to.data)[to] = reinterpret_cast<const int*>(p.a.data)[a];
        return;
      }
      x = load(p.a, a);
      break;
    case Pointwise::kNot:
      x = load(p.a, a) == 0.0F ? 1.0F : 0.0F;
      break;
    case Pointwise::kHide:
      x = load(p.a, a) == 0.0F ? 0.0F : -infinity();
      break;
    case Pointwise::kWeightOfZero:
      x = load(p.a, a);  // lse
      x = isinf(x) ? 1.0F : expf(-x);
      break;
    case Pointwise::kAdd:
      x = load(p.a, a) + load(p.b, b);
      break;
    case Pointwise::kDiagonal:
      x = place[2] - p.term_stride == place[3] ? 1.0F : 0.0F;
      break;
    case Pointwise::kMean:
      for (i64 term = 0; term < p.terms; ++term) x += load(p.a, a + term * p.term_stride);
      x /= static_cast<float>(p.terms);
      break;
  }
  store(p.to, to, x);
}

template <LayerSpec S>
FOVEA_DEVICE void place_rows(const PlaceParams& p) {
  const i64 row = i64{blockIdx.x} * kLayerThreads + threadIdx.x;
  if (row >= p.rows) return;
  i64 sequence = 0, position = 0;
  if (p.ends != nullptr) {
    i64 beyond = p.batch;  // the first sequence that ends behind the row lies in [sequence, beyond)
    while (sequence + 1 < beyond) {
      const i64 middle = (sequence + beyond) / 2;
      (p.ends[middle] <= row ? sequence : beyond) = middle;
    }
    position = row - p.ends[sequence];
  } else {
    const i64 seqlen = p.rows / p.batch;
    sequence = p.interleaved ? row % p.batch : row / seqlen;
    position = p.interleaved ? row / p.batch : row % seqlen;
  }
  p.places[2 * row] = static_cast<int>(sequence);
  p.places[2 * row + 1] = static_cast<int>(position);
}

template <LayerSpec S>
FOVEA_DEVICE void put(const PutParams& p) {
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += kLayerThreads) p.to[i] = p.words[i];
}

struct alignas(16) Piece {
  u32 words[4];
};

/// A warp has a row.
template <LayerSpec S>
FOVEA_DEVICE void move_rows(const MoveRowsParams& p) {
  const i64 row = i64{blockIdx.x} * (kLayerThreads / kWarp) + warp_id();
  if (row >= p.rows) return;
  const int from = p.index[row];
  for (i64 i = lane_id(); i < p.pieces; i += kWarp) {
    const Piece piece = from < 0 ? Piece{} : reinterpret_cast<const Piece*>(p.from)[from * p.pieces + i];
    reinterpret_cast<Piece*>(p.to)[row * p.pieces + i] = piece;
  }
}

/// A warp has a sequence: where the last of its keys that is not ignored ends.
template <LayerSpec S>
FOVEA_DEVICE void lengths(const LengthsParams& p) {
  const int sequence = static_cast<int>(blockIdx.x) * (kLayerThreads / kWarp) + warp_id();
  if (sequence >= p.batch) return;
  int length = 0;
  for (int key = lane_id(); key < p.keys; key += kWarp) {
    if (p.ignore[sequence * p.batch_stride + key * p.key_stride] == 0) length = key + 1;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) length = max(length, __shfl_xor_sync(kAllLanes, length, step));
  if (lane_id() == 0) p.lengths[sequence] = length;
}

}  // namespace fovea::cuda
