#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// Which tiles of rows a block of the backward walks, and in which order blocks add to dq.
namespace fovea::cuda {

/// A tile of rows on a block's walk.
struct Step {
  const char *q, *dout;  // its first rows
  i64 slot;
  int head, tile;
  int stage;  // its place in the ring; without pointers, its block of keys
  int turn;   // key blocks that add to its dq before this one, where their order matters
  TileState mask;
  bool exists, full_band;  // every row sees every key, as far as the band goes
  math::DropoutStream stream;

  template <bool kMasked>
  FOVEA_DEVICE bool full() const {
    return full_band && (!kMasked || mask == TileState::kFull);
  }
};

/// What a block of the grid works on.  Blocks: heads abreast × lines × the rest of kv heads × batch.  Lines are a kv
/// head's key blocks, and before them, where blocks end dq, those that convert dq of the kv head p.dq_lag turns
/// earlier; the last p.dq_lag turns have no kv head of their own.  With packed sequences a kv head's turn has the slots
/// of all of them (`PackedBlock`).  Early keys, which most rows see under a causal rule, come first; where dq is added
/// up in order they come last, so that a block's first tile does not wait.
struct BlockTask {
  int turn;  // of the kv head among those of all sequences; packed sequences count as one
  int batch, kv_head;
  int key_block, part;  // of its keys, or of its dq; the other one is −1

  template <BackwardSpec S>
  FOVEA_DEVICE static BlockTask of(const BackwardParams& p, int block) {
    const int parts = S.ends_dq ? p.dq_parts : 0, lines = p.key_lines + parts, row = block / p.heads_abreast,
              line = row % lines - parts, key_line = S.deterministic ? p.key_lines - 1 - line : line;
    const bool ends = S.ends_dq && line < 0, batch_inside = S.bias && p.batch_inside;
    const int turn = row / lines * p.heads_abreast + block % p.heads_abreast - (ends ? p.dq_lag : 0);
    if (!S.holds_dq && !S.ends_dq && p.cu_seqlens_kv.data != nullptr) {
      const auto [batch, key_block] = packed_block(p, p.cu_seqlens_kv, p.total_kv, S.block_n, key_line);
      return {turn, batch, turn, key_block, -1};
    }
    return {turn, batch_inside ? turn % p.batch : turn / p.kv_heads, batch_inside ? turn / p.batch : turn % p.kv_heads,
            ends ? -1 : key_line, ends ? line + parts : -1};
  }
  FOVEA_DEVICE bool exists(const BackwardParams& p) const { return turn >= 0 && turn < p.batch * p.kv_heads; }
  FOVEA_DEVICE bool has_part() const { return part >= 0; }
};

/// The number of this block, or of its cluster of kBlocks; where blocks wait for those of lower numbers, in the order
/// in which they start, so that these have started.
template <BackwardSpec S, int kBlocks = 1>
FOVEA_DEVICE int number_of_block(const BackwardParams& p) {
  const bool waits = (S.deterministic || S.ends_dq) && p.row_blocks > 0;  // without rows nobody has cleared the count
  return waits ? atomicAdd(p.begun, 1) : static_cast<int>(blockIdx.x) / kBlocks;
}

/// A block's keys and its walk over the tiles of rows that see them, head by head.  It lies in shared memory and is
/// updated by a few threads (`keeps`), because it is read too rarely to be worth registers of all.  kSteps: the length
/// of its ring of steps.  kPoints: steps have pointers to their rows.
template <BackwardSpec S, int kSteps = 4, bool kPoints = true>
struct Walk {
  Sequence sequence;
  int key_block, kv_head;
  int first_head, end_head;  // query heads that read the keys; none where no row sees them
  int first, end;            // tiles of rows that see some of the keys
  int first_full, end_full;
  Step steps[kSteps];
  int window_head, window;  // the head and first of 32 tiles that were looked up in the mask
  u32 some, whole;          // of these, the ones that see something, and everything
  // Of dq_sum, where blocks end dq: the first one of the kv head, and each step's.
  int first_dq_tile, dq_tiles[S.ends_dq ? kSteps : 1];

