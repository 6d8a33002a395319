#include "tests/emulator/warp.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace fovea::emulator {
namespace {

constexpr std::size_t kAlignment = 256, kGuard = 4096;
constexpr int kSlice = 2000;  // instructions of a warp at a time

/// Special registers; a kernel's parameters are one, too.
struct Special {
  const char* name;
  u64 (*value)(Warp& w, u32 thread);
};
constexpr std::array kSpecials{
    Special{"param", [](Warp& w, u32) { return reinterpret_cast<u64>(w.block.launch.params.data()); }},
    Special{"%tid.x", [](Warp& w, u32 thread) { return u64{thread % w.block.launch.block.x}; }},
    Special{"%tid.y", [](Warp& w, u32 thread) { return u64{thread / w.block.launch.block.x}; }},
    Special{"%ntid.x", [](Warp& w, u32) { return u64{w.block.launch.block.x}; }},
    Special{"%ntid.y", [](Warp& w, u32) { return u64{w.block.launch.block.y}; }},
    Special{"%ctaid.x", [](Warp& w, u32) { return u64{w.block.at.x}; }},
    Special{"%ctaid.y", [](Warp& w, u32) { return u64{w.block.at.y}; }},
    Special{"%ctaid.z", [](Warp& w, u32) { return u64{w.block.at.z}; }},
    Special{"%nctaid.x", [](Warp& w, u32) { return u64{w.block.launch.grid.x}; }},
    Special{"%nctaid.y", [](Warp& w, u32) { return u64{w.block.launch.grid.y}; }},
    Special{"%nctaid.z", [](Warp& w, u32) { return u64{w.block.launch.grid.z}; }},
    Special{"%laneid", [](Warp&, u32 thread) { return u64{thread % kLanes}; }},
    Special{"%clock", [](Warp& w, u32) { return u64{w.block.launch.clock += 7}; }},
    Special{"%cluster_ctarank", [](Warp& w, u32) { return u64{w.block.rank}; }},
};

std::string hex(u64 x) {
  std::array<char, 24> text{};
  std::snprintf(text.data(), text.size(), "0x%llx", static_cast<unsigned long long>(x));
  return text.data();
}

}  // namespace

int special_register(std::string_view name) {
  const auto found = std::ranges::find(kSpecials, name, &Special::name);
  return found == kSpecials.end() ? -1 : static_cast<int>(found - kSpecials.begin());
}

void* Memory::allocate(std::size_t bytes) {
  auto* memory = static_cast<std::byte*>(
      std::aligned_alloc(kAlignment, (bytes + 2 * kGuard + kAlignment - 1) / kAlignment * kAlignment));
  std::memset(memory, 0xff, bytes + 2 * kGuard);
  sizes_[reinterpret_cast<u64>(memory + kGuard)] = bytes;
  return memory + kGuard;
}
bool Memory::free(void* begin) {
  if (begin == nullptr) return true;
  const auto found = sizes_.find(reinterpret_cast<u64>(begin));
  if (found == sizes_.end()) return false;
  sizes_.erase(found);
  begin_ = 1, end_ = 0;
  std::free(static_cast<std::byte*>(begin) - kGuard);
  return true;
}
void Memory::check(u64 address, std::size_t bytes) const {
  if (address % bytes != 0 && std::has_single_bit(bytes))
    throw Fault("address " + hex(address) + " is no multiple of " + std::to_string(bytes));
  if (address >= begin_ && address + bytes <= end_) return;
  auto found = sizes_.upper_bound(address);
  if (found != sizes_.begin()) {
    --found;
    if (address + bytes <= found->first + found->second) {
      begin_ = found->first, end_ = found->first + found->second;
      return;
    }
    throw Fault("address " + hex(address) + ": " + std::to_string(bytes) + " bytes at " +
                std::to_string(address - found->first) + " of an allocation of " + std::to_string(found->second));
  }
  throw Fault("address " + hex(address) + " is in no allocation");
}

// ---- warps

Warp::Warp(Block& block, const Program& program, int index, u32 threads)
    : block(block),
      program(program),
      index(index),
      now{0, threads},
      alive(threads),
      memory(std::make_unique<std::byte[]>(program.file_bytes + 64)),
      predicates(program.predicates) {
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.get());
  file = memory.get() + (64 - begin % 64) % 64;
  std::memset(file, 0xff, program.file_bytes);
}

u32 Warp::holds(const Operand& o) const {
  u32 bits = 0;
  if (o.kind == Operand::Kind::kRegister) bits = predicates[o.at];
  if (o.kind == Operand::Kind::kConstant) bits = program.constants[o.at].words[0] != 0 ? kAllLanes : 0;
  return o.inverted ? ~bits : bits;
}
void Warp::set(const Operand& predicate, u32 which, u32 lanes) {
  if (predicate.kind == Operand::Kind::kSink) return;
  u32& bits = predicates[predicate.at];
  bits = (bits & ~lanes) | (which & lanes);
}

