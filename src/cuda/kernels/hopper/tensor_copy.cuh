#pragma once

#include "cuda/kernels/copies.cuh"
#include "cuda/kernels/hopper/barrier.cuh"
#include "cuda/params_sm90.h"
#include "cuda/spec_sm90.h"

// Copies of rows to panels in shared memory, by the copy engine (TMA), or by threads where it cannot read a tensor.
namespace fovea::cuda {

struct RowPlace {
  int row, head, batch;
};

/// Of rows of packed heads, of which `head` is the first: a dimension of their own in the tensor's map.
struct PackedPlace : RowPlace {};

/// Loads one panel; what lies outside the tensor becomes 0.
FOVEA_DEVICE void load_panel(u32 to, const TensorMap& map, const Barrier& barrier, int column, const RowPlace& at,
                             Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&map), "r"(barrier.address()), "r"(column), "r"(at.row), "r"(at.head), "r"(at.batch),
      "l"(static_cast<u64>(keep))
      : "memory");
}

FOVEA_DEVICE void load_panel(u32 to, const TensorMap& map, const Barrier& barrier, int column, const PackedPlace& at,
                             Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(&map), "r"(barrier.address()), "r"(column), "r"(0), "r"(at.row), "r"(at.head), "r"(at.batch),
      "l"(static_cast<u64>(keep))
      : "memory");
}

/// Stores one panel, without what lies outside the tensor; in the thread's open group, as `add_floats`.
FOVEA_DEVICE void store_panel(const TensorMap& map, u32 from, int column, const RowPlace& at) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(column), "r"(at.row), "r"(at.head), "r"(at.batch)
               : "memory");
}

FOVEA_DEVICE void store_panel(const TensorMap& map, u32 from, int column, const PackedPlace& at) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(from), "r"(column), "r"(0), "r"(at.row), "r"(at.head), "r"(at.batch)
               : "memory");
}

/// Loads a tile of kRows rows, by one thread; `more`: bytes of other copies to the same barrier.
template <int kRows, int kDim, class Place>
FOVEA_DEVICE void load_panels(u32 to, const TensorMap& map, Barrier& full, const Place& at, Keep keep, u32 more = 0,
                              int first_column = 0) {
  full.arrive_with(tile_bytes(kRows, kDim) + more);
#pragma unroll
  for (int panel = 0; panel < panels_of(kDim); ++panel)
    load_panel(to + panel * kRows * kPanelRowBytes, map, full, first_column + panel * kPanelColumns, at, keep);
}

/// Loads a tile of a bias, kRows rows by kKeys keys, in panels, by one thread.  Broadcast dimensions have size 1: of
/// rows that are one the first is loaded alone, for the engine takes its time to fill others with zeros.
template <int kRows, int kKeys, Type kType, class Params>
FOVEA_DEVICE void load_bias_panels(u32 to, const Params& p, Barrier& full, int key, const RowPlace& at, Keep keep) {
  constexpr int kOfPanel = kPanelRowBytes / kBytes<kType>, kPanels = (kKeys + kOfPanel - 1) / kOfPanel;
  full.expect(kPanels * kPanelRowBytes * (p.bias.query == 0 ? 1 : kRows));
  const RowPlace from{p.bias.query == 0 ? 0 : at.row, p.bias.head == 0 ? 0 : at.head, p.bias.batch == 0 ? 0 : at.batch};
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    load_panel(to + panel * kRows * kPanelRowBytes, p.bias_map, full, key + panel * kOfPanel, from, keep);
}

/// Loads a multiple of 16 contiguous bytes.
FOVEA_DEVICE void load_bytes(u32 to, const void* from, u32 bytes, const Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier.address())
               : "memory");
}

/// Copies four words, which `Barrier::arrive_behind_copies` waits for.  Through L1: where all rows share a mask, every
/// lane of every block would otherwise ask L2 for the same line (docs/notes).
FOVEA_DEVICE void copy_four_words(u32 to, const u32* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/// Copies from this block to the shared memory of the other one of a pair, and to its barrier.
FOVEA_DEVICE void send_bytes(u32 to, u32 from, u32 bytes, const Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address_in_other(to)),
               "r"(from), "r"(bytes), "r"(address_in_other(barrier.address()))
               : "memory");
}

/// Adds a multiple of 16 bytes of floats to global memory, in the thread's open group of such additions.
FOVEA_DEVICE void add_floats(float* to, u32 from, u32 bytes, Keep keep) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(to),
      "r"(from), "r"(bytes), "l"(static_cast<u64>(keep))
      : "memory");
}
/// Writes them there.
FOVEA_DEVICE void store_bytes(float* to, u32 from, u32 bytes, Keep keep) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to), "r"(from),
               "r"(bytes), "l"(static_cast<u64>(keep))
               : "memory");
}
FOVEA_DEVICE void close_additions() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Waits until at most kOpen of the thread's groups are still to be read from shared memory.
template <int kOpen>
FOVEA_DEVICE void await_additions_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kOpen) : "memory");
}
/// Waits until all but at most kOpen of the thread's groups are done.
template <int kOpen>
FOVEA_DEVICE void await_additions() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kOpen) : "memory");
}

/// The address of a piece of 16 bytes of a row in a panel, as the copy engine swizzles it.
FOVEA_DEVICE u32 swizzled(u32 panel, int row, int piece) {
  return panel + static_cast<u32>(row * kPanelRowBytes + ((piece ^ row & 7) << 4));
}

/// Loads a tile of panels by kThreads threads from rows of `row_bytes`, row r from row_at(r); where has(r) is false
/// they become 0.
template <int kThreads, int kRows, int kDim, class Has, class RowAt>
FOVEA_DEVICE void load_by_hand(u32 to, int thread, int row_bytes, bool aligned, const Has& has, const RowAt& row_at) {
  constexpr int kPieces = panels_of(kDim) * 8;
#pragma unroll 1
  for (int at = thread; at < kRows * kPieces; at += kThreads) {
    const int row = at / kPieces, piece = at % kPieces;
    const bool there = has(row) && piece * 16 < row_bytes;
    store_shared_16(swizzled(to + piece / 8 * kRows * kPanelRowBytes, row, piece % 8),
                    there ? read_piece(row_at(row) + piece * 16, 16, aligned) : uint4{0, 0, 0, 0});
  }
}

}  // namespace fovea::cuda
