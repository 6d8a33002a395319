#pragma once

#include "cuda/backward_plan_sm90.h"
#include "cuda/kernels/hopper/gradient_columns.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// dbias where its keys are not summed.  A block takes tiles of 128 × 128 entries, whose bias is in shared memory; the
// heads, sequences and, where rows are summed, rows that share them are copied one after the other, and the sum of
// their dS stays in registers until it is written through the bias's place.  Where tiles are few, several blocks share
// out the walk of each, and leave their parts as the portable kernel does.
namespace fovea::cuda {

/// A tile of the bias and of dbias.
struct BiasTile {
  int key, row, head, batch;  // 0 where it is shared
  int part;                   // of its walk
};

template <BackwardSpec S>
struct BiasGradientState {
  static constexpr BiasGradientSm90Shared kShared = BiasGradientSm90Shared::of(S);
  Ring<kShared.places> ring;        // panels of K and q, then of V and dout, of one sharer after the other
  Ring<kShared.bias_places> bias;   // of a tile, given back with its sum in it
  Ring<kShared.bias_places> known;  // whether it hides something: never given back
  struct Sharer {
    Sequence sequence;
    int head;
    u32 marks;  // and the first row, a multiple of kTile
  } sharers[kShared.steps];
  static constexpr u32 kFirst = 1, kEnd = 2;       // of its tile; behind the last one
  static constexpr u32 kHidden = 4, kPartial = 8;  // what is seen of the tile
  BiasTile tiles[kShared.bias_places];
  bool hides[kShared.bias_places];
  int of_part, longer_parts;  // sharers of each part; parts that have one more
  BiasTile at;                // whose K, q, V and dout are being copied, and from which sequence
  Sequence sequence;
};

template <BackwardSpec S>
struct BiasGradientSm90 {
  using State = BiasGradientState<S>;
  using Sharer = typename State::Sharer;
  static constexpr BiasGradientSm90Shared kShared = State::kShared;
  static constexpr int kTile = S.block_m, kStatistics = 4 * kTile;
  static constexpr u32 kPanels = kShared.panels, kKeyPanels = kShared.key_panels;
  static constexpr bool kAhead = kShared.bias_places > 1;  // a bias is there before the sum of the last tile leaves
  using Columns = GradientColumns<S>;
  using Entries = typename Columns::Entries;

  const BackwardSm90Params& p;
  State& state;
  const u32 base;
  const int first_key;  // of the warpgroup, in the tile

  FOVEA_DEVICE u32 bias_at(u32 t) const { return base + state.bias.place(t) * kShared.bias_stage; }
  FOVEA_DEVICE u32 keys_at(u32 n) const { return base + kShared.ring + state.ring.place(n) * kShared.place; }
  FOVEA_DEVICE u32 rows_at(u32 n) const { return keys_at(n) + kTile * kPanelRowBytes; }
  FOVEA_DEVICE BiasTile& tile_in(u32 t) const { return state.tiles[state.bias.place(t)]; }
  FOVEA_DEVICE Sharer& sharer(u32 step) const { return state.sharers[step % kShared.steps]; }
  FOVEA_DEVICE u32 log2_lse_at(u32 step) const {
    return base + kShared.statistics + step % kShared.steps * 2 * kStatistics;
  }
  FOVEA_DEVICE u32 delta_at(u32 step) const { return log2_lse_at(step) + kStatistics; }
  /// A mask's words of 64 rows, then of the other ones.
  FOVEA_DEVICE u32 words_at(u32 step, int half = 0) const {
    return base + kShared.words + (step % kShared.steps * 2 + half) * kShared.words_stage;
  }

  FOVEA_DEVICE static int tiles(int of) { return (of + kTile - 1) / kTile; }
  /// How many there are of what a stride of dbias leads along, or of what is summed there.
  FOVEA_DEVICE static int own(i64 stride, int count) { return stride == 0 ? 1 : count; }
  FOVEA_DEVICE static int shared(i64 stride, int count) { return stride == 0 ? count : 1; }

