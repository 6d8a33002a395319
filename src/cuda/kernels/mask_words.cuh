#pragma once

#include "cuda/kernels/device.cuh"

// Reads a boolean mask once and makes words of 32 bits, an eighth of the bytes for the kernels, which read them once a
// head.  Words of the same keys lie row by row, so that the eight rows of a warp are neighbours.  Tiles that are hidden
// or visible as a whole are found at the same time.
namespace fovea::cuda {

/// Of each of four bytes 1 where it is not 0.
FOVEA_DEVICE u32 ones_of_bytes(u32 x) { return ((((x & 0x7f7f7f7fU) + 0x7f7f7f7fU) | x) & 0x80808080U) >> 7; }
FOVEA_DEVICE uint4 ones_of_bytes(const uint4& x) {
  return {ones_of_bytes(x.x), ones_of_bytes(x.y), ones_of_bytes(x.z), ones_of_bytes(x.w)};
}

/// Which of 16 keys are seen, by bytes of 0 and 1.
FOVEA_DEVICE u32 seen_of_ones(const uint4& x) {
  const auto eight = [](u32 low, u32 high) { return __dp4a(high, 0x80402010U, __dp4a(low, 0x08040201U, 0U)); };
  return eight(x.x, x.y) | eight(x.z, x.w) << 8;
}
/// The same of keys that are neighbours in a row which begins anywhere: by words, but for those that leave [begin,
/// end), memory that is there.
FOVEA_DEVICE u32 seen_in_row(const char* row, int key, int keys, const char* begin, const char* end) {
  if (key >= keys) return 0;
  const int before = static_cast<int>(reinterpret_cast<u64>(row + key) % 4);
  const char* const from = row + key - before;
  u32 words[5];
#pragma unroll
  for (int w = 0; w < 5; ++w) {
    words[w] = 0;
    if (from + 4 * w >= begin && from + 4 * w + 4 <= end) {
      words[w] = ones_of_bytes(*reinterpret_cast<const u32*>(from + 4 * w));
    } else {
      for (int x = 4 * w; x < 4 * w + 4; ++x)
        if (from + x >= row && from + x < row + keys && from[x] != 0) words[w] |= 1U << 8 * (x - 4 * w);
    }
  }
  const auto word = [&](int w) { return __funnelshift_r(words[w], words[w + 1], before * 8); };
  const u32 exist = keys - key >= 16 ? 0xffff : (1U << (keys - key)) - 1;
  return seen_of_ones({word(0), word(1), word(2), word(3)}) & exist;
}
/// Past the last one none.
FOVEA_DEVICE u32 seen_one_by_one(const char* row, i64 stride, int key, int keys) {
  const char* const from = row + key * stride;
  u32 seen = 0;
  for (int x = 0; x < math::smaller(16, keys - key); ++x) seen |= (from[x * stride] != 0 ? 1U : 0U) << x;
  return seen;
}

/// What each of four lanes has of 128 keys: of every byte two neighbouring bits.
FOVEA_DEVICE uint4 words_of_lanes(const u32 (&words)[4]) {
  u32 x[4];  // a word's 4 × 4 pairs of bits, transposed
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const auto swap = [&](int distance, u32 of) {
      const u32 differ = (x[w] ^ x[w] >> distance) & of;
      x[w] ^= differ ^ differ << distance;
    };
    x[w] = words[w];
    swap(6, 0x00cc00ccU), swap(12, 0x0000f0f0U);
  }
  const u32 low[] = {__byte_perm(x[0], x[1], 0x5140), __byte_perm(x[2], x[3], 0x5140)};
  const u32 high[] = {__byte_perm(x[0], x[1], 0x7362), __byte_perm(x[2], x[3], 0x7362)};
  return {__byte_perm(low[0], low[1], 0x5410), __byte_perm(low[0], low[1], 0x7632),
          __byte_perm(high[0], high[1], 0x5410), __byte_perm(high[0], high[1], 0x7632)};
}

/// What a lane has of the 32 keys of a word's 8 rows 8j + 2 (lane % 4) and the next, in `WordOrder::kColumns`: of the
/// first 16 keys, and of the others above them, lane / 4 and 8 on.
FOVEA_DEVICE u32 halves_of_lane(const u32* words) {
  u32 rows[2] = {};  // even, odd: a byte a key, with every second bit
#pragma unroll
  for (int j = 3; j >= 0; --j) {
    const uint2 two = *reinterpret_cast<const uint2*>(words + 8 * j + lane_id() % 4 * 2);
    rows[0] = (rows[0] << 2) + (two.x >> lane_id() / 4 & 0x01010101U);
    rows[1] = (rows[1] << 2) + (two.y >> lane_id() / 4 & 0x01010101U);
  }
  return __byte_perm(rows[0] | rows[0] >> 7, rows[1] | rows[1] >> 7, 0x6240);
}

