#include <algorithm>
#include <cstring>

#include "tests/emulator/instructions.h"
#include "tests/emulator/numbers.h"
#include "tests/emulator/tensor_map.h"

// Loads and stores, additions in memory, copies in the background and the barriers that wait for them.
namespace fovea::emulator {
namespace {

u64 address_of(Warp& w, const Operand& o, int lane) {
  const u64 number = w.number(o, lane);
  return o.kind == Operand::Kind::kSpecial ? number : number + static_cast<u64>(o.offset);
}

/// The host's place of a lane's address.
std::byte* place(Warp& w, const Operand& o, int lane, Space space, int bytes) {
  const u64 address = address_of(w, o, lane);
  if (space == Space::kShared) return static_cast<std::byte*>(w.block.shared_at(address & 0xffffffffU, bytes));
  Launch& launch = w.block.launch;
  const auto inside = [&](const std::vector<std::byte>& of) {
    const auto begin = reinterpret_cast<u64>(of.data());
    return address >= begin && address + static_cast<u64>(bytes) <= begin + of.size();
  };
  if (!inside(launch.params) && !inside(launch.program.globals))
    launch.memory.check(address, static_cast<std::size_t>(bytes));
  return at_address<std::byte>(address);
}

void load(Warp& w, const Instruction& i, u32 lanes) {
  const auto to = i.group(0);
  const Operand& from = i.operand(1);
  const int count = static_cast<int>(to.size()), all = count * i.bytes;
  each_lane(lanes, [&](int l) {
    const std::byte* at = place(w, from, l, i.space, all);
    for (int x = 0; x < count; ++x) {
      u64 bits = 0;
      std::memcpy(&bits, at + x * i.bytes, static_cast<std::size_t>(i.bytes));
      if (i.is_signed && i.bytes < 8)
        bits = static_cast<u64>(static_cast<i64>(bits << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes));
      const Operand& result = to[static_cast<std::size_t>(x)];
      w.put(result, l, bits);
    }
  });
  if (i.what == 1) w.pauses = true;  // acquire: others may have to write first
}

void store(Warp& w, const Instruction& i, u32 lanes) {
  const auto from = i.group(1);
  const int count = static_cast<int>(from.size()), all = count * i.bytes;
  each_lane(lanes, [&](int l) {
    std::byte* at = place(w, i.operand(0), l, i.space, all);
    for (int x = 0; x < count; ++x) {
      const u64 bits = w.number(from[static_cast<std::size_t>(x)], l);
      std::memcpy(at + x * i.bytes, &bits, static_cast<std::size_t>(i.bytes));
    }
  });
}

/// `what` is done to a number in memory; `detail`: its type, as the last letters of the name.
u64 changed(char what, int type, u64 old, u64 by, u64 other) {
  const auto real = [](u64 bits) { return as_float(static_cast<u32>(bits)); };
  switch (what) {
    case 'a':  // add
      if (type == 'f' * 256 + 32) return bits_of(real(old) + real(by));
      return old + by;
    case 'o':
      return old | by;
    case 'n':
      return old & by;
    case 'e':
      return by;
    case 'c':
      return old == by ? other : old;
    case 'm':
      return type / 256 == 's' ? (static_cast<i32>(by) > static_cast<i32>(old) ? by : old) : std::max(old, by);
    case 'i':
      return type / 256 == 's' ? (static_cast<i32>(by) < static_cast<i32>(old) ? by : old) : std::min(old, by);
    default:
      throw Fault("an operation in memory that is not known");
  }
}

void change(Warp& w, const Instruction& i, u32 lanes, bool gives) {
  const int first = gives ? 1 : 0;
  const auto by = i.group(first + 1);
  each_lane(lanes, [&](int l) {
    std::byte* at = place(w, i.operand(first), l, i.space, i.bytes * static_cast<int>(by.size()));
    for (std::size_t x = 0; x < by.size(); ++x) {
      u64 old = 0;
      std::byte* mine = at + x * static_cast<std::size_t>(i.bytes);
      std::memcpy(&old, mine, static_cast<std::size_t>(i.bytes));
      const u64 other = i.groups > first + 2 ? w.number(i.operand(first + 2), l) : 0;
      const u64 now = changed(i.letter, i.detail, old, w.number(by[x], l), other);
      std::memcpy(mine, &now, static_cast<std::size_t>(i.bytes));
      if (gives) w.put(i.operand(0), l, old);
    }
  });
}
void change_and_give(Warp& w, const Instruction& i, u32 lanes) { change(w, i, lanes, true); }
void change_only(Warp& w, const Instruction& i, u32 lanes) { change(w, i, lanes, false); }

// ---- cp.async

void perform(const Copies::One& copy) {
  if (copy.clears) {
    std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
  } else {
    std::memcpy(copy.to, at_address<const void>(copy.from), static_cast<std::size_t>(copy.bytes));
  }
}

void copy_async(Warp& w, const Instruction& i, u32 lanes) {
  const int bytes = static_cast<int>(w.in<u32>(i.operand(2))[0]);
  const u32 clears = i.groups > 3 && i.operand(3).width == 1 ? w.holds(i.operand(3)) : 0;
  each_lane(lanes, [&](int l) {
    const bool clear = (clears >> l & 1U) != 0;
    Copies::One copy{place(w, i.operand(0), l, Space::kShared, bytes), address_of(w, i.operand(1), l), bytes, clear};
    if (!clear) (void)place(w, i.operand(1), l, Space::kGlobal, bytes);
    if (w.block.launch.lot()) {
      perform(copy);
    } else {
      w.copies.at(static_cast<std::size_t>(l)).open.push_back(copy);
    }
  });
}
void close_copies(Warp& w, const Instruction& /*i*/, u32 lanes) {
  each_lane(lanes, [&](int l) {
    Copies& of = w.copies.at(static_cast<std::size_t>(l));
    of.closed.push_back(std::move(of.open));
    of.open.clear();
  });
}
void await_copies(Copies& of, std::size_t open) {
  for (; of.closed.size() > open; of.closed.pop_front()) {
    for (const Copies::One& copy : of.closed.front()) perform(copy);
  }
}
void wait_copies(Warp& w, const Instruction& i, u32 lanes) {
  const u32 open = w.in<u32>(i.operand(0))[0];
  each_lane(lanes, [&](int l) { await_copies(w.copies.at(static_cast<std::size_t>(l)), open); });
}
void wait_all_copies(Warp& w, const Instruction& i, u32 lanes) {
  close_copies(w, i, lanes);
  each_lane(lanes, [&](int l) { await_copies(w.copies.at(static_cast<std::size_t>(l)), 0); });
}

// ---- mbarriers: the phase, the bytes still to come, and the arrivals expected and missing

struct Mbarrier {
  u64 missing : 16, expected : 16, bytes : 31, phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr u64 kNone = u64{1} << 30;  // bytes may be announced after they have come

Mbarrier& mbarrier(Block& block, u64 address) {
  return *static_cast<Mbarrier*>(block.shared_at(address & 0xffffffffU, 8));
}
void end_phase(Mbarrier& b) {
  if (b.missing != 0 || b.bytes != kNone) return;
  b.phase ^= 1;
  b.missing = b.expected;
}
void arrive(Mbarrier& b, u64 bytes = 0) {
  if (b.missing == 0) throw Fault("an arrival too many at an mbarrier");
  b.bytes += bytes;
  --b.missing;
  end_phase(b);
}
void complete(Mbarrier& b, u64 bytes) {
  b.bytes -= bytes;
  end_phase(b);
}

void begin_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const u64 count = w.number(i.operand(1), l);
    mbarrier(w.block, address_of(w, i.operand(0), l)) = {
        .missing = count, .expected = count, .bytes = kNone, .phase = 0};
  });
}
void end_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    Mbarrier& b = mbarrier(w.block, address_of(w, i.operand(0), l));
    if (b.missing != b.expected || b.bytes != kNone) throw Fault("the end of an mbarrier in a phase that has begun");
    b = {};
  });
}
void arrive_at_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const u64 bytes = i.groups > 2 ? w.number(i.operand(2), l) : 0;
    arrive(mbarrier(w.block, address_of(w, i.operand(1), l)), bytes);
  });
}
void expect_bytes(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes,
            [&](int l) { mbarrier(w.block, address_of(w, i.operand(0), l)).bytes += w.number(i.operand(1), l); });
}
void test_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  u32 over = 0;
  each_lane(lanes, [&](int l) {
    const u64 parity = w.number(i.operand(2), l) & 1U;
    if (mbarrier(w.block, address_of(w, i.operand(1), l)).phase != parity) over |= 1U << l;
  });
  w.set(i.operand(0), over, lanes);
  if (over != lanes) w.pauses = true;
}
void arrive_behind_copies(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    Copies& of = w.copies.at(static_cast<std::size_t>(l));
    const u64 address = address_of(w, i.operand(0), l);
    Block* block = &w.block;
    of.closed.push_back(std::move(of.open));
    of.open.clear();
    auto copies = std::make_shared<std::deque<std::vector<Copies::One>>>(std::move(of.closed));
    of.closed.clear();
    block->later([=] {
      for (const auto& some : *copies) {
        for (const Copies::One& copy : some) perform(copy);
      }
      arrive(mbarrier(*block, address));
    });
  });
}

