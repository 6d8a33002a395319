#pragma once

#include "cuda/kernels/mma.cuh"
#include "cuda/spec_sm90.h"

// Products of a warpgroup: 64 rows of A, from shared memory or registers, times a tile in shared memory.  A warp's 16
// rows of the result lie in its lanes as those of mma.cuh, so that code for accumulators serves both.
namespace fovea::cuda {

/// C += A B, 16 of k at a time.  The renderer defines it for the widths that a spec has (jit/wgmma_text.h):
///   by_rows(c, a, b, add)   A in shared memory, B as rows of 16 (K); add = 0: C = A B
///   by_columns(c, a, b, add) A in registers, B as 16 rows of columns (V)
///   tiles_by_columns(c, a, b, add) A in shared memory, B as 16 rows of columns
template <Type kType, int kColumns>
struct Wgmma;

/// The matrix descriptor of a swizzled panel; `leading`: bytes from panel to panel, where a product sums over columns.
/// Offsets in units of 16 bytes can be added to it.
FOVEA_DEVICE u64 matrix_at(u32 address, u32 leading) {
  constexpr u64 kEightRows = 8 * kPanelRowBytes >> 4, kSwizzle128 = 1;
  return u64{(address & 0x3ffff) >> 4} | u64{leading >> 4} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

FOVEA_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FOVEA_DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kOpen groups of products are running.
template <int kOpen>
FOVEA_DEVICE void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

/// Keeps the compiler from moving accesses to these registers past this point: a running product uses them.
template <int kN>
FOVEA_DEVICE void pin(Accumulator (&c)[kN]) {
#pragma unroll
  for (int j = 0; j < kN; ++j)
    asm volatile("" : "+f"(c[j].x[0]), "+f"(c[j].x[1]), "+f"(c[j].x[2]), "+f"(c[j].x[3])::"memory");
}
template <int kN>
FOVEA_DEVICE void pin(OperandA (&a)[kN]) {
#pragma unroll
  for (int k = 0; k < kN; ++k)
    asm volatile("" : "+r"(a[k].x[0]), "+r"(a[k].x[1]), "+r"(a[k].x[2]), "+r"(a[k].x[3])::"memory");
}

FOVEA_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

/// A move that ptxas does not merge with what comes before it.
template <int kN>
FOVEA_DEVICE void move(OperandA (&to)[kN], const OperandA (&from)[kN]) {
#pragma unroll
  for (int k = 0; k < kN; ++k) {
#pragma unroll
    for (int w = 0; w < 4; ++w) asm volatile("mov.b32 %0, %1;" : "=r"(to[k].x[w]) : "r"(from[k].x[w]));
  }
}

/// S = Q Kᵀ, or S += Q Kᵀ where `add` is 1: issued, not awaited.  q: a warpgroup's first row; panels of Q are kQRows
/// long, those of K kPanelRows, of which the first kKeys count.
template <Type kType, int kDim, int kQRows, int kKeys, int kPanelRows = kKeys>
FOVEA_DEVICE void multiply_by_rows(Accumulator (&s)[kKeys / 8], u64 q, u64 k, int add = 0) {
#pragma unroll
  for (int c = 0; c < (kDim + 15) / 16; ++c) {
    constexpr int kQPanel = kQRows * kPanelRowBytes / 16, kKPanel = kPanelRows * kPanelRowBytes / 16;
    Wgmma<kType, kKeys>::by_rows(s, q + c / 4 * kQPanel + c % 4 * 2, k + c / 4 * kKPanel + c % 4 * 2, c == 0 ? add : 1);
  }
}

/// O += P V, or O = P V where `add` is 0: likewise, of the first kKeys.
template <Type kType, int kKeys, int kDim, int kSteps>
FOVEA_DEVICE void multiply_by_columns(Accumulator (&o)[kDim / 8], const OperandA (&p)[kSteps], u64 v, int add) {
#pragma unroll
  for (int k = 0; k < kKeys / 16; ++k) {
    constexpr int kSixteenRows = 16 * kPanelRowBytes / 16;
    Wgmma<kType, kDim>::by_columns(o, p[k], v + k * kSixteenRows, k == 0 ? add : 1);
  }
}

/// dQ = dS K, or dQ += dS K where `add` is 1: likewise.  Panels of dS are kRows long; kColumns of K.
template <Type kType, int kKeys, int kRows, int kColumns>
FOVEA_DEVICE void multiply_tiles_by_columns(Accumulator (&dq)[kColumns / 8], u64 ds, u64 k, int add = 0) {
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c) {
    constexpr int kPanel = kRows * kPanelRowBytes / 16, kSixteenRows = 16 * kPanelRowBytes / 16;
    Wgmma<kType, kColumns>::tiles_by_columns(dq, ds + c / 4 * kPanel + c % 4 * 2, k + c * kSixteenRows,
                                             c == 0 ? add : 1);
  }
}

}  // namespace fovea::cuda
