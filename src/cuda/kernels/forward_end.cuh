#pragma once

#include "cuda/kernels/forward_block.cuh"

// The end of the forward's rows: slices of keys are joined, O is divided by the sums and written, or left for
// `combine`.
namespace fovea::cuda {

template <ForwardSpec S>
struct ForwardEnd : ForwardBlock<S> {
  using Base = ForwardBlock<S>;
  using Base::kM, Base::kD, Base::kEnd;
  using Base::p, Base::block, Base::sequence, Base::rows, Base::rules, Base::ring_of, Base::k_tile, Base::out_tile;
  using Base::slice, Base::warp_row, Base::warp_column, Base::entry_row, Base::each_row;
  using typename Base::Out, typename Base::OutTile, typename Base::Share;

  static constexpr bool kHidesValues = S.band || S.mask || S.bias;  // a row may not see what others of its tile see

  /// The softmax state of a thread's rows, 2 in each piece of 16: the reference that exponents are taken against, in
  /// units of log2 (kUnseen until a key was seen), and this lane's part of the sum.
  struct Running {
    float reference[kM][2], sum[kM][2];
    bool settled;  // every row of the warp has a reference, and keeps it
  };

  /// Below every finite score; −infinity minus this is still −infinity, not NaN.
  static constexpr float kUnseen = -3.40282347e38F;

  /// Combines references, sums and O of all slices; of O each slice gets a share of the columns.
  FOVEA_DEVICE void join_slices(Share& share, const Out& o, Running& running) const {
    constexpr int kFacts = 4 * S.head_dim_v;  // behind a row
    const auto left_by = [&](int slice, int r) { return ring_of(slice) + r * left_pitch(S); };
    const u32 lane_column = lane_id() % 4 * 2;
    each_row([&](int i, int h, int r) {
      const u32 mine = left_by(slice(), r);
#pragma unroll
      for (int c = 0; c < kD; ++c)
        store_shared_8(mine + 4 * (8 * c + lane_column), o[i][c].x[2 * h], o[i][c].x[2 * h + 1]);
      if (lane_column == 0) store_shared_8(mine + kFacts, running.reference[i][h], running.sum[i][h]);
    });
    clear(share);
    __syncthreads();
    each_row([&](int i, int h, int r) {
      float &top = running.reference[i][h], &sum = running.sum[i][h];
      top = kUnseen, sum = 0.0F;
#pragma unroll
      for (int s = 0; s < S.slices; ++s) top = fmaxf(top, __uint_as_float(load_shared(left_by(s, r) + kFacts)));
#pragma unroll
      for (int s = 0; s < S.slices; ++s) {
        const u32 row = left_by(s, r);
        const float2 facts = load_shared_8(row + kFacts);
        const float weight = exp2(facts.x - top);
        sum += weight * facts.y;
#pragma unroll
        for (int c = 0; c < kEnd; ++c) {
          const float2 x = load_shared_8(row + 4 * (8 * (slice() * kEnd + c) + lane_column));
          share[i][c].x[2 * h] += weight * x.x;
          share[i][c].x[2 * h + 1] += weight * x.y;
        }
      }
    });
    __syncthreads();  // rings may be written again
  }

  /// Divides by the sums and writes O and lse, or this split's part of them.
  FOVEA_DEVICE void finish(Share& o, Running& running) const {
    float factors[kM][2];
    bool empty = false;
    if constexpr (S.split) {
      each_row([&](int i, int h, int r) {
        if (r < rows.left()) store_part(o[i], h, r, running.reference[i][h], running.sum[i][h]);
        factors[i][h] = 1.0F;
      });
    } else {
      empty = end_rows(running, factors);
    }
    if (kHidesValues && block.careful)
      each_row([&](int i, int h, int r) { keep_row_facts(o[i], h, r, running.reference[i][h], factors[i][h]); });
    if constexpr (!S.split) {
      for_each_entry<kM, kEnd>([&](int i, int c, int e) { o[i][c].x[e] *= factors[i][e / 2]; });
      if (empty) {  // O of such a row is 0, whatever was added to it
        for_each_entry<kM, kEnd>([&](int i, int c, int e) {
          if (factors[i][e / 2] == 0.0F) o[i][c].x[e] = 0.0F;
        });
      }
      store_out(o);
    }
    __syncwarp();
    if (kHidesValues && block.careful) mend_rows();
  }

  /// Adds sinks and writes lse; `factors` is what rows of O are to be multiplied by, 0 for an empty one.  Each lane of
  /// a quad does this for one of the quad's rows.  Returns whether some row of the warp is empty.
  FOVEA_DEVICE bool end_rows(const Running& running, float (&factors)[kM][2]) const {
    const int lane = lane_id();
    bool empty = false;
#pragma unroll
    for (int first = 0; first < 2 * kM; first += 4) {
      float reference = running.reference[first / 2][0], sum = running.sum[first / 2][0];
#pragma unroll
      for (int x = first + 1; x < math::smaller(first + 4, 2 * kM); ++x) {
        const int i = x / 2, h = x % 2;  // fresh: else the choice is one of addresses in local memory
        reference = lane % 4 == x - first ? fresh(running.reference[i][h]) : reference;
        sum = lane % 4 == x - first ? fresh(running.sum[i][h]) : sum;
      }
      const int x = first + lane % 4, r = warp_row() + entry_row(x / 2, x % 2 * 2);
      float factor = 0.0F;
      if (x < 2 * kM && r < rows.left()) {
        const RowEnd end = end_of_row<S>(p, rows.head(r), reference, sum);
        empty |= end.empty;
        factor = end.empty ? 0.0F : end.factor;
        if (p.lse.data != nullptr && first_column() == 0)
          *sequence.statistic(p.lse, rows.query(r), rows.head(r)) = end.lse;
      }
#pragma unroll
      for (int y = first; y < math::smaller(first + 4, 2 * kM); ++y)
        factors[y / 2][y % 2] = __shfl_sync(kAllLanes, factor, lane / 4 * 4 + y - first);
    }
    return __any_sync(kAllLanes, empty);
  }