  FOVEA_DEVICE void take(const BackwardParams& p, const BlockTask& task) {
    sequence = Sequence::of(p, task.batch);
    go_on(p, task);
  }
  /// With another task, where sequences are as long.  Where it has no keys the walk has no steps.
  FOVEA_DEVICE void go_on(const BackwardParams& p, const BlockTask& task) {
    sequence.batch = task.batch;
    key_block = task.key_block, kv_head = task.kv_head;
    if constexpr (S.ends_dq) first_dq_tile = DqPlaces{p}.first_tile(task.turn);
  }

  /// Of k and v.
  FOVEA_DEVICE int head_of_keys(const BackwardParams& p) const {
    return S.split_gqa ? kv_head / p.group_parts : kv_head;
  }

  /// Finds the tiles that see the block's keys.
  FOVEA_DEVICE void begin(const BackwardParams& p) {
    const Band& band = sequence.band;
    const Interval keys{key_block * S.block_n, (key_block + 1) * S.block_n};
    const Interval rows = band.rows_of_keys(keys), seers = band.rows_that_see_all(keys);
    if (!S.mask || lane_id() == 0) {
      first = rows.begin / S.block_m;
      end = rows.empty() || (S.goes_on && key_block < 0) ? first : (rows.end - 1) / S.block_m + 1;
      first_full = (seers.begin + S.block_m - 1) / S.block_m;
      end_full = seers.end / S.block_m;
      first_head = kv_head * p.group;
      end_head = first < end ? first_head + p.group : first_head;
      window_head = -1;
    }
    if constexpr (S.mask) __syncwarp();
  }
  /// Writes step n, which follows `before` or is the first one.
  FOVEA_DEVICE void write(const BackwardParams& p, int n, const Step& before, bool is_first) {
    const int stage = is_first || before.stage + 1 == S.stages ? 0 : before.stage + 1;
    const bool same_head = !is_first && before.tile + 1 != end;
    const int head = is_first ? first_head : before.head + (same_head ? 0 : 1);
    const Seen next = seek(p, head, same_head ? before.tile + 1 : first);
    Step step = !is_first && next.head == before.head ? carried_on(before) : first_of_head(p, next.head, stage);
    step.stage = stage;
    put(p, n, moved(p, step, next));
  }
  /// Whether this thread updates the walk: the first one, or the first warp, which looks up a mask.
  FOVEA_DEVICE static bool keeps() { return S.mask ? warp_id() == 0 : threadIdx.x == 0; }
  /// Whether this one writes its steps down.
  FOVEA_DEVICE static bool writes() { return threadIdx.x == 0; }

 private:
  struct Seen {
    int head, tile;
    TileState mask;
  };
  /// This tile of rows, or the next one that the mask does not hide.
  FOVEA_DEVICE Seen seek(const BackwardParams& p, int head, int tile) {
    TileState mask = TileState::kFull;
    while (S.mask && head < end_head && !find_seen(p, head, tile, mask)) ++head, tile = first;
    return {head, tile, mask};
  }
  /// A step moved to another tile of its head.
  FOVEA_DEVICE static Step moved(const BackwardParams& p, Step step, const Seen& to) {
    const int ahead = to.tile - step.tile;
    if constexpr (kPoints) {
      step.q += ahead * (S.block_m * p.q.row);
      step.dout += ahead * (S.block_m * p.dout.row);
    }
    step.slot += ahead;
    step.tile = to.tile;
    step.mask = to.mask;
    return step;
  }
  FOVEA_DEVICE void put(const BackwardParams& p, int n, Step step) {
    step.full_band = step.tile >= first_full && step.tile < end_full;
    if (S.deterministic && step.exists) step.turn = turn_at(p, step.head, step.tile);
    if constexpr (!kPoints) step.stage = key_block;
    if (writes()) {
      steps[n % kSteps] = step;
      if constexpr (S.ends_dq)
        dq_tiles[n % kSteps] = first_dq_tile + (step.head - first_head) * p.row_blocks + step.tile;
    }
  }
  /// A copy of a step, without pointers only of what is needed, to save registers.
  FOVEA_DEVICE static Step carried_on(const Step& step) {
    if constexpr (kPoints) return step;
    Step next{};
    next.slot = step.slot, next.head = step.head, next.tile = step.tile, next.exists = step.exists;
    if constexpr (S.dropout) next.stream = step.stream;
    return next;
  }
  FOVEA_DEVICE Step first_of_head(const BackwardParams& p, int head, int stage) const {
    Step step{kPoints ? sequence.q_row(p.q, first * S.block_m, head) : nullptr,
              kPoints ? sequence.q_row(p.dout, first * S.block_m, head) : nullptr,
              RowSlots(p, sequence, S.block_m).at(head, first),
              head,
              first,
              stage,
              0,
              TileState::kFull,
              head < end_head,
              false,
              {}};
    if constexpr (S.dropout)
      step.stream = math::dropout_stream(p.seed, p.offset, static_cast<u32>(sequence.batch * p.q_heads + head));
    return step;
  }

