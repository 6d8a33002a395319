#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fovea::tests {

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, gridDim;  // NOLINT(readability-identifier-naming): CUDA's names

/// A GPU of one multiprocessor that runs one block at a time, its threads as coroutines of one thread.  Of the warps,
/// one goes on until it waits for the others, then the next; which comes first is drawn by lot at every barrier.  So
/// what a missing barrier leaves open does happen.
class Emulator {
 public:
  explicit Emulator(std::uint32_t seed) : lots_(seed) { current = this; }
  static Emulator& here() { return *current; }

  /// Runs `kernel` in blocks × threads, with so much shared memory, at `shared`.
  void launch(std::int64_t blocks, int threads, std::byte* shared, std::size_t shared_bytes,
              const std::function<void()>& kernel) {
    kernel_ = &kernel;
    shared_ = shared;
    shared_bytes_ = shared_bytes;
    gridDim.x = static_cast<unsigned>(blocks);
    for (std::int64_t block = 0; block < blocks; ++block) {
      blockIdx.x = static_cast<unsigned>(block);
      std::fill_n(shared, shared_bytes, std::byte{0xff});  // NaN
      run_block(threads);
    }
  }

  void meet_block() { wait(block_, static_cast<int>(threads_.size())); }
  void meet_warp() { wait(warps_[me_ / kWarp], kWarp); }

  /// What lane `from` of this thread's warp gives, for what this one gives.
  std::uint32_t exchange(std::uint32_t mine, int from) {
    Thread& me = threads_[me_];
    auto& slots = slots_[me_ / kWarp][me.turn ^= 1];
    slots[me_ % kWarp] = mine;
    meet_warp();
    return slots[static_cast<std::size_t>(from)];
  }

  [[nodiscard]] std::uint32_t address_of(const void* p) const {
    return static_cast<std::uint32_t>(static_cast<const std::byte*>(p) - shared_);
  }
  [[nodiscard]] void* shared(std::uint32_t address, std::size_t bytes) const {
    if (address % bytes != 0 || address + bytes > shared_bytes_)
      throw std::out_of_range("shared memory at " + std::to_string(address) + " of " + std::to_string(shared_bytes_));
    return shared_ + address;
  }

 private:
  static constexpr std::size_t kWarp = 32, kStack = std::size_t{256} << 10;

  struct Barrier {
    int arrived = 0;
    std::uint64_t times = 0;
  };
  struct Thread {
    ucontext_t context{};
    std::unique_ptr<std::byte[]> stack;
    const Barrier* waits = nullptr;
    std::uint64_t until = 0;
    bool done = false;
    int turn = 0;
    [[nodiscard]] bool ready() const { return !done && (waits == nullptr || waits->times >= until); }
  };

  static void enter() {
    Emulator& emulator = here();
    try {
      (*emulator.kernel_)();
    } catch (...) {
      emulator.fault_ = std::current_exception();
    }
    emulator.threads_[emulator.me_].done = true;
    emulator.yield();
  }

  void yield() { swapcontext(&threads_[me_].context, &scheduler_); }

  void wait(Barrier& barrier, int threads) {
    Thread& me = threads_[me_];
    me.until = barrier.times + 1;
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.times;
      if (lots_() % 2 == 0) return;
    }
    me.waits = &barrier;
    yield();
  }

  /// Every thread of a warp that can goes on, up to where it waits; false: none could.
  bool run_warp(std::size_t warp) {
    bool any = false;
    const std::size_t first = lots_() % kWarp;
    for (std::size_t lane = 0; lane < kWarp; ++lane) {
      me_ = warp * kWarp + (first + lane) % kWarp;
      if (!threads_[me_].ready()) continue;
      any = true;
      threadIdx.x = static_cast<unsigned>(me_);
      swapcontext(&scheduler_, &threads_[me_].context);
      if (fault_ != nullptr) std::rethrow_exception(std::exchange(fault_, nullptr));
    }
    return any;
  }

  void run_block(int threads) {
    if (threads_.size() != static_cast<std::size_t>(threads))
      threads_ = std::vector<Thread>(static_cast<std::size_t>(threads));
    warps_.assign(threads_.size() / kWarp, {});
    slots_.resize(warps_.size());
    block_ = {};
    for (Thread& thread : threads_) {
      if (thread.stack == nullptr) thread.stack = std::make_unique<std::byte[]>(kStack);
      thread.waits = nullptr;
      thread.done = false;
      thread.turn = 0;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, &Emulator::enter, 0);
    }
    std::vector<std::size_t> order(warps_.size());  // the first that can goes on
    std::iota(order.begin(), order.end(), 0);
    const auto goes_on = [&](std::size_t warp) { return run_warp(warp); };
    for (std::uint64_t times = 0; std::ranges::any_of(order, goes_on);) {
      if (times != block_.times) std::ranges::shuffle(order, lots_);
      times = block_.times;
    }
    if (std::ranges::any_of(threads_, [](const Thread& thread) { return !thread.done; }))
      throw std::runtime_error("threads wait for others that have ended");
  }

  inline static Emulator* current = nullptr;

  std::mt19937 lots_;
  const std::function<void()>* kernel_ = nullptr;
  std::byte* shared_ = nullptr;
  std::size_t shared_bytes_ = 0, me_ = 0;
  ucontext_t scheduler_{};
  std::vector<Thread> threads_;
  std::vector<Barrier> warps_;
  std::vector<std::array<std::array<std::uint32_t, kWarp>, 2>> slots_;
  Barrier block_;
  std::exception_ptr fault_;
};

}  // namespace fovea::tests
