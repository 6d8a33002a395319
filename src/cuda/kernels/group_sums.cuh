#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// After the main kernel of the backward, where several blocks share out the query heads that read the same keys: what
// each has for dk and dv, in fp32, becomes dk and dv.
namespace fovea::cuda {

template <BackwardSpec S>
struct GroupSums {
  static constexpr int kLanes = kSideThreads / kSumRows, kPiece = 16 / kBytes<S.type>;  // columns of 16 bytes
  const BackwardParams& p;

  FOVEA_DEVICE void add(const Sequence& sequence, int row, int kv_head, const RowView& parts, const RowView& to,
                        int dim) const {
    const char* const from = sequence.kv_row(parts, row, kv_head * p.group_parts);
    for (int column = static_cast<int>(threadIdx.x) % kLanes * kPiece; column < dim; column += kLanes * kPiece) {
      float sum[kPiece] = {};
#pragma unroll 4
      for (int part = 0; part < p.group_parts; ++part) {
        const auto* const four = reinterpret_cast<const float4*>(from + part * parts.head + column * 4);
#pragma unroll
        for (int x = 0; x < kPiece / 4; ++x) {
          const float4 more = four[x];
          sum[4 * x] += more.x, sum[4 * x + 1] += more.y, sum[4 * x + 2] += more.z, sum[4 * x + 3] += more.w;
        }
      }
      write_piece(sequence.kv_row(to, row, kv_head) + column * kBytes<S.type>, packed(sum),
                  (dim - column) * kBytes<S.type>, to.aligned);
    }
  }

 private:
  FOVEA_DEVICE static uint4 packed(const float (&x)[kPiece]) {
    if constexpr (S.type == Type::kFloat32) {
      return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
    } else {
      return {pack<S.type>(x[0], x[1]), pack<S.type>(x[2], x[3]), pack<S.type>(x[4], x[5]), pack<S.type>(x[6], x[7])};
    }
  }
};

/// Blocks: kSumRows keys of the longest sequence × kv heads × batch.
template <BackwardSpec S>
__device__ void group_sums(const BackwardParams& p) {
  await_kernel_ahead();
  const int rows = (p.seqlen_kv + kSumRows - 1) / kSumRows, kv_heads = p.kv_heads / p.group_parts;
  const int block = static_cast<int>(blockIdx.x), plane = block / rows;
  const int row = block % rows * kSumRows + static_cast<int>(threadIdx.x) / GroupSums<S>::kLanes;
  const Sequence sequence = Sequence::of(p, plane / kv_heads);
  if (row >= sequence.kv_rows) return;
  const GroupSums<S> sums{p};
  sums.add(sequence, row, plane % kv_heads, p.dk_parts, p.dk, p.head_dim);
  sums.add(sequence, row, plane % kv_heads, p.dv_parts, p.dv, p.head_dim_v);
}

}  // namespace fovea::cuda
