#pragma once

#include "cuda/kernels/hopper/consumer.cuh"
#include "cuda/kernels/hopper/fetcher.cuh"
#include "cuda/kernels/hopper/producer.cuh"

// The forward on Hopper (FlashAttention-3, 2407.08608): one warpgroup copies Q, K and V into rings, the others compute.
namespace fovea::cuda {

/// Staggers the starts of blocks by `clocks`, so that not all of them wait for memory at once.
FOVEA_DEVICE void begin_apart(u32 clocks) {
  const auto now = [] {
    u32 x;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(x)::"memory");
    return x;
  };
  for (const u32 start = now(); now() - start < blockIdx.x * clocks;) {
  }
}

/// Blocks: one a multiprocessor.
template <ForwardSm90Spec S>
__device__ void forward_sm90(const ForwardSm90Params& p) {
  extern __shared__ __align__(1024) char shared[];
  static_assert(sizeof(State<S>) <= kStateBytes);
  State<S>& state = *reinterpret_cast<State<S>*>(shared + shared_bytes(S) - kStateBytes);
  if (threadIdx.x == 0) {
    constexpr u32 kWarps = S.warpgroups * 4, kFetchers = State<S>::kFetchers;
    for (auto& ring : state.q) ring.begin((kWarps + kFetchers) / q_parts(S));
    state.k.begin(kWarps + (S.mask ? kFetchers : 0)), state.v.begin(kWarps);
    for (auto& ring : state.entries) ring.begin(4, kWarp);
    state.known.begin(1), state.late.begin(1);
    state.packed = {};
    fence_barriers();
    fence_engine();
    await_kernel_ahead();
  }
  __syncthreads();
  const int group = static_cast<int>(uniform(threadIdx.x / 128));
  if (group == 0) {
    give_registers<producer_registers(S)>();
    begin_apart(p.clocks_apart);
    if (threadIdx.x >= State<S>::kHands) {
      if constexpr (State<S>::kFetchers != 0) {
        const int of = warp_id() - State<S>::kHands / kWarp;
        if (of < S.warpgroups) Fetcher<S>{p, state, {shared_address(shared)}, of}.run();
      }
    } else if (p.by_engine) {
      Producer<S, true>{p, state, {shared_address(shared)}}.run();
    } else {
      Producer<S, false>{p, state, {shared_address(shared)}}.run();
    }
  } else {
    take_registers<consumer_registers(S)>();
    Consumer<S>{p, state, {shared_address(shared)}, group - 1}.run();
  }
}

}  // namespace fovea::cuda