const void* Warp::special(const Operand& o, std::size_t bytes) {
  special_turn_ ^= 1U;
  auto& [words, longs] = specials_.at(special_turn_);
  for (std::size_t l = 0; l < kLanes; ++l) {
    const u64 number = kSpecials.at(o.at).value(*this, static_cast<u32>(index) * kLanes + static_cast<u32>(l));
    longs.at(l) = number + static_cast<u64>(o.offset);
    words.at(l) = static_cast<u32>(longs.at(l));
  }
  return bytes == 8 ? static_cast<const void*>(longs.data()) : words.data();
}

bool Warp::together(u32 lanes, u32 members) {
  if ((members & alive & ~lanes) == 0) return true;
  put_off_ = true;
  return false;
}

/// The threads that are furthest behind run; those that have come to the same place join them.
void Warp::choose() {
  if (now.lanes != 0) others.push_back(now);
  now.lanes = 0;
  std::size_t least = others.size();
  for (std::size_t x = 0; x < others.size(); ++x) {
    if (!others[x].waits && (least == others.size() || others[x].at < others[least].at)) least = x;
  }
  if (least == others.size()) return;
  const u32 at = others[least].at;
  now = {at, 0, false};
  for (std::size_t x = 0; x < others.size();) {
    if (others[x].at == at) {
      now.lanes |= others[x].lanes;
      others[x] = others.back();
      others.pop_back();
    } else {
      ++x;
    }
  }
}

bool Warp::run(int most) {
  if (done() || waits) return false;
  for (Group& group : others) group.waits = false;
  now.waits = pauses;  // who polls lets the others go on
  pauses = false;
  choose();
  const auto next_of_others = [&] {
    u32 least = ~0U;
    for (const Group& group : others) {
      // Those who wait are joined where they wait.
      if (!group.waits || group.at > now.at) least = std::min(least, group.at);
    }
    return least;
  };
  u32 limit = next_of_others();
  for (int ran = 0; ran < most; ++ran) {
    if (alive == 0) return true;
    if (now.lanes == 0 || now.at >= limit) {
      choose();
      if (now.lanes == 0) return ran > 0;  // all wait for one another
      limit = next_of_others();
    }
    const Instruction& i = program.code[now.at];
    u32 lanes = now.lanes;
    if (i.guard >= 0) {
      const u32 holds = predicates[static_cast<std::size_t>(i.guard)];
      lanes &= i.guard_inverted ? ~holds : holds;
    }
    if (i.run == nullptr) {  // a branch
      ++block.launch.clock;
      const u32 rest = now.lanes & ~lanes;
      if (rest == 0) {
        now.at = i.target;
      } else if (lanes == 0) {
        ++now.at;
      } else {
        others.push_back({now.at + 1, rest, false});
        now = {i.target, lanes, false};
      }
      if (!others.empty()) {
        choose();
        limit = next_of_others();
      }
      continue;
    }
    if (lanes != 0) i.run(*this, i, lanes);
    if (put_off_) {
      put_off_ = false;
      now.waits = true;
      others.push_back(now);
      now.lanes = 0;
      pauses = true;
      choose();
      if (now.lanes == 0) return true;
      pauses = false;
      limit = next_of_others();
      continue;
    }
    ++now.at;
    if (waits || pauses) return true;
  }
  return true;
}

// ---- blocks

Block::Block(Launch& launch, u32 number, u32 rank) : launch(launch), rank(rank) {
  at = {number % launch.grid.x, number / launch.grid.x % launch.grid.y, number / launch.grid.x / launch.grid.y};
  constexpr std::size_t kSwizzle = 1024;
  shared_end = launch.program.dynamic_shared + launch.shared_bytes;
  memory = std::make_unique<std::byte[]>(shared_end + kSwizzle);
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.get());
  shared = memory.get() + (kSwizzle - begin % kSwizzle) % kSwizzle;
  std::memset(shared, 0xff, shared_end);
  const u32 threads = launch.block.x * launch.block.y * launch.block.z;
  for (u32 first = 0; first < threads; first += kLanes) {
    const u32 count = std::min<u32>(threads - first, kLanes);
    warps.push_back(std::make_unique<Warp>(*this, launch.program, static_cast<int>(first / kLanes),
                                           count == kLanes ? kAllLanes : (1U << count) - 1));
  }
}

bool Block::done() const {
  return std::ranges::all_of(warps, [](const auto& warp) { return warp->done(); });
}

