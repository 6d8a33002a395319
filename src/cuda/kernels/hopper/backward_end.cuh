#pragma once

#include "cuda/kernels/backward_queries.cuh"
#include "cuda/kernels/hopper/backward_state.cuh"

// With `ends_dq`, dq_sum has places only for the kv heads at work.  When all key blocks of a head have added to its
// place, other blocks of the same launch turn the sums into dq and clear them for the head that takes the place next,
// so that no kernel clears or reads sums of all rows.  A block only waits for blocks of lower numbers, which have
// started.
namespace fovea::cuda {

template <BackwardSpec S>
struct BackwardEnd {
  const BackwardSm90Params& p;

  static constexpr int kBlocks = blocks_of_cluster(S);
  static constexpr u32 kMemoryIsFree = 5;  // of a block that goes on the barrier behind which its memory is

  /// Waits, by a whole warp, until so many of a turn's blocks are counted: its key blocks, then those that end its dq.
  FOVEA_DEVICE void await(int turn, int blocks) const {
    int now;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(p.added + turn) : "memory");
    } while (uniform(now < blocks * kBlocks));
  }
  /// Counts this block; by one thread, after a barrier that follows all its additions.
  FOVEA_DEVICE void count(int turn) const {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(p.added + turn) : "memory");
  }

  /// Waits, by a whole warp, until the turn's place has been cleared and may be added to.
  FOVEA_DEVICE void await_place(int turn) const {
    if (uniform(turn < p.dq_places)) return;
    await(turn - p.dq_places, p.key_blocks + p.dq_parts);
    asm volatile("fence.proxy.async.global;" ::: "memory");  // the copy engine adds to it, too
  }

  /// Turns a part of a turn's sums into dq, by a whole block or its last kThreads.  Each warp takes every kWarps-th run
  /// of pieces; the copy engine loads kAtOnce of them at a time and writes zeros in their place.
  FOVEA_DEVICE void run(const BlockTask& task) const {
    extern __shared__ __align__(1024) char shared[];
    char* const memory = shared + ending_begin(S);
    const u32 thread = threadIdx.x - (kBackwardThreads - kThreads);
    const int warp = static_cast<int>(uniform(thread / kWarp)), lane = fresh(lane_id());
    const Sequence sequence = Sequence::of(p, task.batch);
    const int parts = p.dq_parts * kBlocks, part = task.part * kBlocks + rank_of_block<S>();
    const int all = p.row_blocks * p.group;  // as lengths do not differ
    const int each = (all + parts - 1) / parts, first = math::smaller(part * each, all),
              runs = math::smaller(each, all - first) * kRuns;
    const bool leads = lane == 0, taken_again = task.turn + p.dq_places < p.batch * p.kv_heads;
    Barrier* const arrived = reinterpret_cast<Barrier*>(memory + kDqRunBytes) + warp * kAtOnce;
    const u32 zeros = shared_address(memory), places = zeros + kDqRunsBegin + warp * kAtOnce * kDqRunBytes;
    const auto sums = [&](int x) {
      return p.dq_sum + i64{DqPlaces{p}.first_tile(task.turn) + first + x / kRuns} * (kTileBytes / 4) +
             x % kRuns * (kDqRunBytes / 4);
    };
    const auto bytes = [](int x) { return math::smaller(kDqRunBytes, kTileBytes - x % kRuns * kDqRunBytes); };
    const auto load = [&](int x, int n) {
      arrived[n % kAtOnce].arrive_with(bytes(x));
      load_bytes(places + n % kAtOnce * kDqRunBytes, sums(x), bytes(x), arrived[n % kAtOnce]);
    };
    if (leads) {
      for (int n = 0; n < kAtOnce; ++n) arrived[n].begin(1);
      fence_barriers();
    }
    for (u32 x = thread; x < kDqRunBytes / 16; x += kThreads) store_shared_16(zeros + x * 16, {});
    fence_engine();
    if (warp == 0) await(task.turn, p.key_blocks);
    share();
    if (leads) {
      asm volatile("fence.proxy.async.global;" ::: "memory");
      for (int n = 0; n < kAtOnce; ++n) {
        const int x = warp + n * kWarps;
        if (x < runs) load(x, n);
      }
    }
    int n = 0;
#pragma unroll 1
    for (int x = warp; x < runs; x += kWarps, ++n) {
      arrived[n % kAtOnce].wait(n / kAtOnce & 1);
      if (leads && taken_again) store_bytes(sums(x), zeros, bytes(x), Keep::kYes);
      const int at = first + x / kRuns;
      end_run(sequence, lane, task.kv_head * p.group + at / p.row_blocks, at % p.row_blocks, x % kRuns * kDqRun,
              places + n % kAtOnce * kDqRunBytes);
      __syncwarp();
      if (leads && x + kAtOnce * kWarps < runs) load(x + kAtOnce * kWarps, n + kAtOnce);
    }
    if (leads) {
      close_additions();
      await_additions<0>();
      for (int n = 0; n < kAtOnce && S.goes_on; ++n) arrived[n].end();
      if constexpr (S.goes_on) fence_engine();
    }
    share();
    if (thread == 0) count(task.turn);
  }

 private:
  using Pieces = typename Backward<S>::Dq;
  static constexpr int kThreads = ending_threads(S), kWarps = kThreads / kWarp;
  static constexpr int kTileBytes = S.block_m * S.head_dim * 4, kPieces = kTileBytes / 512;  // of a tile
  static constexpr int kRuns = (kPieces + kDqRun - 1) / kDqRun, kAtOnce = dq_runs_at_once(S);
  static_assert(kAtOnce > 0 && kWarps * kAtOnce * static_cast<int>(sizeof(Barrier)) <= kDqRunsBegin - kDqRunBytes);

  FOVEA_DEVICE static void share() {
    constexpr u32 kMeeting = 6;
    if constexpr (S.goes_on) {
      meet(kMeeting, kThreads);
    } else {
      __syncthreads();
    }
  }

  /// Four pieces at a time, of which each lane has four numbers; lanes exchange words so that each has 16 bytes of a
  /// row.
  FOVEA_DEVICE void end_run(const Sequence& sequence, int lane, int head, int tile, int first, u32 sums) const {
#pragma unroll
    for (int of = 0; of < kDqRun; of += 4) {
      u32 w[2][4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint4 four = load_shared_16(sums + (of + c) * 512 + lane * 16);
        w[0][c] = pack<S.type>(__uint_as_float(four.x) * p.scale, __uint_as_float(four.y) * p.scale);
        w[1][c] = pack<S.type>(__uint_as_float(four.z) * p.scale, __uint_as_float(four.w) * p.scale);
      }
      const int mine = first + of + lane % 4, column = Pieces::column_of(mine) * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        transpose_quad(w[h]);
        const int row = tile * S.block_m + Pieces::row_of(mine) * 16 + lane / 4 + 8 * h;
        if (mine < kPieces && row < sequence.q_rows && column < p.head_dim)
          write_piece(sequence.q_row(p.dq, row, head) + column * kBytes<S.type>, {w[h][0], w[h][1], w[h][2], w[h][3]},
                      (p.head_dim - column) * kBytes<S.type>, p.dq.aligned);
      }
    }
  }
};

}  // namespace fovea::cuda