/// Blocks: x: 32 words of 32 rows; y and z: sequences × heads that have a mask of their own.
template <ForwardSpec S>
__device__ void mask_words(const CallParams& p) {
  await_kernel_ahead();
  let_next_kernel_begin();
  __shared__ alignas(8) u32 words[kWarp][kWarp + 2];  // even, and no two lanes of a warp store to one bank
  __shared__ u32 facts[2];                            // a bit a word: any key of it seen, all
  const WordView& to = p.mask_words;
  const int span = static_cast<int>(blockIdx.x) % to.spans(), group = static_cast<int>(blockIdx.x) / to.spans();
  const int first_word = span * kWarp, first_row = group * kWarp;
  constexpr int kRows = kWarp / (kMaskThreads / kWarp), kPieces = 2;  // a warp's rows, of 32 × 16 keys each
  static_assert(kRows == 4);
  const int lane = lane_id(), warp_row = kRows * warp_id();
  const int last_row = p.mask.query == 0 ? 0 : p.seqlen_q - 1;  // read once more past it
  const int plane = static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y);
  if (plane >= to.planes) return;
  if (threadIdx.x < 2) facts[threadIdx.x] = 0;
  const char* const from = p.mask.data + plane / to.heads * p.mask.batch + plane % to.heads * p.mask.head;
  const auto row_at = [&](int r) { return from + math::smaller(first_row + warp_row + r, last_row) * p.mask.query; };
  const char* const all_end = from + last_row * p.mask.query + p.seqlen_kv;
  const auto key_of = [&](int piece) { return (first_word + piece * kWarp / 2) * 32 + lane * 16; };
  // Of two rows two lanes have half a word each: they leave with one of each row.
  const auto keep = [&](int r, int piece, u32 seen, u32 seen_below) {
    const u32 other = __shfl_xor_sync(kAllLanes, lane % 2 == 0 ? seen_below : seen, 1);
    words[piece * kWarp / 2 + lane / 2][warp_row + r + lane % 2] =
        lane % 2 == 0 ? seen | other << 16 : other | seen_below << 16;
  };
  if (p.mask.key == 1 && (reinterpret_cast<u64>(from) | p.mask.query) % 16 == 0 &&
      (p.seqlen_kv % 16 == 0 || (first_word + kWarp) * 32 <= p.seqlen_kv)) {
    uint4 bytes[kRows][kPieces];  // asked for all at once
    u32 bits = 0;
#pragma unroll
    for (int x = 0; x < kRows * kPieces; ++x) {
      uint4& to_bytes = bytes[x / kPieces][x % kPieces];
      to_bytes = {};
      if (key_of(x % kPieces) < p.seqlen_kv) to_bytes = read_once(row_at(x / kPieces) + key_of(x % kPieces));
    }
#pragma unroll
    for (int x = 0; x < kRows * kPieces; ++x) {
      const uint4& of = bytes[x / kPieces][x % kPieces];
      bits |= of.x | of.y | of.z | of.w;
    }
    if (__any_sync(kAllLanes, (bits & 0xfefefefeU) != 0)) {  // bool is 0 or 1; who made these bytes had others
#pragma unroll
      for (int x = 0; x < kRows * kPieces; ++x) {
        uint4& of = bytes[x / kPieces][x % kPieces];
        of = ones_of_bytes(of);
      }
    }
#pragma unroll
    for (int x = 0; x < kRows * kPieces / 2; ++x) {
      const int r = x / kPieces * 2, piece = x % kPieces;
      keep(r, piece, seen_of_ones(bytes[r][piece]), seen_of_ones(bytes[r + 1][piece]));
    }
  } else {
#pragma unroll 1
    for (int x = 0; x < kRows * kPieces / 2; ++x) {
      const int r = x / kPieces * 2, piece = x % kPieces;
      const auto seen = [&](int row) {
        return p.mask.key == 1 ? seen_in_row(row_at(row), key_of(piece), p.seqlen_kv, from, all_end)
                               : seen_one_by_one(row_at(row), p.mask.key, key_of(piece), p.seqlen_kv);
      };
      keep(r, piece, seen(r), seen(r + 1));
    }
  }
  __syncthreads();
  u32* const out = to.data + plane * to.plane();
  const int w = 4 * warp_id(), row = first_row + lane;  // four words of a row
  const bool exists = row < to.rows;
  u32 of[4], any = 0, all = 0;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    of[x] = words[w + x][lane];
    const int keys = p.seqlen_kv - (first_word + w + x) * 32;  // that exist; only these and rows that exist count
    const u32 most = keys >= 32 ? ~0U : keys > 0 ? (1U << keys) - 1 : 0;
    if (to.order == WordOrder::kRows && exists && keys > 0) out[i64{first_word + w + x} * to.rows + row] = of[x];
    any |= (__any_sync(kAllLanes, of[x] != 0) ? 1U : 0U) << x;
    all |= (__all_sync(kAllLanes, of[x] == most || !exists) ? 1U : 0U) << x;
  }
  if (lane < 2) atomicOr(&facts[lane], (lane == 0 ? any : all) << w);
  if (to.order == WordOrder::kColumns && first_word + w < to.count) {
    u16* const halves = reinterpret_cast<u16*>(out + (i64{group / 2} * to.count + first_word + w) * 2 * kWarp);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const u32 two = halves_of_lane(words[w + x]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        halves[((2 * x + half) * kWarp + lane) * 2 + group % 2] = static_cast<u16>(two >> 16 * half);
    }
  }
  if (to.order == WordOrder::kLanes && exists && first_word + w < to.count)
    reinterpret_cast<uint4*>(out)[i64{(first_word + w) / 4} * to.rows + row] = words_of_lanes(of);
  __syncthreads();
  if (threadIdx.x < 2)
    out[i64{to.rows} * to.count + 2 * (i64{span} * to.groups() + group) + threadIdx.x] = facts[threadIdx.x];
}

}  // namespace fovea::cuda
