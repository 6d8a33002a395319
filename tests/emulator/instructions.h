#pragma once

#include <bit>

#include "tests/emulator/warp.h"

// The kinds of instructions; each says whether it knows a name, and then sets what runs it.
namespace fovea::emulator {

/// Calls f(lane) for each of these lanes.
template <class F>
void each_lane(u32 lanes, F&& f) {
  if (lanes == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) f(l);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
  }
}

inline bool has(std::string_view name, std::string_view word) { return name.find(word) != std::string_view::npos; }

/// What orders or hints, where everything happens at once and in order.
inline void nothing(Warp& /*w*/, const Instruction& /*i*/, u32 /*lanes*/) {}

bool decode_arithmetic(const std::string& name, Instruction& instruction);
bool decode_memory(const std::string& name, Instruction& instruction);
bool decode_matrices(const std::string& name, Instruction& instruction);
bool decode_together(const std::string& name, Instruction& instruction);

}  // namespace fovea::emulator