// ---- the copy engine

void* swizzled(Block& block, u64 address, int bytes) {
  return block.shared_at(address ^ (address >> 7 & 7U) << 4, bytes);
}

using Coordinates = std::array<i32, TensorMap::kMostDimensions>;

/// Calls f(shared address, global address) for every element of a box; outside of the tensor that is 0.
template <class F>
void each_piece(const TensorMap& map, u64 shared, const Coordinates& at, F&& f) {
  if (map.magic != TensorMap::kMagic) throw Fault("a copy by what is no tensor map");
  u32 elements = 1;
  for (const u32 n : map.box) elements *= n;
  for (u32 x = 0; x < elements; ++x) {
    bool inside = true;
    u64 from = map.address;
    u32 rest = x;
    for (std::size_t n = 0; n < at.size(); rest /= map.box.at(n++)) {
      const i64 index = at.at(n) + static_cast<i64>(rest % map.box.at(n));
      inside = inside && index >= 0 && index < static_cast<i64>(map.sizes.at(n));
      from += static_cast<u64>(index) * (n == 0 ? static_cast<u64>(map.element) : map.strides.at(n - 1));
    }
    f(shared + u64{x} * static_cast<u64>(map.element), inside ? from : 0);
  }
}

/// Of an instruction that names as many dimensions as the map has.
Coordinates coordinates(Warp& w, const TensorMap& map, std::span<const Operand> group, int lane) {
  Coordinates at{};
  if (group.size() != map.rank + 1) throw Fault("a tensor of other dimensions than its map's");
  for (std::size_t n = 0; n < map.rank; ++n) at.at(n) = static_cast<i32>(w.number(group[n + 1], lane));
  return at;
}

