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

/// |i + offset − j| of ALiBi, without the slope.
struct Distance {
  alignas(64) float base[kPanelRows];  // i + offset − first key

  Distance(const Panel& panel, const Context& context, Interval keys) {
    for (i64 lane = 0; lane < kPanelRows; ++lane) {
      base[lane] =
          lane < panel.rows ? static_cast<float>(panel.query[lane] + context.sequence.band.offset - keys.begin) : 0.0F;
    }
  }
  FOVEA_INLINE V at(i64 r, int lane) const { return absolute(load(base + lane) - splat(static_cast<float>(r))); }
};

/// Copies the entries of a mask or bias under a tile to out[key][kPanelRows]; tells whether any of them is not zero.
template <class T, class Read>
inline bool gather(T* out, const Panel& panel, const Context& context, const EntryView& view, Interval keys,
                   Read read) {
  const i64 n = keys.end - keys.begin;
  bool any = false;
  const char* previous = nullptr;
  for (i64 lane = 0; lane < kPanelRows; ++lane) {
    if (lane >= panel.rows) {
      for (i64 r = 0; r < n; ++r) out[r * kPanelRows + lane] = T{};
      continue;
    }
    const char* from = context.entry(view, panel.query[lane], keys.begin, panel.head[lane]);
    for (i64 r = 0; r < n; ++r) {
      const T x = from == previous ? out[r * kPanelRows + lane - 1] : read(from + r * view.key);
      out[r * kPanelRows + lane] = x;
      any = any || x != T{};
    }
    previous = from;
  }
  return any;
}

/// The mask under a tile as −1 (keep) or 0; false if it hides the whole tile.
inline bool gather_mask(std::int32_t* out, const Panel& panel, const Context& context, Interval keys) {
  return gather(out, panel, context, context.call.mask, keys, [](const char* p) { return *p != 0 ? -1 : 0; });
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

/// S from the product becomes what the softmax sees.  `mask` is what gather_mask gave; `scratch` holds a tile;
/// `tanhs`, where the backward wants it, receives softcap's tanh.
inline void finish_scores(const Tile& s, const Panel& panel, const Context& context, math::TileState state,
                          const std::int32_t* mask, float* scratch, const Tile* tanhs) {
  const FlashCall& call = context.call;
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
    gather(scratch, panel, context, call.bias, s.keys, [type](const char* p) { return widen(p, type); });
    for_each_vector(s, [&](i64 r, int lane, float* at) {
      const V bias = load(scratch + r * kPanelRows + lane);
      store(at, bias == splat(-kInfinity) ? bias : load(at) + bias * kLog2E);
    });
  }
  if (call.mask.data != nullptr) {
    for_each_vector(s, [&](i64 r, int lane, float* at) {
      const VI keep = as_int(load(reinterpret_cast<const float*>(mask) + r * kPanelRows + lane));
      store(at, keep != 0 ? load(at) : splat(-kInfinity));
    });
  }
  if (state == math::TileState::kPartial) hide_outside_band(s, panel, context);
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
