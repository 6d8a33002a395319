#pragma once

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>

#include "tests/emulator/ptx.h"

// A GPU that runs one instruction of one warp after the other.  What the hardware leaves open is drawn by lot: the
// order of warps, and when a copy in the background is done.
namespace fovea::emulator {

struct Block;

/// A kernel does what a GPU would answer by an error, or not at all.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Global memory: what has been allocated.
class Memory {
 public:
  void* allocate(std::size_t bytes);
  bool free(void* begin);
  /// Throws unless the bytes belong to one allocation and are aligned.
  void check(u64 address, std::size_t bytes) const;

 private:
  std::map<u64, std::size_t> sizes_;
  mutable u64 begin_ = 1, end_ = 0;  // of the allocation that was last found
};

/// Threads at one place of the code.
struct Group {
  u32 at;
  u32 lanes;
  bool waits = false;  ///< for other lanes of its warp
};

/// Copies of one thread by cp.async.
struct Copies {
  struct One {
    void* to;
    u64 from;
    int bytes;
    bool clears;
  };
  std::vector<One> open;
  std::deque<std::vector<One>> closed;
};

struct Warp {
  Block& block;
  const Program& program;
  int index;
  Group now;                  ///< the threads that run
  std::vector<Group> others;  ///< of the same warp
  u32 alive;
  bool waits = false;     ///< at a barrier
  bool pauses = false;    ///< has looked at what others must change
  u32 cluster_phase = 0;  ///< when it arrived
  std::unique_ptr<std::byte[]> memory;
  std::byte* file;
  std::vector<u32> predicates;
  std::array<Copies, kLanes> copies;

  Warp(Block& block, const Program& program, int index, u32 threads);

  /// Runs until it waits, pauses, ends or has run `most` instructions; false where it could not do anything.
  bool run(int most);
  [[nodiscard]] bool done() const { return alive == 0; }

  /// The first lane's number of an operand; that of lane l is l further.
  template <class T>
  [[nodiscard]] const T* in(const Operand& o) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    if (o.kind == Operand::Kind::kRegister) return reinterpret_cast<const T*>(file + o.at);
    if (o.kind == Operand::Kind::kSpecial) return reinterpret_cast<const T*>(special(o, sizeof(T)));
    const Constant& constant = program.constants[o.at];
    if constexpr (sizeof(T) == 4) return reinterpret_cast<const T*>(constant.words.data());
    return reinterpret_cast<const T*>(constant.longs.data());
  }
  template <class T>
  [[nodiscard]] T* out(const Operand& o) {
    if (o.kind == Operand::Kind::kSink) return reinterpret_cast<T*>(sink_.data());
    return reinterpret_cast<T*>(file + o.at);
  }
  /// Lanes in which a predicate holds.
  [[nodiscard]] u32 holds(const Operand& o) const;
  void set(const Operand& predicate, u32 which, u32 lanes);

  /// What a lane's operand is, or becomes, whatever its width.
  u64 number(const Operand& o, int lane) {
    return o.kind == Operand::Kind::kRegister && o.width <= 32 ? in<u32>(o)[lane] : in<u64>(o)[lane];
  }
  void put(const Operand& o, int lane, u64 bits) {
    if (o.kind == Operand::Kind::kSink) return;
    if (o.width == 64) {
      out<u64>(o)[lane] = bits;
    } else {
      out<u32>(o)[lane] = static_cast<u32>(bits);
    }
  }

  /// Of the lanes that an instruction names all that live are here.  Else false: it is put off.
  bool together(u32 lanes, u32 members);
  /// The instruction is tried again later.
  void put_off() { put_off_ = true; }

 private:
  const void* special(const Operand& o, std::size_t bytes);
  void choose();
  std::array<u64, kLanes> sink_{};
  std::array<Constant, 2> specials_{};  // an instruction may have two
  std::size_t special_turn_ = 0;
  bool put_off_ = false;
};

/// A barrier of a block's threads.
struct NamedBarrier {
  u32 arrived = 0, wanted = 0;  ///< threads; 0: all that live
  bool any = false;
  struct Waiting {
    Warp* warp;
    const Operand* result;  ///< of a reduction
  };
  std::vector<Waiting> waiting;
};

struct Dimensions {
  u32 x = 1, y = 1, z = 1;
};

/// What a launch has for all blocks.
struct Launch {
  const Program& program;
  Memory& memory;
  Dimensions grid, block;
  u32 shared_bytes;
  std::vector<std::byte> params;
  std::mt19937 lots;
  u32 clock = 0;
  Launch(const Program& program, Memory& memory) : program(program), memory(memory) {}
  bool lot() { return (lots() & 1U) != 0; }
};

struct Block {
  Launch& launch;
  Dimensions at;
  u32 rank;  ///< in its cluster
  std::unique_ptr<std::byte[]> memory;
  std::byte* shared;  ///< address 0
  u32 shared_end;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  std::vector<std::function<void()>> engine;  ///< copies in the background, in their order
  std::vector<Block*> cluster;
  u32 cluster_arrived = 0, cluster_phase = 0;  ///< of the first block: warps, and how often all have come

  Block(Launch& launch, u32 number, u32 rank);
  /// False where no warp could do anything.
  bool run();
  [[nodiscard]] bool done() const;
  void* shared_at(u64 address, int bytes);
  /// In the background: now or later.
  void later(std::function<void()> copy);
  void drain();
  /// Lets those at a barrier go on where all have come.
  void open(NamedBarrier& barrier);
};

/// Runs all blocks of a grid; at most so many at once.
void run_grid(Launch& launch, u32 at_once);

}  // namespace fovea::emulator
