#include "cuda/jit/wgmma_text.h"

#include <set>

namespace fovea::cuda::jit {
namespace {

/// "item(first), item(first + 1), …": `count` of them.
template <class Item>
std::string list(int first, int count, const Item& item) {
  std::string text;
  for (int i = first; i < first + count; ++i) text += (text.empty() ? "" : ", ") + item(i);
  return text;
}
std::string operand(int i) { return "%" + std::to_string(i); }

/// One product.  Operands of the instruction: the result, A, B's place, and whether something is there to add to.
std::string product(const char* name, const char* type, int columns, bool a_in_registers) {
  const int registers = columns / 2, a = registers, b = a + (a_in_registers ? 4 : 1), add = b + 1;
  const std::string results = list(
      0, registers, [](int i) { return "\"+f\"(c[" + std::to_string(i / 4) + "].x[" + std::to_string(i % 4) + "])"; });
  const std::string values = a_in_registers ? list(0, 4, [](int i) { return "\"r\"(a.x[" + std::to_string(i) + "])"; })
                                            : std::string("\"l\"(a)");
  return std::string("  static FOVEA_DEVICE void ") + name + "(Accumulator (&c)[" + std::to_string(columns / 8) +
         "], " + (a_in_registers ? "const OperandA& a" : "u64 a") + ", u64 b, int add) {\n    asm volatile(\n" +
         "        \"{ .reg .pred more; setp.ne.b32 more, " + operand(add) + ", 0;\\n\"\n" +
         "        \"wgmma.mma_async.sync.aligned.m64n" + std::to_string(columns) + "k16.f32." + type + "." + type +
         " \"\n" + "        \"{" + list(0, registers, operand) + "}, \"\n" + "        \"" +
         (a_in_registers ? "{" + list(a, 4, operand) + "}" : operand(a)) + ", " + operand(b) + ", more, 1, 1, " +
         (a_in_registers ? "1" : "0, 0") + "; }\"\n" + "        : " + results + "\n        : " + values +
         ", \"l\"(b), \"r\"(add)\n        : \"memory\");\n  }\n";
}

}  // namespace

std::string wgmma_text(Type type, std::initializer_list<int> columns) {
  const bool half = type == Type::kFloat16;
  std::string text;
  for (const int width : std::set<int>(columns)) {
    text += "template <>\nstruct Wgmma<Type::" + std::string(half ? "kFloat16" : "kBFloat16") + ", " +
            std::to_string(width) + "> {\n" + product("by_rows", half ? "f16" : "bf16", width, false) +
            product("by_columns", half ? "f16" : "bf16", width, true) + "};\n\n";
  }
  return text;
}

}  // namespace fovea::cuda::jit