  /// Tiles: of keys × rows × heads × batch, 1 where dbias is broadcast, part by part.
  FOVEA_DEVICE BiasTile tile(u32 number) const {
    const auto take = [&number](int count) {
      if (count == 1) return 0;
      const u32 at = number % static_cast<u32>(count);
      number /= static_cast<u32>(count);
      return static_cast<int>(at);
    };
    BiasTile at{};
    at.key = take(tiles(p.seqlen_kv)) * kTile, at.row = take(own(p.dbias.query, tiles(p.seqlen_q))) * kTile;
    at.head = take(own(p.dbias.head, p.q_heads));
    if (p.bias_parts > 1) {
      at.batch = take(own(p.dbias.batch, p.batch)), at.part = static_cast<int>(number);
    } else {
      at.batch = static_cast<int>(number);
    }
    return at;
  }

  // ---- by one thread

  FOVEA_DEVICE void load_all() const {
    u32 step = 0;
    const int sharers =
        shared(p.dbias.query, tiles(p.seqlen_q)) * shared(p.dbias.head, p.q_heads) * shared(p.dbias.batch, p.batch);
    state.of_part = sharers / p.bias_parts, state.longer_parts = sharers % p.bias_parts;
#pragma unroll 1
    for (u32 number = blockIdx.x; number < p.bias_tiles; number += gridDim.x) load_tile(state.at = tile(number), step);
    load_nothing(step, State::kFirst | State::kEnd);
  }
  /// at: the tile, then the rows of each of its part's sharers.
  FOVEA_DEVICE void load_tile(BiasTile& at, u32& step) const {
    const int longer = state.longer_parts, begin = state.of_part * at.part + math::smaller(at.part, longer);
    u32 first = State::kFirst;
    int left = state.of_part + (at.part < longer ? 1 : 0);
    if (begin > 0) {
      const int rows = shared(p.dbias.query, tiles(p.seqlen_q)), heads = shared(p.dbias.head, p.q_heads);
      at.row += begin % rows * kTile, at.head += begin / rows % heads, at.batch += begin / rows / heads;
    }
    int head = at.head, batch = at.batch;
    if (left > 0) state.sequence = Sequence::of(p, batch);
#pragma unroll 1
    for (; left > 0; --left) {
      const TileState sight = state.sequence.band.tile({at.row, at.row + kTile}, {at.key, at.key + kTile});
      if (sight != TileState::kHidden) {
        load(step++, at, head, first | (sight == TileState::kPartial ? State::kPartial : 0));
        first = 0;
      }
      if (p.dbias.query == 0) {
        if ((at.row += kTile) < p.seqlen_q) continue;
        at.row = 0;
      }
      if (p.dbias.head == 0) {
        if (++head < p.q_heads) continue;
        head = 0;
      }
      if (left > 1) state.sequence = Sequence::of(p, ++batch);
    }
    if (first != 0) load_nothing(step++, State::kFirst | State::kHidden);
  }
  /// Behind the last tile nobody gives back more than the first panel.
  FOVEA_DEVICE void load_nothing(u32 step, u32 marks) const {
    const u32 end = step * kPanels + ((marks & State::kEnd) != 0 ? 1 : kPanels);
#pragma unroll 1
    for (u32 n = step * kPanels; n < end; ++n) {
      state.ring.await_empty(n);
      if (n == step * kPanels) sharer(step).marks = marks;
      state.ring.full[state.ring.place(n)].arrive();
    }
  }
  FOVEA_DEVICE void load(u32 step, const BiasTile& at, int head, u32 marks) const {
    const Sequence& sequence = state.sequence;
    const int batch = p.cu_seqlens_q.data != nullptr ? 0 : sequence.batch;  // packed sequences are one to the engine
    const RowPlace keys{sequence.kv_begin + at.key, head / p.group, batch};
    const RowPlace rows{sequence.q_begin + at.row, head, batch};
    const u32 n = step * kPanels;
    state.ring.await_empty(n);
    sharer(step) = {sequence, head, marks | static_cast<u32>(at.row)};
    Barrier& full = state.ring.full[state.ring.place(n)];
    full.expect(2 * kStatistics);
    const i64 slot = RowSlots(p, sequence, p.slot_rows).at(head, at.row / p.slot_rows) * p.slot_rows;
    load_bytes(log2_lse_at(step), p.log2_lse + slot, kStatistics, full);
    load_bytes(delta_at(step), p.delta + slot, kStatistics, full);
    if constexpr (S.mask) load_words(step, at, head, full);
    load_factors(n, kKeyPanels, p.k_map, keys, p.q_map, rows);
    load_factors(n + kKeyPanels, kPanels - kKeyPanels, p.v_map, keys, p.dout_map, rows);
  }
  /// A mask's words, as far as there are rows.
  FOVEA_DEVICE void load_words(u32 step, const BiasTile& at, int head, Barrier& full) const {
    const WordView& view = p.mask_words;
    const u32* const plane = view.data + state.sequence.batch * view.batch + head * view.head;
#pragma unroll 1
    for (int half = 0; half < kTile / kGroupRows; ++half) {
      const int tile = (at.row / kGroupRows + half) * view.row;
      if (tile * kGroupRows >= view.rows) break;
      full.expect(kShared.words_stage);
      load_bytes(words_at(step, half), plane + (i64{tile} * view.count + at.key / 32) * kGroupRows, kShared.words_stage,
                 full);
    }
  }
  FOVEA_DEVICE void load_factors(u32 n, u32 panels, const TensorMap& of_keys, const RowPlace& keys,
                                 const TensorMap& of_rows, const RowPlace& rows) const {
    const int end = static_cast<int>(panels) * kPanelColumns;
#pragma unroll 1
    for (int column = 0; column < end; column += kPanelColumns, ++n) {
      Barrier& full = state.ring.full[state.ring.place(n)];
      state.ring.await_empty(n);
      full.arrive_with(kShared.place);
      load_panel(keys_at(n), of_keys, full, column, keys, Keep::kYes);
      load_panel(rows_at(n), of_rows, full, column, rows, Keep::kYes);
    }
  }