void load_box(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const u64 to = address_of(w, i.operand(0), l), bar = address_of(w, i.operand(2), l);
    const auto* map = at_address<const TensorMap>(address_of(w, i.operand(1), l));
    const Coordinates at = coordinates(w, *map, i.group(1), l);
    Block* block = &w.block;
    block->later([=] {
      const auto bytes = static_cast<std::size_t>(map->element);
      u64 all = 0;
      each_piece(*map, to, at, [&](u64 shared, u64 global) {
        void* place = swizzled(*block, shared, map->element);
        if (global == 0) {
          std::memset(place, 0, bytes);
        } else {
          block->launch.memory.check(global, bytes);
          std::memcpy(place, at_address<const void>(global), bytes);
        }
        all += bytes;
      });
      complete(mbarrier(*block, bar), all);
    });
  });
}
void store_box(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const u64 from = address_of(w, i.operand(1), l);
    const auto* map = at_address<const TensorMap>(address_of(w, i.operand(0), l));
    const Coordinates at = coordinates(w, *map, i.group(0), l);
    Block* block = &w.block;
    block->later([=] {
      each_piece(*map, from, at, [&](u64 shared, u64 global) {
        if (global == 0) return;
        block->launch.memory.check(global, static_cast<std::size_t>(map->element));
        std::memcpy(at_address<void>(global), swizzled(*block, shared, map->element),
                    static_cast<std::size_t>(map->element));
      });
    });
  });
}

