#pragma once

#include "cuda/kernels/device.cuh"

// Barriers in shared memory (mbarrier), which count arrivals and bytes, and the block's hardware barriers.
namespace fovea::cuda {

/// Which of a cluster of two this block is.
FOVEA_DEVICE int rank_in_pair() { return static_cast<int>(blockIdx.x % 2); }
/// The address of the same place in the shared memory of another block of the cluster.
FOVEA_DEVICE u32 address_in(int rank, u32 address) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
FOVEA_DEVICE u32 address_in_other(u32 address) { return address_in(1 - rank_in_pair(), address); }
/// The value of `x` in the shared memory of the cluster's first block.
FOVEA_DEVICE int load_of_first(const int& x) {
  int there;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(there) : "r"(address_in(0, shared_address(&x))) : "memory");
  return there;
}
/// A barrier of all threads of the cluster.
FOVEA_DEVICE void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

/// An mbarrier.  A phase is over when all arrivals have come and all announced bytes have been written.
struct Barrier {
  u64 word;

  FOVEA_DEVICE u32 address() const { return shared_address(&word); }
  FOVEA_DEVICE void begin(u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  FOVEA_DEVICE void end() { asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(address()) : "memory"); }
  FOVEA_DEVICE void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }
  FOVEA_DEVICE void arrive_with(u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  FOVEA_DEVICE void expect(u32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  /// At the other block's barrier, by a thread that has only read: after a write `release.cluster` would be needed,
  /// which is a fence of the whole GPU.
  FOVEA_DEVICE void arrive_in_other() {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_other(address())) : "memory");
  }
  /// Arrives when all cp.async copies of this thread so far are done.
  FOVEA_DEVICE void arrive_behind_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address()) : "memory");
  }
  /// Waits until the phase of this parity is over.
  FOVEA_DEVICE void wait(u32 parity) const {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
};

/// Arrivals of a warp.  By the PTX memory model one lane may arrive for all after __syncwarp; compute-sanitizer's
/// racecheck takes a lane's reads for ordered by its own arrivals only (docs/contract.md, FOVEA_RACECHECK).
#ifdef FOVEA_RACECHECK
inline constexpr u32 kArrivals = kWarp;
#else
inline constexpr u32 kArrivals = 1;
#endif

/// A ring of places that producers fill and consumers empty: use n of it is in place n % kPlaces.
template <int kPlaces>
struct Ring {
  Barrier full[kPlaces], empty[kPlaces];

  FOVEA_DEVICE void begin(u32 consumers, u32 producers = 1) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) full[i].begin(producers), empty[i].begin(consumers * kArrivals);
  }
  FOVEA_DEVICE static int place(u32 n) { return static_cast<int>(n % kPlaces); }
  FOVEA_DEVICE void await_full(u32 n) const { full[place(n)].wait(n / kPlaces & 1); }
  FOVEA_DEVICE void await_empty(u32 n) const { empty[place(n)].wait(n / kPlaces & 1 ^ 1); }
  /// By each producing warp, when all of its lanes have written.
  FOVEA_DEVICE void announce(u32 n) {
    __syncwarp();
    if (static_cast<u32>(lane_id()) < kArrivals) full[place(n)].arrive();
  }
  /// By each consuming warp, when all of its lanes have read; kInPair: the other block's place as well.
  template <bool kInPair = false>
  FOVEA_DEVICE void release(u32 n) {
    __syncwarp();
    if (static_cast<u32>(lane_id()) < kArrivals) {
      empty[place(n)].arrive();
      if constexpr (kInPair) empty[place(n)].arrive_in_other();
    }
  }
};

/// Makes initialised barriers, and what threads have written to shared memory, visible to the copy engine.
FOVEA_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FOVEA_DEVICE void fence_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FOVEA_DEVICE void meet(u32 id, u32 threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
/// The same; returns whether some thread says yes.
FOVEA_DEVICE bool meet_any(u32 id, u32 threads, bool yes) {
  u32 any;
  asm volatile(
      "{ .reg .pred mine, all;\nsetp.ne.u32 mine, %3, 0;\nbarrier.red.or.pred all, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, all; }"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<u32>(yes))
      : "memory");
  return any != 0;
}
FOVEA_DEVICE void pass(u32 id, u32 threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
FOVEA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FOVEA_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fovea::cuda
