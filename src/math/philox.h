#pragma once

#include "math/fn.h"

namespace fovea::math {

/// Counter-based random numbers (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
inline constexpr u32 kPhilox4x32M0 = 0xD2511F53U, kPhilox4x32M1 = 0xCD9E8D57U;
inline constexpr u32 kPhilox2x32M = 0xD256D193U;
inline constexpr u32 kPhiloxW0 = 0x9E3779B9U, kPhiloxW1 = 0xBB67AE85U;
inline constexpr int kDropoutRounds = 7;

/// What one (batch, head) draws its dropout from: the key and the two words that row and column numbers are folded
/// into.
struct DropoutStream {
  u32 key, a, b;
};

FOVEA_FN constexpr DropoutStream dropout_stream(u64 seed, u64 offset, u32 batch_head) {
  u32 c0 = batch_head, c1 = 0, c2 = static_cast<u32>(offset), c3 = static_cast<u32>(offset >> 32);
  u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = u64{kPhilox4x32M0} * c0, p1 = u64{kPhilox4x32M1} * c2;
    c0 = static_cast<u32>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<u32>(p1);
    c2 = static_cast<u32>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<u32>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {c0, c1, c2};
}

/// Entry (i, j) finds its 16-bit draw in patch (patch_of(i), patch_of(j)): half (j / 8) % 2 of word (i / 8) % 2.
FOVEA_FN constexpr u32 patch_of(i64 x) { return static_cast<u32>((x / 16) * 8 + x % 8); }

/// The four draws of a patch.
struct Draws {
  u32 words[2];
  FOVEA_FN constexpr u32 at(i64 i, i64 j) const {
    return (i / 8 % 2 == 0 ? words[0] : words[1]) >> (j / 8 % 2 * 16) & 0xffffU;
  }
};
FOVEA_FN constexpr Draws draws_of_patch(const DropoutStream& stream, u32 m, u32 n) {
  u32 x0 = stream.a ^ m, x1 = stream.b ^ n, key = stream.key;
  for (int round = 0; round < kDropoutRounds; ++round) {
    const u64 product = u64{kPhilox2x32M} * x0;
    x0 = static_cast<u32>(product >> 32) ^ key ^ x1;
    x1 = static_cast<u32>(product);
    key += kPhiloxW0;
  }
  return {{x0, x1}};
}

}  // namespace fovea::math
