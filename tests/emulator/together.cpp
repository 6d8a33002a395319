#include <algorithm>

#include "tests/emulator/instructions.h"
#include "tests/emulator/numbers.h"

// What the lanes of a warp, the warps of a block and the blocks of a cluster do together.
namespace fovea::emulator {
namespace {

u32 members(Warp& w, const Operand& mask, u32 lanes) { return w.in<u32>(mask)[std::countr_zero(lanes)]; }

void shuffle(Warp& w, const Instruction& i, u32 lanes) {
  if (!w.together(lanes, members(w, i.operand(i.groups - 1), lanes))) return;
  const auto results = i.group(0);
  std::array<u32, kLanes> from{};
  std::copy_n(w.in<u32>(i.operand(1)), kLanes, from.begin());
  const u32* b = w.in<u32>(i.operand(2));
  const u32 clamp = w.in<u32>(i.operand(3))[0];
  u32* to = w.out<u32>(results[0]);
  u32 in_range = 0;
  for (u32 l = 0; l < kLanes; ++l) {
    if ((lanes >> l & 1U) == 0) continue;
    const u32 segment = clamp >> 8 & 31U, low = l & segment, high = low | (clamp & 31U & ~segment);
    const u32 by = b[l] & 31U;
    i32 source = 0;
    bool valid = false;
    if (i.letter == 'i') source = static_cast<i32>(low | (by & ~segment)), valid = source <= static_cast<i32>(high);
    if (i.letter == 'b') source = static_cast<i32>(l ^ by), valid = source <= static_cast<i32>(high);
    if (i.letter == 'd') source = static_cast<i32>(l + by), valid = source <= static_cast<i32>(high);
    if (i.letter == 'u') source = static_cast<i32>(l) - static_cast<i32>(by), valid = source >= static_cast<i32>(low);
    if (!valid) source = static_cast<i32>(l);
    if (valid) in_range |= 1U << l;
    to[l] = from.at(static_cast<std::size_t>(source));
  }
  if (results.size() > 1) w.set(results[1], in_range, lanes);
}

void vote(Warp& w, const Instruction& i, u32 lanes) {
  const u32 wanted = members(w, i.operand(2), lanes);
  if (!w.together(lanes, wanted)) return;
  const u32 yes = w.holds(i.operand(1)) & lanes;
  if (i.letter == 'b') {
    u32* to = w.out<u32>(i.operand(0));
    each_lane(lanes, [&](int l) { to[l] = yes; });
    return;
  }
  const bool result = i.letter == 'a' ? yes != 0 : i.letter == 'l' ? yes == lanes : yes == 0 || yes == lanes;
  w.set(i.operand(0), result ? kAllLanes : 0, lanes);
}

void reduce(Warp& w, const Instruction& i, u32 lanes) {
  if (!w.together(lanes, members(w, i.operand(2), lanes))) return;
  const u32* from = w.in<u32>(i.operand(1));
  u32 sum = 0;
  bool first = true;
  for (int l = 0; l < kLanes; ++l) {
    if ((lanes >> l & 1U) == 0) continue;
    const u32 x = from[l];
    sum =
        first             ? x
        : i.letter == 'o' ? sum | x
        : i.letter == 'n' ? sum & x
        : i.letter == 'x' ? sum ^ x
        : i.letter == 'a' ? sum + x
        : i.letter == 'm'
            ? (i.is_signed ? static_cast<u32>(std::max(static_cast<i32>(sum), static_cast<i32>(x))) : std::max(sum, x))
            : (i.is_signed ? static_cast<u32>(std::min(static_cast<i32>(sum), static_cast<i32>(x))) : std::min(sum, x));
    first = false;
  }
  u32* to = w.out<u32>(i.operand(0));
  each_lane(lanes, [&](int l) { to[l] = sum; });
}

/// bar.sync id {, threads};  bar.arrive;  bar.red.or p, id {, threads}, q.
void meet(Warp& w, const Instruction& i, u32 lanes) {
  const bool reduces = i.letter == 'r', arrives = i.letter == 'a';
  if (!w.together(lanes, kAllLanes)) return;
  const int first = reduces ? 1 : 0, has_count = i.groups - first - (reduces ? 1 : 0) > 1 ? 1 : 0;
  NamedBarrier& barrier = w.block.barriers.at(w.in<u32>(i.operand(first))[0]);
  const u32 wanted = has_count != 0 ? w.in<u32>(i.operand(first + 1))[0] : 0;
  if (reduces) barrier.any = barrier.any || (w.holds(i.operand(i.groups - 1)) & lanes) != 0;
  barrier.arrived += kLanes;
  barrier.wanted = wanted;
  if (!arrives) {
    barrier.waiting.push_back({&w, reduces ? &i.operand(0) : nullptr});
    w.waits = true;
  }
  w.block.open(barrier);
}

void meet_warp(Warp& w, const Instruction& i, u32 lanes) { (void)w.together(lanes, members(w, i.operand(0), lanes)); }

void leave(Warp& w, const Instruction& /*i*/, u32 lanes) {
  w.alive &= ~lanes;
  w.now.lanes &= ~lanes;
}

void arrive_in_cluster(Warp& w, const Instruction& /*i*/, u32 lanes) {
  if (!w.together(lanes, kAllLanes)) return;
  Block& first = *w.block.cluster.front();
  w.cluster_phase = first.cluster_phase;
  if (++first.cluster_arrived == first.warps.size() * w.block.cluster.size()) {
    first.cluster_arrived = 0;
    ++first.cluster_phase;
  }
}
void wait_for_cluster(Warp& w, const Instruction& /*i*/, u32 /*lanes*/) {
  if (w.block.cluster.front()->cluster_phase == w.cluster_phase) w.put_off();
}

void map_address(Warp& w, const Instruction& i, u32 lanes) {
  const u32 *address = w.in<u32>(i.operand(1)), *rank = w.in<u32>(i.operand(2));
  u32* to = w.out<u32>(i.operand(0));
  each_lane(lanes, [&](int l) { to[l] = 1U << 31 | rank[l] << 24 | address[l]; });
}

}  // namespace

bool decode_together(const std::string& name, Instruction& i) {
  const auto is = [&](std::string_view begin) { return name.starts_with(begin); };
  if (is("shfl.sync.")) {
    i.letter = name[10];
    i.run = shuffle;
  } else if (is("vote.sync.")) {
    i.letter = is("vote.sync.ballot") ? 'b' : is("vote.sync.any") ? 'a' : is("vote.sync.all") ? 'l' : 'u';
    i.run = vote;
  } else if (is("redux.sync.")) {
    i.letter = name[11] == 'o'        ? 'o'
               : is("redux.sync.and") ? 'n'
               : name[11] == 'x'      ? 'x'
               : is("redux.sync.add") ? 'a'
               : is("redux.sync.max") ? 'm'
                                      : 's';
    i.is_signed = name.ends_with("s32");
    i.run = reduce;
  } else if (is("bar.warp.sync")) {
    i.run = meet_warp;
  } else if (is("barrier.cluster.arrive")) {
    i.run = arrive_in_cluster;
  } else if (is("barrier.cluster.wait")) {
    i.run = wait_for_cluster;
  } else if (is("bar.") || is("barrier.")) {
    i.letter = name.find(".red.or") != std::string::npos ? 'r' : name.find(".arrive") != std::string::npos ? 'a' : 's';
    i.run = meet;
    return i.letter != 's' || name.find(".sync") != std::string::npos;
  } else if (name == "ret" || name == "exit") {
    i.run = leave;
  } else if (is("mapa.")) {
    i.run = map_address;
  } else if (is("griddepcontrol.") || is("setmaxnreg.") || is("nanosleep.")) {
    i.run = nothing;
  } else {
    return false;
  }
  return true;
}

void decode(const std::string& name, Instruction& i) {
  if (name.starts_with("bra")) return;
  if (decode_arithmetic(name, i) || decode_memory(name, i) || decode_matrices(name, i) || decode_together(name, i))
    return;
  throw std::runtime_error("PTX: no instruction '" + name + "' is known here");
}

}  // namespace fovea::emulator
