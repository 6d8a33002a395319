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

/// Calls f(row, lane offset, vector address) for every vector of a tile, or the first of each row.
template <int kVectors = kPanelVectors, class F>
FOVEA_INLINE void for_each_vector(const Tile& tile, F&& f) {
  for (i64 r = 0; r < tile.rows(); ++r) {
    FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) f(r, n * kWidth, tile.row(r) + n * kWidth);
  }
}

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

/// Reads the part of a mask or bias under a tile as words of 4 / entry_bytes keys, and calls put(word, first lane,
/// vector of lanes) for each.  Lanes without a row repeat the last row.  What all keys share is read once.
template <class Put>
FOVEA_INLINE void gather(const Panel& panel, const Context& context, const EntryView& view, i64 entry_bytes,
                         Interval keys, Put&& put) {
  const i64 n = keys.end - keys.begin, step = kWidth * 4 / entry_bytes, words = (n * entry_bytes + 3) / 4;
  for (i64 first = 0; first < kPanelRows; first += kWidth) {
    const char* from[kWidth];
    for (i64 i = 0; i < kWidth; ++i) {
      const i64 lane = math::smaller(first + i, panel.lanes - 1);
      from[i] = context.entry(view, panel.query[lane], keys.begin, panel.head[lane]);
    }
    if (view.key == 0) {
      alignas(64) char one[kWidth * 4];
      for (i64 b = 0; b < kWidth * 4; ++b) one[b] = from[b / 4][b % entry_bytes];
      for (i64 w = 0; w < words; ++w) put(w, first, load(reinterpret_cast<const float*>(one)));
      continue;
    }
    for (i64 w = 0, r = 0; r < n; w += kWidth, r += step) {
      V x[kWidth];
      if (view.key == entry_bytes && keys.begin + r + step <= context.sequence.kv_rows) {
        FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) x[i] = load(reinterpret_cast<const float*>(from[i] + 4 * w));
      } else {
        const i64 count = math::smaller(step, n - r);
        for (i64 i = 0; i < kWidth; ++i) {
          alignas(64) char row[kWidth * 4] = {};
          if (view.key == entry_bytes) {
            std::memcpy(row, from[i] + 4 * w, static_cast<std::size_t>(count * entry_bytes));
          } else {
            for (i64 b = 0; b < count * entry_bytes; ++b)
              row[b] = from[i][(r + b / entry_bytes) * view.key + b % entry_bytes];
          }
          x[i] = load(reinterpret_cast<const float*>(row));
        }
      }
      transpose(x);
      FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) {
        if (w + i >= words) break;
        put(w + i, first, x[i]);
      }
    }
  }
}

/// The mask under some keys of a panel, as words, [key / 4][kPanelRows].
inline void read_mask(float* words, const Panel& panel, const Context& context, Interval keys) {
  gather(panel, context, context.call.mask, 1, keys,
         [&](i64 word, i64 lane, V x) { store(words + word * kPanelRows + lane, x); });
}

/// The same for a walk over strips of keys, read kKeys at a time.
template <i64 kKeys>
struct MaskWords {
  float* words;  // [key / 4][kPanelRows]
  const Panel& panel;
  const Context& context;
  Interval keys;
  i64 read = 0;  // keys

  /// Whether the strip has a visible entry.  Strips are asked for in ascending order; some may be left out.
  [[nodiscard]] bool shows(Interval strip) {
    const i64 begin = (strip.begin - keys.begin) / kKeys * kKeys;
    if (read <= begin) {
      read = begin + kKeys;
      read_mask(words, panel, context, {keys.begin + begin, math::smaller(keys.begin + read, keys.end)});
    }
    VI found{};
    for (const float *at = of(strip), *end = at + (strip.end - strip.begin + 3) / 4 * kPanelRows; at < end;
         at += kWidth)
      found |= as_int(load(at));
    return any(found);
  }
  [[nodiscard]] const float* of(Interval strip) const {
    return words + (strip.begin - keys.begin) % kKeys / 4 * kPanelRows;
  }
};

/// s · factor + bias.
inline void add_bias(const Tile& s, const Panel& panel, const Context& context, float factor, float* scratch) {
  const Element type = context.call.bias_type;
  const i64 size = bytes(type);
  gather(panel, context, context.call.bias, size, s.keys,
         [&](i64 word, i64 lane, V x) { store(scratch + word * kPanelRows + lane, x); });
  for_each_vector(s, [&](i64 r, int lane, float* at) {
    const V bias = element_of_words(load(scratch + r * size / 4 * kPanelRows + lane), type, r * size % 4 != 0);
    store(at, bias < splat(kLowestBias) ? splat(-kInfinity) : load(at) * factor + bias * kLog2E);
  });
}

