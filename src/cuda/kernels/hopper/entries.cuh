#pragma once

#include "cuda/kernels/hopper/tensor_copy.cuh"
#include "cuda/kernels/scores.cuh"

// The bias and mask of a lane's entries of a tile, read from shared memory when the products are done.
namespace fovea::cuda {

template <ForwardSm90Spec S>
struct TileEntries {
  static constexpr int kN = S.block_n / 8, kPanel = kGroupRows * kPanelRowBytes;
  using Scores = Accumulator[1][kN];
  using Rules = ScoreRules<S, kPacking<S>, AsTheyAre, true>;

  const ForwardSm90Params& p;
  const Rules& rules;
  int row, key;  // of the warp's piece
  u32 bias;      // address of the warpgroup's tile of the bias
  u32 seen[2];   // with a mask, of each of two rows: bit 2j + e

  FOVEA_DEVICE static int warp_row() { return warp_id() % 4 * 16; }

  /// Leaves only what a tile's band lets through, too.
  FOVEA_DEVICE void narrow(const Sight& sight) {
    if (sight.mask == TileState::kFull) seen[0] = seen[1] = ~0U;
    if (sight.band != TileState::kPartial) return;
    rules.template each_row<1>(row, key, [&](int /*i*/, int h, int begin, int end) {
      seen[h] &= bits_between(AsTheyAre::before(begin), AsTheyAre::before(end));
    });
  }
  template <int kPieces>
  FOVEA_DEVICE void hide(Accumulator (&s)[1][kPieces]) const {
    keep_bits(s[0], 0, seen[0]);
    keep_bits(s[0], 1, seen[1]);
  }

  /// Reads the tile's bits of the lane's words (`WordView`).
  FOVEA_DEVICE void read_words(u32 words) {
    constexpr int kGroups = mask_groups(S);
    const int first = warp_row() + lane_id() / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 address = words + ((first + 8 * h) * kGroups * 4 + lane_id() % 4) * 4;
      seen[h] = load_shared(address);
      if constexpr (S.block_n < 128)
        seen[h] =
            __funnelshift_r(seen[h], kGroups == 1 ? 0 : load_shared(address + 16), static_cast<u32>(key) % 128 / 4);
    }
  }

  /// Each warp copies the bias of its rows where the copy engine cannot.  Past the last row or key the last one is
  /// read: such entries are hidden anyway.
  FOVEA_DEVICE void copy_bias() const {
    constexpr int kSize = kBytes<S.bias_type>, kOf = 4 / kSize;  // of a word
    __syncwarp();
    constexpr int kTogether = S.head_dim_v > 128 ? 4 : kSize == 4 ? 8 : 16;  // rows in flight
#pragma unroll 1
    for (int x = 0; x < 16 * bias_panels(S); x += kTogether) {
      const int first = x % 16, panel = x / 16, j = key + (panel * kPanelRowBytes / 4 + lane_id()) * kOf;
      u32 words[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int i = rules.rows.query(math::smaller(row + first + r, rules.rows.left() - 1));
        const auto at = [&](int k) {
          return rules.sequence.entry(p.bias, i, math::smaller(j + k, rules.sequence.kv_rows - 1),
                                      rules.rows.first_head);
        };
        if constexpr (kSize == 4) {
          words[r] = *reinterpret_cast<const u32*>(at(0));
        } else {
          words[r] = *reinterpret_cast<const u16*>(at(0)) | u32{*reinterpret_cast<const u16*>(at(1))} << 16;
        }
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r)
        store_shared(swizzled(bias + panel * kPanel, warp_row() + first + r, lane_id() / 4) + lane_id() % 4 * 4,
                     words[r]);
    }
    __syncwarp();
  }

  /// s · scale + bias.
  FOVEA_DEVICE void add_bias(Scores& s, float scale) const {
    if constexpr (S.bias_type == Type::kFloat32) {
      add_floats(s, scale);
    } else {
      add_halves(s, scale);
    }
  }

  /// The address of a piece of 16 bytes of a row; an exclusive or leads to later pieces.  Where all queries share a row
  /// of the bias, the copy engine fills only the first one.
  FOVEA_DEVICE u32 place_of(int r, int piece) const {
    return swizzled(bias, p.bias.query == 0 && p.bias_by_engine ? 0 : r, piece);
  }

  FOVEA_DEVICE void add_halves(Scores& s, float scale) const {
    const u32 first = place_of(warp_row() + lane_id() % 16, lane_id() / 16);
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      u32 words[4];  // of rows h and pieces x: 2x + h
      load_matrices(words, (first ^ j % 8 * 16) + j / 8 * kPanel);
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const u32 word = words[x / 4 * 2 + x % 4 / 2];
        float& entry = s[0][j + x / 4].x[x % 4];
        entry = entry * scale + widen_half<S.bias_type>(word, x % 2);
      }
    }
  }

  FOVEA_DEVICE void add_floats(Scores& s, float scale) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 first = place_of(warp_row() + lane_id() / 4 + 8 * h, lane_id() % 4 / 2) + lane_id() % 2 * 8;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float2 pair = load_shared_8((first ^ j % 4 * 32) + j / 4 * kPanel);
        s[0][j].x[2 * h] = s[0][j].x[2 * h] * scale + pair.x;
        s[0][j].x[2 * h + 1] = s[0][j].x[2 * h + 1] * scale + pair.y;
      }
    }
  }

  /// A bias of −infinity hides an entry even where the product is NaN or +infinity, so that the sum is not −infinity.
  FOVEA_DEVICE void hide_by_bias(Scores& s) const {
    if constexpr (S.bias) {
      bool has_nan = false;
      for_each_entry<1, kN>([&](int i, int j, int e) { has_nan = has_nan || s[i][j].x[e] != s[i][j].x[e]; });
      if (!__any_sync(kAllLanes, has_nan)) return;
      u32 hidden[2] = {};  // as `seen`
#pragma unroll 1
      for (int x = 2 * kN - 1; x >= 0; --x) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float entry = rules.bias_at(row + Rules::row_of(0, 2 * h), key + Rules::key_of(x / 2, x));
          hidden[h] = 2 * hidden[h] + (entry < kLowestBias ? 1 : 0);
        }
      }
      for_each_entry<1, kN>([&](int i, int j, int e) {
        if ((hidden[e / 2] >> (2 * j + e % 2) & 1) != 0) s[i][j].x[e] = -infinity();
      });
    }
  }
};

}  // namespace fovea::cuda
