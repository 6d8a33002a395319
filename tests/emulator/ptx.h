#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

// PTX as NVRTC writes it, read into instructions that `Warp` runs.  Of the language there is what compilers make of
// Fovea's kernels and what their assembler says; anything else is refused by name.
namespace fovea::emulator {

using i32 = std::int32_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;
using u64 = std::uint64_t;

inline constexpr int kLanes = 32;
inline constexpr u32 kAllLanes = 0xffffffffU;
inline constexpr u32 kSharedBegin = 1024;  ///< the system keeps the shared memory before it

struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, u32 lanes);

enum class Space : std::uint8_t { kGeneric, kGlobal, kShared };

/// What lies at an address of global memory or of parameters, which are the host's.
template <class T>
T* at_address(u64 address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): a register has held it
}

/// A register, a constant or what stands for one.
struct Operand {
  enum class Kind : std::uint8_t { kRegister, kConstant, kSpecial, kSink };
  Kind kind = Kind::kSink;
  std::uint8_t width = 0;  ///< bits of a register; 1: a predicate
  bool inverted = false;   ///< a predicate's
  u32 at = 0;              ///< register: bytes into the file; predicate: its number; else which constant or special
  i64 offset = 0;          ///< of an address: what is added
};

/// The same number for every lane.
struct Constant {
  std::array<u32, kLanes> words;
  std::array<u64, kLanes> longs;
};

struct Instruction {
  static constexpr int kMostGroups = 9;
  Run run = nullptr;
  std::vector<Operand> operands;
  std::array<std::uint16_t, kMostGroups> begins{};  ///< of the groups {a, b, c} of operands; one alone is a group
  int groups = 0;
  int guard = -1;  ///< predicate
  bool guard_inverted = false;
  u32 target = 0;  ///< of a branch

  // What the name says, as its kind of instruction needs it.
  Space space = Space::kGeneric;
  int bytes = 0;  ///< of an element in memory
  bool is_signed = false;
  char letter = 0;  ///< which of its kind
  int what = 0, detail = 0;
  int line = 0;  ///< of the text

  [[nodiscard]] std::span<const Operand> group(int g) const {
    const std::size_t begin = begins[static_cast<std::size_t>(g)];
    const std::size_t end = g + 1 < groups ? begins[static_cast<std::size_t>(g) + 1] : operands.size();
    return std::span(operands).subspan(begin, end - begin);
  }
  [[nodiscard]] const Operand& operand(int g) const { return operands[begins[static_cast<std::size_t>(g)]]; }
};

/// The kernel of a module.
struct Program {
  explicit Program(std::string_view ptx);

  std::vector<Instruction> code;
  std::deque<Constant> constants;
  u32 file_bytes = 0, predicates = 0;  ///< of a warp's registers
  u32 param_bytes = 0, static_shared_bytes = 0;
  u32 dynamic_shared = 0;  ///< where it begins: behind the static
  u32 cluster = 1;         ///< blocks
  std::vector<std::string> lines;
  std::vector<std::byte> globals;

  [[nodiscard]] std::string text_of(const Instruction& i) const;
};

/// Sets `run` and what belongs to it for an instruction called `name`; throws std::runtime_error for an unknown one.
void decode(const std::string& name, Instruction& instruction);

/// Numbers of special registers.
int special_register(std::string_view name);

}  // namespace fovea::emulator