/// Contiguous bytes, in multiples of 16, between global memory and shared memory, of this block or another.
constexpr int kPiece = 16;
void load_bytes(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const u64 to = address_of(w, i.operand(0), l), from = address_of(w, i.operand(1), l),
              bar = address_of(w, i.operand(3), l);
    const u64 bytes = w.number(i.operand(2), l);
    const bool global = i.space == Space::kGlobal;
    Block* block = &w.block;
    block->later([=] {
      for (u64 x = 0; x < bytes; x += kPiece) {
        if (global) block->launch.memory.check(from + x, kPiece);
        const void* source = global ? at_address<const void>(from + x) : block->shared_at(from + x, kPiece);
        std::memcpy(block->shared_at(to + x, kPiece), source, kPiece);
      }
      complete(mbarrier(*block, bar), bytes);
    });
  });
}
void store_bytes(Warp& w, const Instruction& i, u32 lanes) {
  each_lane(lanes, [&](int l) {
    const u64 to = address_of(w, i.operand(0), l), from = address_of(w, i.operand(1), l);
    const u64 bytes = w.number(i.operand(2), l);
    const bool adds = i.what == 1;
    Block* block = &w.block;
    block->later([=] {
      for (u64 x = 0; x < bytes; x += kPiece) {
        block->launch.memory.check(to + x, kPiece);
        auto* place = at_address<float>(to + x);
        const auto* source = static_cast<const float*>(block->shared_at(from + x, kPiece));
        for (int e = 0; e < 4; ++e) place[e] = adds ? place[e] + source[e] : source[e];
      }
    });
  });
}
void await_engine(Warp& w, const Instruction& /*i*/, u32 /*lanes*/) { w.block.drain(); }

}  // namespace

bool decode_memory(const std::string& name, Instruction& i) {
  const std::string last = name.substr(name.rfind('.') + 1);
  const auto typed = [&] {
    i.bytes = std::atoi(last.c_str() + 1) / 8;
    i.is_signed = last[0] == 's';
    i.space = has(name, ".shared") ? Space::kShared : has(name, ".global") ? Space::kGlobal : Space::kGeneric;
  };
  if (name.starts_with("ld.")) {
    typed();
    i.what = has(name, ".acquire") || has(name, ".volatile") ? 1 : 0;
    i.run = load;
  } else if (name.starts_with("st.")) {
    typed();
    i.run = store;
  } else if (name.starts_with("atom.") || name.starts_with("red.")) {
    typed();
    i.letter = has(name, ".add")    ? 'a'
               : has(name, ".or")   ? 'o'
               : has(name, ".and")  ? 'n'
               : has(name, ".exch") ? 'e'
               : has(name, ".cas")  ? 'c'
               : has(name, ".max")  ? 'm'
               : has(name, ".min")  ? 'i'
                                    : '\0';
    i.detail = last[0] * 256 + i.bytes * 8;
    i.run = name[0] == 'a' ? change_and_give : change_only;
    return i.letter != 0;
  } else if (name.starts_with("cp.async.ca.") || name.starts_with("cp.async.cg.")) {
    i.run = copy_async;
  } else if (name == "cp.async.commit_group") {
    i.run = close_copies;
  } else if (name == "cp.async.wait_group") {
    i.run = wait_copies;
  } else if (name == "cp.async.wait_all") {
    i.run = wait_all_copies;
  } else if (name.starts_with("cp.async.mbarrier.arrive.noinc")) {
    i.run = arrive_behind_copies;
  } else if (name.starts_with("mbarrier.init")) {
    i.run = begin_mbarrier;
  } else if (name.starts_with("mbarrier.inval")) {
    i.run = end_mbarrier;
  } else if (name.starts_with("mbarrier.arrive")) {
    i.run = arrive_at_mbarrier;
  } else if (name.starts_with("mbarrier.expect_tx")) {
    i.run = expect_bytes;
  } else if (name.starts_with("mbarrier.try_wait.parity") || name.starts_with("mbarrier.test_wait.parity")) {
    i.run = test_mbarrier;
  } else if (name.starts_with("cp.async.bulk.tensor.") && has(name, "d.shared::cluster.")) {
    i.run = load_box;
  } else if (name.starts_with("cp.async.bulk.tensor.") && has(name, "d.global.")) {
    i.run = store_box;
  } else if (name.starts_with("cp.async.bulk.shared::cluster.")) {
    i.space = has(name, "cluster.global") ? Space::kGlobal : Space::kShared;
    i.run = load_bytes;
  } else if (name.starts_with("cp.async.bulk.global.shared::cta") ||
             name.starts_with("cp.reduce.async.bulk.global.shared::cta")) {
    i.what = name[3] == 'r' ? 1 : 0;
    i.run = store_bytes;
  } else if (name.starts_with("cp.async.bulk.wait_group")) {
    i.run = await_engine;
  } else if (name.starts_with("cp.async.bulk.commit_group") || name.starts_with("fence.") ||
             name.starts_with("membar.") || name.starts_with("prefetch")) {
    i.run = nothing;
  } else {
    return false;
  }
  return true;
}

}  // namespace fovea::emulator