void* Block::shared_at(u64 address, int bytes) {
  Block* of = this;
  if ((address >> 31 & 1U) != 0) {
    of = cluster.at(address >> 24 & 0x7fU);
    address &= 0xffffffU;
  }
  if (address < kSharedBegin || address + static_cast<u64>(bytes) > of->shared_end)
    throw Fault("shared memory at " + std::to_string(address) + " of " + std::to_string(of->shared_end));
  if (address % static_cast<u64>(bytes) != 0 && std::has_single_bit(static_cast<u32>(bytes)))
    throw Fault("shared memory at " + std::to_string(address) + " in pieces of " + std::to_string(bytes));
  return of->shared + address;
}

void Block::later(std::function<void()> copy) {
  if (engine.empty() && launch.lot()) {
    copy();
  } else {
    engine.push_back(std::move(copy));
  }
}
void Block::drain() {
  for (std::size_t x = 0; x < engine.size(); ++x) engine[x]();
  engine.clear();
}

void Block::open(NamedBarrier& barrier) {
  if (barrier.waiting.empty()) return;
  u32 wanted = barrier.wanted;
  if (wanted == 0) {
    for (const auto& warp : warps) wanted += warp->done() ? 0 : kLanes;
  }
  if (barrier.arrived < wanted) return;
  for (const NamedBarrier::Waiting& one : barrier.waiting) {
    if (one.result != nullptr) one.warp->set(*one.result, barrier.any ? kAllLanes : 0, kAllLanes);
    one.warp->waits = false;
  }
  barrier = {};
}

bool Block::run() {
  bool did = false;
  const std::size_t first = launch.lots() % warps.size();
  for (std::size_t w = 0; w < warps.size(); ++w) {
    Warp& warp = *warps[(first + w) % warps.size()];
    try {
      did = (warp.run(kSlice) && !warp.pauses) || did;
    } catch (const Fault& fault) {
      throw Fault("block " + std::to_string(at.x) + "," + std::to_string(at.y) + " warp " + std::to_string(warp.index) +
                  " " + launch.program.text_of(launch.program.code[warp.now.at]) + ": " + fault.what());
    }
  }
  for (NamedBarrier& barrier : barriers) {
    if (barrier.wanted == 0) open(barrier);  // threads may have ended
  }
  if (!engine.empty() && (!did || launch.lot())) {
    const std::size_t some = did ? launch.lots() % engine.size() + 1 : engine.size();
    for (std::size_t x = 0; x < some; ++x) engine[x]();
    engine.erase(engine.begin(), engine.begin() + static_cast<std::ptrdiff_t>(some));
    did = true;
  }
  return did;
}

namespace {

/// Where each warp's threads are.
std::string places_of(const Block& block) {
  std::string text;
  for (const auto& warp : block.warps) {
    text += "\n  warp " + std::to_string(warp->index) + (warp->done() ? " done" : warp->waits ? " at a barrier" : "");
    std::vector<Group> groups = warp->others;
    if (warp->now.lanes != 0) groups.push_back(warp->now);
    for (const Group& group : groups) {
      text += ", lanes " + hex(group.lanes) + " at ";
      text += group.at < block.launch.program.code.size()
                  ? block.launch.program.text_of(block.launch.program.code[group.at])
                  : "the end";
    }
  }
  return text;
}

}  // namespace

void run_grid(Launch& launch, u32 at_once) {
  const u32 size = launch.program.cluster, count = launch.grid.x * launch.grid.y * launch.grid.z;
  std::deque<std::unique_ptr<Block>> blocks;
  u32 next = 0;
  int idle = 0;
  constexpr int kRounds = 50, kMostIdle = 2000;
  while (next < count || !blocks.empty()) {
    while (next < count && blocks.size() + size <= std::max(at_once, size)) {
      std::vector<Block*> cluster;
      for (u32 rank = 0; rank < size; ++rank) {
        blocks.push_back(std::make_unique<Block>(launch, next++, rank));
        cluster.push_back(blocks.back().get());
      }
      for (Block* block : cluster) block->cluster = cluster;
    }
    bool did = false;
    for (auto& block : blocks) {
      for (int round = 0; round < kRounds && !block->done(); ++round) {
        if (!block->run()) break;
        did = true;
      }
      if (block->done() && !block->engine.empty()) block->drain(), did = true;
    }
    while (!blocks.empty()) {
      const bool over = std::all_of(blocks.begin(), blocks.begin() + size, [](const auto& b) { return b->done(); });
      if (!over) break;
      blocks.erase(blocks.begin(), blocks.begin() + size);
    }
    idle = did ? 0 : idle + 1;
    if (idle > kMostIdle) {
      throw Fault("all threads wait for one another:" + places_of(*blocks.front()));
    }
  }
}

}  // namespace fovea::emulator