  /// Loads the bias of a tile, after the sum of an earlier one in its place has been stored.
  FOVEA_DEVICE void exchange_all() const {
    u32 number = blockIdx.x;
#pragma unroll 1
    for (u32 t = 0; number < p.bias_tiles + kShared.bias_places * gridDim.x; ++t, number += gridDim.x) {
      state.bias.await_empty(t);
      if (kAhead && t >= kShared.bias_places && p.dbias_by_engine) {
        const BiasTile at = tile_in(t);
        constexpr int kColumns = kPanelRowBytes / kBytes<S.bias_type>;
#pragma unroll
        for (int panel = 0; panel < kTile / kColumns; ++panel)
          store_panel(p.dbias_map, bias_at(t) + panel * kTile * kPanelRowBytes, at.key + panel * kColumns,
                      RowPlace{at.row, at.head, at.batch});
        close_additions();
        await_additions_read<0>();
      }
      if (number >= p.bias_tiles) continue;
      const BiasTile at = tile_in(t) = tile(number);
      Barrier& full = state.bias.full[state.bias.place(t)];
      load_bias_panels<kTile, kTile, S.bias_type>(bias_at(t), p, full, at.key, {at.row, at.head, at.batch}, Keep::kNo);
      full.arrive();
    }
  }

  /// Whether a tile's bias hides something; by a warp, which gives all rows the one that they share, too.
  FOVEA_DEVICE void look_all() const {
    u32 t = 0;
#pragma unroll 1
    for (u32 number = blockIdx.x; number < p.bias_tiles; number += gridDim.x, ++t) {
      state.bias.await_full(t);
      if (p.bias.query == 0) repeat_row(bias_at(t));
      u32 least = 0;
#pragma unroll 4
      for (u32 at = lane_id() * 16; at < kShared.bias_stage && S.bias_type != Type::kFloat32; at += kWarp * 16) {
        const uint4 entries = load_shared_16(bias_at(t) + at);
        least = least_of_two<S.bias_type>(least,
                                          least_of_two<S.bias_type>(least_of_two<S.bias_type>(entries.x, entries.y),
                                                                    least_of_two<S.bias_type>(entries.z, entries.w)));
      }
      const bool hides =
          widen_half<S.bias_type>(least, 0) < kLowestBias || widen_half<S.bias_type>(least, 1) < kLowestBias;
      state.hides[state.bias.place(t)] = __any_sync(kAllLanes, hides);
      state.known.announce(t);
    }
  }