  FOVEA_DEVICE static Interval rows_of(int tile) { return {tile * S.block_m, (tile + 1) * S.block_m}; }
  FOVEA_DEVICE TileState mask_state(const BackwardParams& p, int head, int tile, int block) const {
    return mask_tile<S.block_n>(p, sequence, {head, head + 1}, rows_of(tile), block * S.block_n);
  }

  /// Moves `tile` on to the head's next that the mask does not hide; false where there is none.
  FOVEA_DEVICE bool find_seen(const BackwardParams& p, int head, int& tile, TileState& state) {
    while (tile < end) {
      if (head != window_head || tile - window >= kWarp) {
        const int mine = tile + lane_id();
        const TileState looked_up = mine < end ? mask_state(p, head, mine, key_block) : TileState::kHidden;
        const u32 now_some = __ballot_sync(kAllLanes, looked_up != TileState::kHidden);
        const u32 now_whole = __ballot_sync(kAllLanes, looked_up == TileState::kFull);
        __syncwarp();  // all have looked at the last window
        if (lane_id() == 0) window_head = head, window = tile, some = now_some, whole = now_whole;
        __syncwarp();
      }
      const u32 left = some >> (tile - window);
      tile = left == 0 ? window + kWarp : tile + __ffs(static_cast<int>(left)) - 1;
      if (left == 0) continue;
      state = (whole >> (tile - window) & 1) != 0 ? TileState::kFull : TileState::kPartial;
      return true;
    }
    return false;
  }

  /// dq is added up from the last key block that sees some of a tile's rows to the first.
  FOVEA_DEVICE int turn_at(const BackwardParams& p, int head, int tile) const {
    const int last = (sequence.band.keys_of_rows(rows_of(tile)).end - 1) / S.block_n;
    if constexpr (!S.mask) return last - key_block;
    int turn = 0;
    for (int block = key_block + 1; block <= last; block += kWarp) {
      const int mine = block + lane_id();
      const bool adds = mine <= last && mask_state(p, head, tile, mine) != TileState::kHidden;
      turn += __popc(__ballot_sync(kAllLanes, adds));
    }
    return turn;
  }
};

/// Where results must have the same bits in every run, dq is added up key block by key block.
struct Turn {
  /// Waits until all key blocks before this one have added, each of which kAdders thread blocks share; by a whole warp.
  template <int kAdders = 1>
  FOVEA_DEVICE static void await(const BackwardParams& p, const Step& step) {
    const int turn = step.turn;
    const int* ticket = p.tickets + step.slot;
    int now;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(ticket) : "memory");
    } while (uniform(now / kAdders != turn));
  }
  /// Lets the next key block add to a slot; by one thread, after a barrier that follows all additions.
  FOVEA_DEVICE static void pass(const BackwardParams& p, i64 slot) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(p.tickets + slot) : "memory");
  }
};

}  // namespace fovea::cuda