  // ---- rows that are not finite (a hidden entry has weight 0, but 0 · NaN is NaN) are recomputed from visible keys
  // alone

  /// {reference, factor, not finite} of a row, as a warp sees it.
  FOVEA_DEVICE u32 facts_at(int r) const {
    return k_tile(0).base + static_cast<u32>(r * S.across + warp_id() % S.across) * 16;
  }

  FOVEA_DEVICE void keep_row_facts(const Accumulator (&o)[kEnd], int h, int r, float reference, float factor) const {
    float check = 0.0F;
#pragma unroll
    for (int c = 0; c < kEnd; ++c) check += o[c].x[2 * h] * 0.0F + o[c].x[2 * h + 1] * 0.0F;
    const bool finite = quad_sum(check) == 0.0F;
    if (lane_id() % 4 == 0)
      store_shared_16(facts_at(r), {__float_as_uint(reference), __float_as_uint(factor), finite ? 0U : 1U, 0U});
  }

  FOVEA_DEVICE void mend_rows() const {
#pragma unroll 1
    for (int r = warp_row(); r < math::smaller(warp_row() + 16 * kM, rows.left()); ++r) {
      const uint4 facts = load_shared_16(facts_at(r));
      if (facts.z != 0) mend_row(r, __uint_as_float(facts.x), __uint_as_float(facts.y));
    }
  }

  FOVEA_DEVICE void mend_row(int r, float reference, float factor) const {
    const int head = rows.head(r), query = rows.query(r), begin = first_column();
    cuda::mend_row<S, 8 * kEnd>(rules, block.keys, block.kv_head, r, reference, factor, begin,
                                math::smaller(begin + 8 * kEnd, p.head_dim_v), [&](int column, float x) {
                                  if constexpr (S.split) {
                                    part_of(query, head)[column - block.v_begin] = x;
                                  } else {
                                    write<S.type>(sequence.q_row(p.out, query, head) + column * kBytes<S.type>, x);
                                  }
                                });
  }
  FOVEA_DEVICE static int end_column() { return warp_column() + slice() * kEnd * 8; }  // of O, of this warp's share
  FOVEA_DEVICE int first_column() const { return block.v_begin + end_column(); }       // of v
  FOVEA_DEVICE float* part_of(int query, int head) const {
    const i64 row = (i64{sequence.batch} * p.q_heads + head) * p.seqlen_q + query;
    const int chunk = block.v_begin / S.head_dim_v;
    return p.partials + ((row * p.v_chunks + chunk) * p.splits + block.split) * (S.head_dim_v + kPartFacts);
  }
  FOVEA_DEVICE void store_part(const Accumulator (&o)[kEnd], int h, int r, float reference, float sum) const {
    float* part = part_of(rows.query(r), rows.head(r));
#pragma unroll
    for (int c = 0; c < kEnd; ++c) {
      const int column = end_column() + 8 * c + lane_id() % 4 * 2;
      *reinterpret_cast<float2*>(part + column) = {o[c].x[2 * h], o[c].x[2 * h + 1]};
    }
    if (end_column() == 0 && lane_id() % 4 == 0) *reinterpret_cast<float2*>(part + S.head_dim_v) = {reference, sum};
  }

  /// Through shared memory, so that rows are written in whole pieces of 16 bytes.
  FOVEA_DEVICE void store_out(const Share& o) const {
    const OutTile tile = out_tile();
    store_accumulators(corner_c<kEnd>(tile, lane_id(), warp_row(), 0), o, end_column());
    __syncwarp();  // a warp stores what it has put there
    constexpr int kPieces = OutTile::kPieces / S.across / S.slices, kLanes = kPieces >= 8 ? 8 : kPieces >= 4 ? 4 : 2;
    const int bytes = math::smaller(p.head_dim_v - first_column(), 8 * kEnd) * kBytes<S.type>;
    const int lane = lane_id() % kLanes, begin = warp_row() + lane_id() / kLanes;
    const auto row_at = [&](int r) {
      return sequence.q_row(p.out, rows.query(r), rows.head(r)) + first_column() * kBytes<S.type> + lane * 16;
    };
    char* to = row_at(begin);
#pragma unroll 4
    for (int r = begin; r < math::smaller(warp_row() + 16 * kM, rows.left()); r += kWarp / kLanes) {
      if (S.pack_gqa && r > begin) to = row_at(r);
#pragma unroll
      for (int at = 0; at < kPieces; at += kLanes) {
        if (bytes > (at + lane) * 16) {
          write_piece(to + at * 16, load_shared_16(tile.at(r, end_column()) + (at + lane) * 16),
                      bytes - (at + lane) * 16, p.out.aligned);
        }
      }
      if (!S.pack_gqa) to += kWarp / kLanes * p.out.row;
    }
  }
};

}  // namespace fovea::cuda
