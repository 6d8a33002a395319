#pragma once

#include "cpu/flash/panel.h"

// What happens to a tile of scores S[key][lane] between Q Kᵀ and the softmax, option by option:  s = softcap · tanh(s /
// softcap); s += alibi + bias;  hidden entries become −inf.  All in units of log2.  A tile is kPanelRows lanes wide in
// rows of `stride`.
namespace fovea::cpu::FOVEA_ISA {

struct Tile {
  float* data;
  i64 stride;
  Interval keys;  // row r is key keys.begin + r

  [[nodiscard]] i64 rows() const { return keys.end - keys.begin; }
  [[nodiscard]] float* row(i64 r) const { return data + r * stride; }
};

/// Calls f(row, lane offset, vector address) for every vector of a tile.
template <class F>
FOVEA_INLINE void for_each_vector(const Tile& tile, F&& f) {
  for (i64 r = 0; r < tile.rows(); ++r) {
    FOVEA_UNROLL for (int n = 0; n < kPanelVectors; ++n) f(r, n * kWidth, tile.row(r) + n * kWidth);
  }
}

/// A tile as B of a product that sums over its keys: itself, or rounded to pairs in `to`, 0 up to a whole depth.
template <Word kWord>
struct WordsOverKeys {
  const float* data;
  i64 stride;

  WordsOverKeys([[maybe_unused]] float* to, const Tile& tile) : data(tile.data), stride(tile.stride) {
    if constexpr (kWord == Word::kPair) {
      for (i64 r = 0; r < whole(tile.rows(), kKeyStep<kWord>); r += 2) {
        FOVEA_UNROLL for (int lane = 0; lane < kPanelRows; lane += kWidth) {
          const V first = r < tile.rows() ? load(tile.row(r) + lane) : V{};
          const V second = r + 1 < tile.rows() ? load(tile.row(r + 1) + lane) : V{};
          store(to + r / 2 * kPanelRows + lane, round_to_pairs_by_lane(first, second));
        }
      }
      data = to;
      stride = kPanelRows;
    }
  }
};

/// `keys` rows of kGroupRows lanes as A of a product that sums over the lanes: themselves, or rounded to pairs in `to`,
/// 0 up to whole steps of rows.
template <Word kWord>
struct WordsOverRows {
  static constexpr i64 kStride = kGroupRows / kPerWord<kWord>;
  const float* data;

  WordsOverRows([[maybe_unused]] float* to, const float* tile, [[maybe_unused]] i64 keys) : data(tile) {
    if constexpr (kWord == Word::kPair) {
      for (i64 x = 0; x < keys * kStride; x += kWidth)
        store(to + x, round_to_pairs(load(tile + 2 * x), load(tile + 2 * x + kWidth)));
      for (i64 x = keys * kStride; x < whole(keys, kRowStep<kWord>) * kStride; ++x) to[x] = 0.0F;
      data = to;
    }
  }
  [[nodiscard]] const float* from_row(i64 lane) const { return data + lane / kPerWord<kWord>; }
};

/// |i + offset − j| of ALiBi, without the slope.
struct Distance {
  alignas(64) float base[kPanelRows];  // i + offset − first key

  Distance(const Panel& panel, const Context& context, Interval keys) {
    for (i64 lane = 0; lane < kPanelRows; ++lane) {
      base[lane] =
          lane < panel.lanes ? static_cast<float>(panel.query[lane] + context.sequence.band.offset - keys.begin) : 0.0F;
    }
  }
  FOVEA_INLINE V at(i64 r, int lane) const { return absolute(load(base + lane) - splat(static_cast<float>(r))); }
};

/// Copies the entries of a mask or bias under a tile to out[key][kPanelRows], as `read` finds one and `read_vector` as
/// many neighbours as a vector holds; tells whether any of them is not zero.
template <class Read, class ReadVector>
inline bool gather(float* out, const Panel& panel, const Context& context, const EntryView& view, Interval keys,
                   i64 entry_bytes, Read read, ReadVector read_vector) {
  const i64 n = keys.end - keys.begin, whole = view.key == entry_bytes ? n / kWidth * kWidth : 0;
  const char* from[kPanelRows];
  for (i64 lane = 0; lane < panel.lanes; ++lane)
    from[lane] = context.entry(view, panel.query[lane], keys.begin, panel.head[lane]);
  VI found{};
  for (i64 first = 0; first < kPanelRows; first += kWidth) {
    for (i64 r = 0; r < whole; r += kWidth) {
      V x[kWidth];
      FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) {
        x[i] = first + i < panel.lanes ? read_vector(from[first + i] + r * entry_bytes) : V{};
        found |= as_int(x[i]);
      }
      transpose(x);
      FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) store(out + (r + i) * kPanelRows + first, x[i]);
    }
    for (i64 lane = first; lane < first + kWidth; ++lane) {
      for (i64 r = whole; r < n; ++r) {
        const float x = lane < panel.lanes ? read(from[lane] + r * view.key) : 0.0F;
        out[r * kPanelRows + lane] = x;
        found[0] |= __builtin_bit_cast(std::int32_t, x);
      }
    }
  }
  return any(found);
}

/// The mask under a tile as −1 (keep) or 0; false if it hides the whole tile.
inline bool gather_mask(float* out, const Panel& panel, const Context& context, Interval keys) {
  constexpr auto kKeep = -1;
  return gather(
      out, panel, context, context.call.mask, keys, 1,
      [](const char* p) { return __builtin_bit_cast(float, *p != 0 ? kKeep : 0); },
      [](const char* p) { return as_float(widen_bytes(p) != 0); });
}

