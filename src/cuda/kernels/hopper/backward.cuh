#pragma once

#include "cuda/kernels/hopper/backward_consumer.cuh"
#include "cuda/kernels/hopper/backward_dq.cuh"
#include "cuda/kernels/hopper/backward_producer.cuh"
#include "cuda/kernels/hopper/backward_shared_keys.cuh"

// The backward on Hopper (FlashAttention-3, 2407.08608, section 3 and appendix B): a block owns 128 keys of a kv head.
// One warpgroup copies the rows of all heads that read them, two make the scores of 64 keys each, dk and dv, and one
// makes dq.  Blocks go on to the next keys where they can.  Where head dims are wide, two blocks own 64 keys each and
// share the work on dq.  Where rows are few, a block takes all keys that they read, 128 at a time, and dq stays in its
// shared memory.
namespace fovea::cuda {

/// Runs the role of this thread's warpgroup.
template <BackwardSpec S>
FOVEA_DEVICE void backward_role(const BackwardSm90Params& p, BackwardState<S>& state, const BackwardLayout<S>& at) {
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
  if (group == 0) {
    give_registers<producer_registers(S)>();
    if (p.by_engine) {
      BackwardProducer<S, true>{p, state, at}.run();
    } else {
      BackwardProducer<S, false>{p, state, at}.run();
    }
  } else if (group == 1) {
    give_registers<dq_registers(S)>();
    BackwardDq<S>{p, state, at}.run();
  } else {
    take_registers<consumer_registers(S)>();
    if constexpr (!shares_keys(S)) {
      BackwardConsumer<S>{{p, state, at, (group - 2) * kGroupRows}}.run();
    } else if (group == 2) {
      WeightsConsumer<S>{{p, state, at, 0}}.run();
    } else {
      GradientConsumer<S>{{p, state, at, 0}}.run();
    }
  }
}

/// Blocks, or pairs of them, are numbered as `BlockTask` says.
template <BackwardSpec S>
FOVEA_DEVICE void backward_sm90(const BackwardSm90Params& p) {
  extern __shared__ __align__(1024) char shared[];
  constexpr BackwardSm90Shared kShared = BackwardSm90Shared::of(S);
  constexpr bool kPairs = shares_keys(S);
  static_assert(sizeof(BackwardState<S>) <= kStateBytes);
  BackwardState<S>& state = *reinterpret_cast<BackwardState<S>*>(shared + kShared.state);
  if (threadIdx.x == 0) {
    await_kernel_ahead();
    const int number = kPairs || S.goes_on ? 0 : number_of_block<S>(p);
    state.k.begin(S.warps + 4), state.v.begin(S.warps);
    state.q.begin(S.warps, S.mask ? 2 : 1), state.dout.begin(kPairs ? 4 : S.warps);
    state.ds.begin(kPairs ? 8 : 4, kPairs ? 1 : S.warps * kArrivals);
    if constexpr (S.bias) state.bias.begin(kPairs ? 4 : S.warps, p.bias_by_engine ? 1 : 4 * kArrivals);
    if constexpr (S.deterministic) state.turns.begin(1, 4 * kArrivals);
    state.weights.begin(4, 4 * kArrivals), state.looked.begin(4, 4 * kArrivals);
    state.spoiled[0] = state.spoiled[1] = false;
    for (auto& of : state.strange) of[0] = of[1] = 0;
    if constexpr (kPairs) {
      state.other_k.begin(1);
      if (rank_in_pair() == 0) state.number = number_of_block<S, 2>(p);
    }
    fence_barriers();
    fence_engine();
    if constexpr (S.goes_on) {
      state.ask_for_task(p, 0);
      state.walk.take(p, state.task());
    } else if constexpr (!kPairs) {
      state.begin(p, number);
    }
  }
  if constexpr (kPairs) {
    meet_cluster();
    if (threadIdx.x == 0) state.begin(p, load_of_first(state.number));
  }
  __syncthreads();
  if (S.goes_on || state.has_keys) {
    backward_role<S>(p, state, {shared_address(shared)});
  } else if constexpr (S.ends_dq) {
    if (state.task().exists(p))
      BackwardEnd<S>{p}.run(state.task());  // with equal lengths, a block without keys has a part of dq
  }
  if constexpr (kPairs) meet_cluster();  // a block may only end when the other has sent all that it sends here
}

}  // namespace fovea::cuda
