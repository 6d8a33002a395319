#pragma once

#include "cuda/kernels/mma.cuh"

// Which keys the entries of a lane belong to.  Products allow any order of a tile's keys in shared memory, as long as K
// and V have the same.  Here a lane's entries of a row are neighbours in memory, where masks and biases are read, and
// still come in pairs 8 apart, which share a draw of dropout.
namespace fovea::cuda {

/// The order in a warp's piece of `kColumns` keys.  Of each 16 · kGroups keys a lane of a quad has two runs of kRun
/// keys, 8 apart.  With one group the order is that of the keys themselves.
template <int kColumns, bool kNeighbours>
struct KeyOrder {
  static constexpr u32 kGroups = !kNeighbours ? 1 : kColumns % 64 == 0 ? 4 : kColumns % 32 == 0 ? 2 : 1;
  static constexpr u32 kRun = 2 * kGroups;

  /// Column 2t + e of piece j of an accumulator is key of_lane(t) + of_entry(j, e).
  FOVEA_FN static constexpr u32 of_lane(u32 t) { return t * kGroups / 4 * 16 + t * kRun % 8; }
  FOVEA_FN static constexpr u32 of_entry(u32 j, u32 e) {
    const u32 x = 2 * (j % kRun) + e;
    return j / kRun * 16 * kGroups + x / kRun * 8 + x % kRun;
  }
  /// How many entries of a row a lane has of keys before `key`, counted from its first one.
  FOVEA_FN static constexpr int before(int key) {
    constexpr int kShare = 16 * kGroups, kOfRun = kRun;  // keys that four lanes share; a lane has two runs of them
    const int k = math::larger(key, 0), rest = k % kShare;
    return k / kShare * 2 * kOfRun + math::smaller(rest, kOfRun) + math::smaller(math::larger(rest, 8) - 8, kOfRun);
  }
  /// The key in row `row` of K and V in shared memory.  of_row(a + b) = of_row(a) + of_row(b) where no bit carries.
  FOVEA_FN static constexpr int of_row(u32 row) {
    return static_cast<int>(kGroups == 1 ? row : of_lane(row / 2 % 4) + of_entry(row / 8, row % 2));
  }
};
using AsTheyAre = KeyOrder<16, false>;

}  // namespace fovea::cuda
