#include <cstring>

#include "tests/emulator/instructions.h"
#include "tests/emulator/numbers.h"

// Tensor cores: matrices between shared memory and lanes, and their products.  A tensor core adds up its products
// exactly, adds that to C and cuts off what does not fit: so is it done here.
namespace fovea::emulator {
namespace {

void load_matrices(Warp& w, const Instruction& i, u32 lanes) {
  if (!w.together(lanes, kAllLanes)) return;
  const auto to = i.group(0);
  const Operand& from = i.operand(1);
  for (std::size_t m = 0; m < to.size(); ++m) {
    std::array<std::array<std::uint16_t, 8>, 8> rows{};
    for (std::size_t r = 0; r < 8; ++r) {
      const int lane = static_cast<int>(8 * m + r);
      const u64 address = w.number(from, lane) + static_cast<u64>(from.offset);
      std::memcpy(rows[r].data(), w.block.shared_at(address & 0xffffffffU, 16), 16);
    }
    u32* words = w.out<u32>(to[m]);
    for (std::size_t l = 0; l < kLanes; ++l) {
      const std::size_t line = l / 4, pair = l % 4 * 2;
      const u32 low = i.letter == 't' ? rows[pair][line] : rows[line][pair];
      const u32 high = i.letter == 't' ? rows[pair + 1][line] : rows[line][pair + 1];
      words[l] = low | high << 16;
    }
  }
}

void store_matrices(Warp& w, const Instruction& i, u32 lanes) {
  if (!w.together(lanes, kAllLanes)) return;
  const auto from = i.group(1);
  const Operand& to = i.operand(0);
  for (std::size_t m = 0; m < from.size(); ++m) {
    std::array<std::array<std::uint16_t, 8>, 8> rows{};
    const u32* words = w.in<u32>(from[m]);
    for (std::size_t l = 0; l < kLanes; ++l) {
      const std::size_t line = l / 4, pair = l % 4 * 2;
      (i.letter == 't' ? rows[pair][line] : rows[line][pair]) = static_cast<std::uint16_t>(words[l]);
      (i.letter == 't' ? rows[pair + 1][line] : rows[line][pair + 1]) = static_cast<std::uint16_t>(words[l] >> 16);
    }
    for (std::size_t r = 0; r < 8; ++r) {
      const u64 address = w.number(to, static_cast<int>(8 * m + r)) + static_cast<u64>(to.offset);
      std::memcpy(w.block.shared_at(address & 0xffffffffU, 16), rows[r].data(), 16);
    }
  }
}

constexpr int kMostColumns = 256;
/// A of 16 rows, B by depth, and the accumulators as they lie in lanes.
struct Product {
  double a[16][16];
  double b[16][kMostColumns];
};

/// C of 16 rows by `columns`, whose registers are `c` and, for the result, `d`: four for each 8 columns.
void multiply(Warp& w, const Product& x, int depth, int columns, std::span<const Operand> c, std::span<const Operand> d,
              bool adds) {
  for (int row = 0; row < 16; ++row) {
    double sums[kMostColumns] = {};
    for (int k = 0; k < depth; ++k) {
      const double a = x.a[row][k];
      for (int n = 0; n < columns; ++n) sums[n] += a * x.b[k][n];
    }
    for (int n = 0; n < columns; ++n) {
      const auto which =
          static_cast<std::size_t>(n) / 8 * 4 + static_cast<std::size_t>(row) / 8 * 2 + static_cast<std::size_t>(n) % 2;
      const int lane = row % 8 * 4 + n % 8 / 2;
      const double before = adds ? static_cast<double>(w.in<float>(c[which])[lane]) : 0.0;
      w.out<float>(d[which])[lane] = toward_zero(before + sums[n]);
    }
  }
}

/// Registers of A or B: each has two neighbours along k in a word, or one number of 32 bits.
void take_a(Warp& w, std::span<const Operand> of, Float type, Product& x) {
  const bool words = type == Float::kTf32;
  for (std::size_t r = 0; r < of.size(); ++r) {
    const u32* word = w.in<u32>(of[r]);
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + static_cast<int>(r % 2) * 8,
                at = l % 4 * (words ? 1 : 2) + static_cast<int>(r / 2) * (words ? 4 : 8);
      x.a[row][at] = static_cast<double>(widen(type, words ? word[l] : word[l] & 0xffffU));
      if (!words) x.a[row][at + 1] = static_cast<double>(widen(type, word[l] >> 16));
    }
  }
}
void take_b(Warp& w, std::span<const Operand> of, Float type, Product& x) {
  const bool words = type == Float::kTf32;
  for (std::size_t r = 0; r < of.size(); ++r) {
    const u32* word = w.in<u32>(of[r]);
    for (int l = 0; l < kLanes; ++l) {
      const int at = l % 4 * (words ? 1 : 2) + static_cast<int>(r) * (words ? 4 : 8);
      x.b[at][l / 4] = static_cast<double>(widen(type, words ? word[l] : word[l] & 0xffffU));
      if (!words) x.b[at + 1][l / 4] = static_cast<double>(widen(type, word[l] >> 16));
    }
  }
}

/// mma.sync: `detail` is k, `what` the type.
void multiply_warp(Warp& w, const Instruction& i, u32 lanes) {
  if (!w.together(lanes, kAllLanes)) return;
  static thread_local Product x;
  const auto type = static_cast<Float>(i.what);
  take_a(w, i.group(1), type, x);
  take_b(w, i.group(2), type, x);
  multiply(w, x, i.detail, 8, i.group(3), i.group(0), true);
}

/// An element of a matrix in shared memory by its descriptor: index along the rows of 128 bytes, which are along k
/// unless `columns`, and across them.
float element(Warp& w, u64 descriptor, Float type, bool columns, int n, int k) {
  const u64 begin = (descriptor & 0x3fffU) << 4, leading = (descriptor >> 16 & 0x3fffU) << 4,
            eight = (descriptor >> 32 & 0x3fffU) << 4;
  if (descriptor >> 62 != 1) throw Fault("a matrix whose rows are not swizzled by 128 bytes");
  const auto un = static_cast<u64>(n), uk = static_cast<u64>(k);
  const u64 address = columns ? begin + un / 64 * leading + uk / 8 * eight + uk % 8 * 128 + un % 64 * 2
                              : begin + un / 8 * eight + un % 8 * 128 + uk * 2;
  std::uint16_t bits = 0;
  std::memcpy(&bits, w.block.shared_at(address ^ (address >> 7 & 7U) << 4, 2), 2);
  return widen(type, bits);
}

/// wgmma: a warp's 16 rows of the 64.  `detail`: columns.
void multiply_warpgroup(Warp& w, const Instruction& i, u32 lanes) {
  if (!w.together(lanes, kAllLanes)) return;
  static thread_local Product x;
  const auto type = static_cast<Float>(i.what);
  const bool in_registers = i.group(1).size() == 4;
  if (in_registers) {
    take_a(w, i.group(1), type, x);
  } else {
    const u64 a = w.in<u64>(i.operand(1))[0];
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k)
        x.a[row][k] = static_cast<double>(element(w, a, type, false, w.index % 4 * 16 + row, k));
    }
  }
  const u64 b = w.in<u64>(i.operand(2))[0];
  const bool columns = w.in<u32>(i.operand(i.groups - 1))[0] != 0;
  for (int n = 0; n < i.detail; ++n) {
    for (int k = 0; k < 16; ++k) x.b[k][n] = static_cast<double>(element(w, b, type, columns, n, k));
  }
  const bool adds = (w.holds(i.operand(3)) & lanes) != 0;
  multiply(w, x, 16, i.detail, i.group(0), i.group(0), adds);
}

}  // namespace

bool decode_matrices(const std::string& name, Instruction& i) {
  i.letter = has(name, ".trans") ? 't' : '\0';
  if (name.starts_with("ldmatrix.sync.aligned.m8n8") && name.ends_with("b16")) {
    i.run = load_matrices;
    return true;
  }
  if (name.starts_with("stmatrix.sync.aligned.m8n8") && name.ends_with("b16")) {
    i.run = store_matrices;
    return true;
  }
  const Float type = has(name, "bf16.bf16") ? Float::kBf16 : has(name, "f16.f16") ? Float::kF16 : Float::kTf32;
  if (name.starts_with("mma.sync.aligned.m16n8k") && has(name, ".row.col.f32") && name.ends_with(".f32")) {
    i.what = static_cast<int>(type);
    i.detail = std::atoi(name.c_str() + 23);
    i.run = multiply_warp;
    return true;
  }
  if (name.starts_with("wgmma.mma_async.sync.aligned.m64n")) {
    i.what = static_cast<int>(type);
    i.detail = std::atoi(name.c_str() + 33);
    i.run = multiply_warpgroup;
    return true;
  }
  if (name.starts_with("wgmma.")) {
    i.run = nothing;
    return true;
  }
  return false;
}

}  // namespace fovea::emulator
