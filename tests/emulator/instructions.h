#pragma once

#include "tests/emulator/ptx.h"

// The kinds of instructions; each says whether it knows a name, and then sets what runs it.
namespace fovea::emulator {

bool decode_arithmetic(const std::string& name, Instruction& instruction);
bool decode_memory(const std::string& name, Instruction& instruction);
bool decode_matrices(const std::string& name, Instruction& instruction);
bool decode_together(const std::string& name, Instruction& instruction);

}  // namespace fovea::emulator