/// Prefetches the mask or bias of some lanes of a panel, or of the rows `later`, to L2: rows that are a power of two
/// apart would evict each other from L1.
FOVEA_INLINE void fetch_entries(const Panel& panel, const Context& context, const EntryView& view, i64 entry_bytes,
                                Interval keys, Interval lanes, i64 later = 0) {
  if (view.key != entry_bytes || view.query == 0) return;
  for (i64 lane = lanes.begin; lane < math::smaller(lanes.end, panel.lanes); ++lane) {
    const char* from = context.entry(view, panel.query[lane] + later, keys.begin, panel.head[lane]);
    for (i64 b = 0; b < (keys.end - keys.begin) * entry_bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
  }
}

/// Keys of S between two prefetches.
template <Word kWord>
inline constexpr i64 kSlice = kWord == Word::kPair ? 16 : 8;

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

/// Hides scores past a tile's last key, up to a whole depth of pairs.
template <Word kWord>
inline Tile hide_past_end(Tile s) {
  if constexpr (kWord == Word::kPair) {
    const i64 rows = s.rows();
    s.keys.end = s.keys.begin + whole(rows, kKeyStep<kWord>);
    for (i64 x = rows * s.stride; x < s.rows() * s.stride; ++x) s.data[x] = -kInfinity;
  }
  return s;
}

/// The product's S becomes the scores of the softmax, except for a factor that is returned.  `mask`: words of its keys;
/// `tanhs`, unless null, receives softcap's tanh for the backward.
template <Word kWord>
inline float finish_scores(const Tile& s, const Panel& panel, const Context& context, math::TileState state,
                           const float* mask, float* scratch, const Tile* tanhs) {
  const FlashCall& call = context.call;
  // What scores still lack.
  float factor = call.softcap > 0 ? context.tanh_factor() : kWord == Word::kPair ? context.fold() : 1.0F;
  const auto pass = [&](const auto& f) {
    const float by = factor;
    for_each_vector(s, [&](i64 r, int lane, float* at) { store(at, f(r, lane, load(at) * by)); });
    factor = 1.0F;
  };
  if (call.softcap > 0) {
    const V cap = splat(call.softcap * kLog2E);
    pass([&](i64 r, int lane, V x) {
      const V t = tanh(x);
      if (tanhs != nullptr) store(tanhs->row(r) + lane, t);
      return t * cap;
    });
  }
  if (call.alibi) {
    const Distance distance(panel, context, s.keys);
    pass([&](i64 r, int lane, V x) { return x - load(panel.slope + lane) * distance.at(r, lane); });
  }
  if (call.bias.data != nullptr) {
    add_bias(s, panel, context, factor, scratch);
    factor = 1.0F;
  }
  // A factor above 0 moves neither the order of scores nor a hidden −inf, and can wait for the exponential.
  if (!(factor > 0.0F)) pass([](i64 /*r*/, int /*lane*/, V x) { return x; });
  if (call.mask.data != nullptr) {
    for_each_vector(s, [&](i64 r, int lane, float* at) {
      const VU keep = as_unsigned(load(mask + r / 4 * kPanelRows + lane)) & (0xffU << (r % 4 * 8));
      store(at, keep != 0 ? load(at) : splat(-kInfinity));
    });
  }
  if (state == math::TileState::kPartial) hide_outside_band(s, panel, context);
  return factor;
}

/// Whether lanes [lane, lane + 16) are the rows of one head that share patches: rows 16n to 16n + 15.
inline bool shares_patches(const Panel& panel, int lane) {
  if (kWidth < 8 || lane + 16 > kPanelRows || panel.query[lane] % 16 != 0) return false;
  for (int i = 1; i < 16; ++i) {
    if (panel.query[lane + i] != panel.query[lane] + i || panel.head[lane + i] != panel.head[lane]) return false;
  }
  return true;
}

/// Writes the dropout factor of every entry, 0 or 1 / kept probability, to z[key][kPanelRows].  keys.begin is a
/// multiple of 16, and keys up to the next multiple of 16 are written.  One call of Philox serves keys j and j + 8, and
/// rows i and i + 8 if lanes are ordered so.
inline void dropout_factors(float* z, const Panel& panel, const Context& context, Interval keys) {
  const V kept = splat(65536.0F / static_cast<float>(context.call.keep_threshold));
  const VI threshold = splat(static_cast<std::int32_t>(context.call.keep_threshold));
  const auto load_words = [](const std::uint32_t* words) {
    return as_unsigned(load(reinterpret_cast<const float*>(words)));
  };
  const auto put = [&](i64 row, int lane, VU word) {
    store(z + row * kPanelRows + lane, VI(word & 0xffffU) < threshold ? kept : V{});
    store(z + (row + 8) * kPanelRows + lane, VI(word >> 16) < threshold ? kept : V{});
  };
  for (int lane = 0; lane < kPanelRows;) {
    const bool shared = shares_patches(panel, lane);
    VI second_word{};
    VU near{};  // 1 in lanes that have the next key's patches
    for (int i = 0; i < kWidth; ++i) {
      second_word[i] = panel.query[lane + i] / 8 % 2 == 1 ? -1 : 0;
      near[i] = shared ? static_cast<std::uint32_t>(i) / 8 : 0;
    }
    const VU row = load_words(panel.draw_row + lane), column = load_words(panel.draw_column + lane);
    const DropoutKeys draw_keys = dropout_keys(load_words(panel.draw_key + lane));
    for (i64 r = 0; r < keys.end - keys.begin; r += 16) {
      for (i64 t = 0; t < 8; t += shared ? kWidth / 8 : 1) {
        const auto [words] = dropout_words(row, column ^ (math::patch_of(keys.begin + r + t) + near), draw_keys);
        if (!shared) {
          put(r + t, lane, second_word != 0 ? words[1] : words[0]);
        } else if (kWidth == 16) {
          V first = V(words[0]), second = V(words[1]);
          swap_halves<kWidth / 2>(first, second, AllLanes{});
          put(r + t, lane, VU(first));
          put(r + t + 1, lane, VU(second));
        } else {
          put(r + t, lane, words[0]);
          put(r + t, lane + 8, words[1]);
        }
      }
    }
    lane += shared ? 16 : kWidth;
  }
}

}  // namespace fovea::cpu::FOVEA_ISA