  FOVEA_DEVICE static void repeat_row(u32 bias) {
#pragma unroll 1
    for (u32 piece = lane_id(); piece < kShared.bias_stage / kTile / 16; piece += kWarp) {
      const u32 panel = bias + piece / 8 * (kTile * kPanelRowBytes);
      const uint4 entries = load_shared_16(panel + piece % 8 * 16);
#pragma unroll 1
      for (int r = 1; r < kTile; ++r) store_shared_16(swizzled(panel, r, static_cast<int>(piece % 8)), entries);
    }
    fence_engine();  // which fills this place again
    __syncwarp();
  }

  // ---- by a warpgroup for its 64 keys

  FOVEA_DEVICE int warp_key() const { return first_key + warp_id() % 4 * 16; }

  FOVEA_DEVICE void gather() const {
    Entries sum;
    bool checks = false;
    u32 t = ~0U;
#pragma unroll 1
    for (u32 step = 0;; ++step) {
      state.ring.await_full(step * kPanels);
      const u32 marks = uniform(sharer(step).marks) % kTile;
      if ((marks & State::kFirst) != 0) {
        if (step > 0) leave(sum, t);
        if ((marks & State::kEnd) != 0) break;
        ++t;
        Columns::each([&](int j, int e) { sum[0][j].x[e] = 0.0F; });
        state.known.await_full(t);
        checks = uniform(state.hides[state.bias.place(t)]);
      }
      if (!S.mask && S.bias_type != Type::kFloat32 && !checks && marks <= State::kFirst) {
        add<false, false>(sum, step, t);
      } else if ((marks & State::kHidden) != 0) {
#pragma unroll
        for (u32 n = step * kPanels; n < (step + 1) * kPanels; ++n) state.ring.await_full(n), state.ring.release(n);
      } else if (S.mask || (marks & State::kPartial) != 0) {
        add<true, true>(sum, step, t);
      } else {
        add<false, true>(sum, step, t);
      }
    }
  }
  /// A step's panels from the first one up to the last.
  FOVEA_DEVICE void release(u32 step, u32 first, u32 last) const {
#pragma unroll
    for (u32 panel = first; panel < last; ++panel) state.ring.release(step * kPanels + panel);
  }