inline void hide_outside_band(const Tile& s, const Panel& panel, const Context& context) {
  alignas(64) std::int32_t begin[kPanelRows], end[kPanelRows];
  for (i64 lane = 0; lane < kPanelRows; ++lane) {
    const Interval seen = context.sequence.band.keys_of_row(panel.query[lane]);
    begin[lane] = static_cast<std::int32_t>(math::smaller(math::larger(seen.begin - s.keys.begin, i64{0}), s.rows()));
    end[lane] = static_cast<std::int32_t>(math::smaller(math::larger(seen.end - s.keys.begin, i64{0}), s.rows()));
  }
  for_each_vector(s, [&](i64 r, int lane, float* at) {
    const VI key = splat(static_cast<std::int32_t>(r));
    const VI seen = (key >= as_int(load(reinterpret_cast<float*>(begin + lane)))) &
                    (key < as_int(load(reinterpret_cast<float*>(end + lane))));
    store(at, seen ? load(at) : splat(-kInfinity));
  });
}

/// Scores past a tile's last key, up to a whole depth of pairs, are none.
template <Word kWord>
inline Tile hide_past_end(Tile s) {
  if constexpr (kWord == Word::kPair) {
    const i64 rows = s.rows();
    s.keys.end = s.keys.begin + whole(rows, kKeyStep<kWord>);
    for (i64 x = rows * s.stride; x < s.rows() * s.stride; ++x) s.data[x] = -kInfinity;
  }
  return s;
}

/// S from the product becomes what the softmax sees, but for the factor that is returned.  `mask` is what gather_mask
/// gave; `scratch` holds a tile; `tanhs`, where the backward wants it, receives softcap's tanh.
template <Word kWord>
inline float finish_scores(const Tile& s, const Panel& panel, const Context& context, math::TileState state,
                           const float* mask, float* scratch, const Tile* tanhs) {
  const FlashCall& call = context.call;
  float factor = kWord == Word::kPair ? context.fold() : 1.0F;
  // A factor above 0 moves neither the order of scores nor a hidden −inf, and can wait for the exponential.
  if (factor != 1.0F && (call.softcap > 0 || call.alibi || call.bias.data != nullptr || !(factor > 0.0F))) {
    for_each_vector(s, [&](i64 /*r*/, int /*lane*/, float* at) { store(at, load(at) * factor); });
    factor = 1.0F;
  }
  if (call.softcap > 0) {
    const V cap = splat(call.softcap * kLog2E);
    for_each_vector(s, [&](i64 r, int lane, float* at) {
      const V t = tanh(load(at));
      if (tanhs != nullptr) store(tanhs->row(r) + lane, t);
      store(at, t * cap);
    });
  }
  if (call.alibi) {
    const Distance distance(panel, context, s.keys);
    for_each_vector(
        s, [&](i64 r, int lane, float* at) { store(at, load(at) - load(panel.slope + lane) * distance.at(r, lane)); });
  }
  if (call.bias.data != nullptr) {
    const Element type = call.bias_type;
    gather(
        scratch, panel, context, call.bias, s.keys, bytes(type), [type](const char* p) { return widen(p, type); },
        [type](const char* p) { return widen_vector(p, type); });
    for_each_vector(s, [&](i64 r, int lane, float* at) {
      const V bias = load(scratch + r * kPanelRows + lane);
      store(at, bias == splat(-kInfinity) ? bias : load(at) + bias * kLog2E);
    });
  }
  if (call.mask.data != nullptr) {
    for_each_vector(s, [&](i64 r, int lane, float* at) {
      const VI keep = as_int(load(mask + r * kPanelRows + lane));
      store(at, keep != 0 ? load(at) : splat(-kInfinity));
    });
  }
  if (state == math::TileState::kPartial) hide_outside_band(s, panel, context);
  return factor;
}

/// The dropout factor of every entry, 0 or 1 / kept probability, to z[key][kPanelRows].  keys.begin is a multiple of
/// 16; rows up to the next multiple of 16 are written.  One call of Philox serves keys j and j + 8.
inline void dropout_factors(float* z, const Panel& panel, const Context& context, Interval keys) {
  const V kept = splat(65536.0F / static_cast<float>(context.call.keep_threshold));
  const VI threshold = splat(static_cast<std::int32_t>(context.call.keep_threshold));
  for (int lane = 0; lane < kPanelRows; lane += kWidth) {
    VI second_word{};
    for (int i = 0; i < kWidth; ++i) second_word[i] = panel.query[lane + i] / 8 % 2 == 1 ? -1 : 0;
    for (i64 r = 0; r < keys.end - keys.begin; r += 16) {
      for (i64 t = 0; t < 8; ++t) {
        VU x0 = as_unsigned(load(reinterpret_cast<const float*>(panel.draw_row) + lane));
        VU x1 = as_unsigned(load(reinterpret_cast<const float*>(panel.draw_column) + lane)) ^
                math::patch_of(keys.begin + r + t);
        VU key = as_unsigned(load(reinterpret_cast<const float*>(panel.draw_key) + lane));
        FOVEA_UNROLL for (int round = 0; round < math::kDropoutRounds; ++round) {
          const Wide p = multiply_wide(x0, splat(math::kPhilox2x32M));
          x0 = p.high ^ key ^ x1;
          x1 = p.low;
          key += math::kPhiloxW0;
        }
        const VU word = second_word != 0 ? x1 : x0;
        store(z + (r + t) * kPanelRows + lane, VI(word & 0xffffU) < threshold ? kept : V{});
        store(z + (r + t + 8) * kPanelRows + lane, VI(word >> 16) < threshold ? kept : V{});
      }
    }
  }
}

}  // namespace fovea::cpu::FOVEA_ISA
