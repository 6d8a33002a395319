#pragma once

#include "cuda/kernels/device.cuh"

// Reads a boolean mask once and makes words of 32 bits, an eighth of the bytes for the kernels, which read them once a
// head.  Words of the same keys lie row by row, so that the eight rows of a warp are neighbours.  Tiles that are hidden
// or visible as a whole are found at the same time.
namespace fovea::cuda {

/// Which of eight bytes are not 0.
FOVEA_DEVICE u32 bits_of_bytes(u32 low, u32 high) {
  const auto tops = [](u32 x) { return (((x & 0x7f7f7f7fU) + 0x7f7f7f7fU) | x) & 0x80808080U; };
  // A byte's bit moves to 24 and on, or to 28 and on; what else comes about falls below or out, and nowhere meet two.
  return (tops(low) >> 7 | tops(high) >> 3) * 0x01020408U >> 24;
}

/// Which of 16 keys are seen.
FOVEA_DEVICE u32 seen_of_bytes(const uint4& x) { return bits_of_bytes(x.x, x.y) | bits_of_bytes(x.z, x.w) << 8; }
/// Past the last one none.
FOVEA_DEVICE u32 seen_one_by_one(const char* row, i64 stride, int key, int keys) {
  const char* const from = row + key * stride;
  u32 seen = 0;
  for (int x = 0; x < math::smaller(16, keys - key); ++x) seen |= (from[x * stride] != 0 ? 1U : 0U) << x;
  return seen;
}

/// What lane t of four has of 128 keys: of each word two neighbouring bits of eight, joined by a product.
FOVEA_DEVICE u32 word_of_lane(const u32 (&words)[4], int t) {
  u32 all = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) all |= ((words[w] >> 2 * t & 0x03030303U) * 0x01041040U) >> 24 << 8 * w;
  return all;
}

/// What a lane has of 16 keys, from a bit on, of 32 rows of a word, in `WordOrder::kColumns`: of rows 8j + 2 (lane % 4)
/// and the next, keys lane / 4 and 8 on.
FOVEA_DEVICE u32 half_of_lane(const u32* words, int first_bit) {
  u32 all = 0;
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    const u32 two = words[x / 2 * 8 + lane_id() % 4 * 2 + x % 2] >> (first_bit + lane_id() / 4) & 0x101U;
    all |= ((two | two >> 7) & 3U) << (x % 2 * 8 + x / 2 * 2);
  }
  return all;
}

/// Blocks: x: 32 words of 32 rows; y: sequences × heads that have a mask of their own, some of them at once.
template <ForwardSpec S>
__device__ void mask_words(const CallParams& p) {
  __shared__ u32 words[kWarp][kWarp + 1], facts[2];  // a lane for half a word, then for each row
  const WordView& to = p.mask_words;
  const int span = static_cast<int>(blockIdx.x) % to.spans(), group = static_cast<int>(blockIdx.x) / to.spans();
  const int first_word = span * kWarp, first_row = group * kWarp;
  constexpr int kWarps = kMaskThreads / kWarp, kTurns = kWarp / kWarps;
  const int lane = lane_id(), last_row = p.mask.query == 0 ? 0 : p.seqlen_q - 1;  // read once more past it
  if (threadIdx.x < 2) facts[threadIdx.x] = 0;
  for (int plane = static_cast<int>(blockIdx.y); plane < to.planes; plane += static_cast<int>(gridDim.y)) {
    const char* const from = p.mask.data + plane / to.heads * p.mask.batch + plane % to.heads * p.mask.head;
    const auto row_at = [&](int x) {
      return from + math::smaller(first_row + warp_id() + x / 2 * kWarps, last_row) * p.mask.query;
    };
    const auto key_of = [&](int x) { return first_word * 32 + (x % 2 * kWarp + lane) * 16; };
    const auto keep = [&](int x, u32 half) {
      const u32 word = half | __shfl_down_sync(kAllLanes, half, 1) << 16;
      if (lane % 2 == 0) words[x % 2 * kWarp / 2 + lane / 2][warp_id() + x / 2 * kWarps] = word;
    };
    if (p.mask.key == 1 && (reinterpret_cast<u64>(from) | p.mask.query) % 16 == 0 &&
        (p.seqlen_kv % 16 == 0 || (first_word + kWarp) * 32 <= p.seqlen_kv)) {
      uint4 bytes[2 * kTurns];  // asked for all at once
#pragma unroll
      for (int x = 0; x < 2 * kTurns; ++x) {
        bytes[x] = {};
        if (key_of(x) < p.seqlen_kv) bytes[x] = __ldcs(reinterpret_cast<const uint4*>(row_at(x) + key_of(x)));
      }
#pragma unroll
      for (int x = 0; x < 2 * kTurns; ++x) keep(x, seen_of_bytes(bytes[x]));
    } else {
#pragma unroll 1
      for (int x = 0; x < 2 * kTurns; ++x) {
        keep(x, seen_one_by_one(row_at(x), p.mask.key, key_of(x), p.seqlen_kv));
      }
    }
    __syncthreads();
    u32* const out = to.data + plane * to.plane();
    for (int w = warp_id(); w < kWarp; w += kWarps) {
      const u32 word = words[w][lane];
      const int keys = p.seqlen_kv - (first_word + w) * 32;  // that exist; only these and rows that exist count
      const u32 most = keys >= 32 ? ~0U : keys > 0 ? (1U << keys) - 1 : 0;
      const bool exists = first_row + lane < to.rows;
      if (to.order == WordOrder::kRows && exists && keys > 0)
        out[i64{first_word + w} * to.rows + first_row + lane] = word;
      const bool any = __any_sync(kAllLanes, word != 0), all = __all_sync(kAllLanes, word == most || !exists);
      if (lane < 2 && (lane == 0 ? any : all)) atomicOr(&facts[lane], 1U << w);
    }
    const int w = 4 * warp_id();
    static_assert(4 * kWarps == kWarp);
    if (to.order == WordOrder::kColumns && first_word + w < to.count) {
      u16* const halves = reinterpret_cast<u16*>(out + (i64{group / 2} * to.count + first_word + w) * 2 * kWarp);
#pragma unroll 1
      for (int x = 0; x < 8; ++x)
        halves[(x * kWarp + lane) * 2 + group % 2] = half_of_lane(words[w + x / 2], x % 2 * 16);
    }
    if (to.order == WordOrder::kLanes && first_row + lane < to.rows) {
      const u32 of[] = {words[w][lane], words[w + 1][lane], words[w + 2][lane], words[w + 3][lane]};
      uint4* const to_lanes = reinterpret_cast<uint4*>(out) + i64{(first_word + w) / 4} * to.rows + first_row + lane;
      if (first_word + w < to.count)
        *to_lanes = {word_of_lane(of, 0), word_of_lane(of, 1), word_of_lane(of, 2), word_of_lane(of, 3)};
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      out[i64{to.rows} * to.count + 2 * (i64{span} * to.groups() + group) + threadIdx.x] = facts[threadIdx.x];
      facts[threadIdx.x] = 0;
    }
  }
}

}  // namespace fovea::cuda