  /// The sum of tile t: by the place of the bias that this warp has read, or, where the next one waits for it, by hand.
  FOVEA_DEVICE void leave(const Entries& sum, u32 t) const {
    const BiasTile at = tile_in(t);
    const bool by_engine = kAhead && p.dbias_by_engine;
    if (by_engine) put(sum, bias_at(t)), fence_engine();
    state.bias.release(t);
    if (!by_engine) store(sum, at);
  }
  FOVEA_DEVICE void put(const Entries& sum, u32 panels) const {
    const int key = fresh(warp_key()), lane = fresh(lane_id());
    if constexpr (S.bias_type == Type::kFloat32) {
      const u32 mine = swizzled(panels + key / 32 * kTile * kPanelRowBytes, lane % 4 * 2, key % 32 / 4 + lane / 16) +
                       lane / 4 % 4 * 4;
      Columns::each([&](int j, int e) {
        store_shared((mine ^ e % 2 * 16 ^ e / 2 * 32) + (8 * j + e % 2) * kPanelRowBytes,
                     __float_as_uint(sum[0][j].x[e]));
      });
    } else {
      const u32 mine =
          swizzled(panels + key / 64 * kTile * kPanelRowBytes, lane / 16 * 8 + lane % 8, key % 64 / 8 + lane / 8 % 2);
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k)
        store_matrices_transposed(mine + k * 16 * kPanelRowBytes, operand_a<S.bias_type>(sum[0], k));
    }
  }
  FOVEA_DEVICE void store(const Entries& sum, const BiasTile& at) const {
    const EntryView& view = p.dbias;
    if (p.bias_parts > 1) {
      const int rows = p.slot_rows;  // of the portable kernel's tiles; beyond 64 the next one of the same keys follows
      const i64 skipped = rows < kTile ? i64{(p.seqlen_kv + kGroupRows - 1) / kGroupRows - 1} * rows * kPartRow : 0;
      store_to<Type::kFloat32>(sum, at, part_at(at), kPartRow, 4, skipped);
    } else {
      const int key = at.key + first_key;
      store_to<S.bias_type>(
          sum, at, view.data + at.batch * view.batch + at.head * view.head + at.row * view.query + key * view.key,
          view.query, view.key, 0);
    }
  }
  static constexpr i64 kPartRow = 4 * kGroupRows;
  /// Where the portable kernel leaves a part of this warpgroup's keys: [part][batch][head][row tile][key tile].
  FOVEA_DEVICE char* part_at(const BiasTile& at) const {
    const int rows = p.dbias.query == 0 ? 1 : p.slot_rows, keys = (p.seqlen_kv + kGroupRows - 1) / kGroupRows;
    i64 number = i64{at.part} * own(p.dbias.batch, p.batch) + at.batch;
    number = number * own(p.dbias.head, p.q_heads) + at.head;
    if (p.dbias.query != 0) number = number * ((p.seqlen_q + rows - 1) / rows) + at.row / rows;
    number = number * keys + (at.key + first_key) / kGroupRows;
    return reinterpret_cast<char*>(p.bias_sums) + number * rows * kPartRow;
  }
  /// skipped: bytes between a row and the one behind it, of rows 63 and 64.
  template <Type kType>
  FOVEA_DEVICE void store_to(const Entries& sum, const BiasTile& at, char* to, i64 to_row, i64 to_key,
                             i64 skipped) const {
    const int mine = fresh(warp_id() % 4 * 16 + lane_id() / 4), keys = p.seqlen_kv - at.key - first_key - mine;
    to += mine * to_key;
    if (p.dbias.query == 0) {
      float total[2] = {};
      Columns::each([&](int j, int e) { total[e / 2] += sum[0][j].x[e]; });
      total[0] = quad_sum(total[0]), total[1] = quad_sum(total[1]);
      if (lane_id() % 4 == 0 && keys > 0) write<kType>(to, total[0]);
      if (lane_id() % 4 == 0 && keys > 8) write<kType>(to + 8 * to_key, total[1]);
      return;
    }
    const int row = fresh(Columns::row_of(0, 0)), rows = p.seqlen_q - at.row - row;
    to += row * to_row;
#pragma unroll
    for (int j = 0; j < Columns::kN; ++j, to += 6 * to_row) {  // from row to row, for addresses take the most
      if (j == kGroupRows / 8) to += skipped;
#pragma unroll
      for (int e = 0; e < 2; ++e, to += to_row) {
        if (8 * j + e >= rows) continue;
        if (keys > 0) write<kType>(to, sum[0][j].x[e]);
        if (keys > 8) write<kType>(to + 8 * to_key, sum[0][j].x[e + 2]);
      }
    }
  }

  /// dS of a sharer; kHides: mask, band and ends may hide an entry; kChecks: these or the bias may.  Then entries are
  /// checked one by one if something is not finite.  Otherwise dP is made while S becomes P, if there is room.
  template <bool kHides, bool kChecks>
  FOVEA_DEVICE void add(Entries& sum, u32 step, u32 t) const {
    constexpr bool kPlain = !kChecks && Columns::kDeltaFirst && !S.softcap && !S.alibi;
    constexpr bool kAtOnce = kPlain && kPanels <= kShared.places;
    const BiasTile& at = tile_in(t);
    const Sharer& what = sharer(step);
    const RowMap<Packing::kNone> rows{static_cast<int>(what.marks / kTile * kTile), what.sequence.q_rows, what.head, 1};
    const typename Columns::Rules rules{p, what.sequence, rows};
    Columns columns{rules, at.key + fresh(warp_key() + lane_id() / 4), {}, {}, {}, {}};
    if constexpr (S.dropout) columns.stream = uniform(rules.stream(what.head));
    Entries c, d;  // S and P, dP and dS
    if constexpr (kAtOnce) Columns::begin_with_delta(d, delta_at(step));
    multiply<S.head_dim>(c, step * kPanels, 0);
    if constexpr (kHides) {
      columns.see_all();
      if constexpr (S.mask) columns.look_up(words_at(step) + fresh(warp_key()) / 16 * (kWarp * 4), kShared.words_stage);
      if (!S.mask || uniform(what.marks & State::kPartial) != 0) columns.keep_to_band();
    }
    if constexpr (kAtOnce) multiply<S.head_dim_v>(d, step * kPanels + kKeyPanels, 1);
    await_products<kAtOnce ? 1 : 0>();
    pin(c[0]);
    release(step, 0, kKeyPanels);
    float check = kChecks ? Columns::not_finite(c) : 0.0F;
    columns.finish(c);
    columns.add_bias(c, bias_at(t), fresh(warp_key()), false);
    if constexpr (S.dropout) columns.draw();
    columns.weigh(c, log2_lse_at(step));
    if constexpr (kPlain) {
      if constexpr (!kAtOnce)
        Columns::begin_with_delta(d, delta_at(step)), multiply<S.head_dim_v>(d, step * kPanels + kKeyPanels, 1);
      state.ring.await_full(step * kPanels + kKeyPanels);  // known, but a branch: else dP is awaited before S is P
      await_products<0>();
      pin(d[0]);
      release(step, kKeyPanels, kPanels);
      Columns::each([&](int j, int e) { sum[0][j].x[e] += c[0][j].x[e] * d[0][j].x[e]; });
    } else {
      typename Columns::Packed weights;
      columns.pack(weights, c);
      if constexpr (kHides) columns.hide(weights);
      if constexpr (Columns::kDeltaFirst) Columns::begin_with_delta(d, delta_at(step));
      multiply<S.head_dim_v>(d, step * kPanels + kKeyPanels, Columns::kDeltaFirst ? 1 : 0);
      await_products<0>();
      pin(d[0]);
      if constexpr (kChecks) check += columns.not_finite_gradients(d, delta_at(step));
      if (kChecks && __any_sync(kAllLanes, !(check == 0.0F))) {
        columns.hide_by_bias(weights);
        columns.template differentiate<true>(d, weights, delta_at(step));
      } else {
        columns.template differentiate<false>(d, weights, delta_at(step));
      }
      release(step, kKeyPanels, kPanels);
      Columns::each([&](int j, int e) { sum[0][j].x[e] += d[0][j].x[e]; });
    }
  }
  /// A product of keys by rows, issued and not awaited; n: the first panel's place in the ring.
  template <int kDim>
  FOVEA_DEVICE void multiply(Entries& c, u32 n, int add) const {
#pragma unroll
    for (u32 panel = 0; panel < panels_of(kDim); ++panel) state.ring.await_full(fresh(n) + panel);
    pin(c[0]);
    fence_products();
#pragma unroll
    for (int panel = 0; panel < kDim / kPanelColumns; ++panel)
      multiply_panel<kPanelColumns>(c, n + panel, panel == 0 ? add : 1);
    constexpr int kRest = kDim % kPanelColumns;
    if constexpr (kRest != 0) multiply_panel<kRest>(c, n + kDim / kPanelColumns, kDim < kPanelColumns ? add : 1);
    close_products();
  }
  template <int kColumns>
  FOVEA_DEVICE void multiply_panel(Entries& c, u32 n, int add) const {
    multiply_by_rows<S.type, kColumns, kTile, kTile>(c[0], matrix_at(keys_at(n) + first_key * kPanelRowBytes, 16),
                                                     matrix_at(rows_at(n), 16), add);
  }
};

/// Blocks take tiles in turns.
template <BackwardSpec S>
__device__ void bias_gradient_sm90(const BackwardSm90Params& p) {
  extern __shared__ __align__(1024) char shared[];
  using Gradient = BiasGradientSm90<S>;
  using State = BiasGradientState<S>;
  static_assert(sizeof(State) <= kStateBytes);
  State& state = *reinterpret_cast<State*>(shared + Gradient::kShared.state);
  if (threadIdx.x == 0) {
    state.ring.begin(S.warps), state.bias.begin(S.warps), state.known.begin(1, kArrivals);
    fence_barriers();
    fence_engine();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
  const Gradient gradient{p, state, shared_address(shared), (group - 1) * kGroupRows};
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) gradient.load_all();
    if (threadIdx.x == kWarp) gradient.exchange_all();
    if (warp_id() == 2) gradient.look_all();
  } else {
    take_registers<232>();
    gradient.gather();
  }
}

}  // namespace fovea::cuda
