#include "cuda/jit/render.h"

#include <array>
#include <cstdlib>
#include <utility>

namespace fovea::cuda::jit {
namespace {

constexpr std::array kTypes{"kFloat32", "kFloat16", "kBFloat16"}, kTypeWords{"fp32", "fp16", "bf16"};
constexpr std::array kMmas{"kHalf16", "kHalf8", "kTf32x3", "kTf32x6", "kShuffles"};
constexpr std::array kMmaWords{"half16", "half8", "tf32x3", "tf32x6", "shuffles"};
using Word = std::pair<std::string_view, std::string_view>;
constexpr auto kShort = std::to_array<Word>({{"head_dim", "d"},
                                             {"head_dim_v", "dv"},
                                             {"block_m", "m"},
                                             {"block_n", "n"},
                                             {"warps", "w"},
                                             {"across", "x"},
                                             {"stages", "s"},
                                             {"q_stages", "q"},
                                             {"warpgroups", "g"}});

}  // namespace

Field field_of(std::string_view name, bool value) {
  return {std::string(name), value ? "true" : "false", (value ? "" : "no_") + std::string(name)};
}

Field field_of(std::string_view name, int value) {
  std::string word(name);
  for (const auto& [field, letters] : kShort) {
    if (field == name) word = letters;
  }
  return {std::string(name), std::to_string(value), word + std::to_string(value)};
}

Field field_of(std::string_view name, Type value) {
  const auto i = static_cast<std::size_t>(value);
  const std::string word = kTypeWords.at(i);
  return {std::string(name), std::string("Type::") + kTypes.at(i),
          name == "type" ? word : std::string(name) + "_" + word};
}

Field field_of(std::string_view name, Mma value) {
  const auto i = static_cast<std::size_t>(value);
  return {std::string(name), std::string("Mma::") + kMmas.at(i), kMmaWords.at(i)};
}

KernelRequest render(const Template& kernel, const std::vector<Field>& fields, const std::vector<Field>& usual,
                     int arch) {
  const std::string function(kernel.function), spec(kernel.spec), params(kernel.params);
  KernelRequest request{.name = function,
                        .unit = {},
                        .arch = arch,
                        .arch_specific = kernel.arch_specific,
                        .threads = kernel.threads,
                        .shared_bytes = kernel.shared_bytes,
                        .early = kernel.early && arch >= 90};
  std::string values, dim;
  for (std::size_t i = 0; i < fields.size(); ++i) {
    const Field& field = fields[i];
    values += "    ." + field.name + " = " + field.literal + ",\n";
    if (field.name == "head_dim") dim = field.literal;
    const bool told = field.name == "type" || field.name == "head_dim" ||
                      (field.name == "head_dim_v" ? field.literal != dim : field.literal != usual.at(i).literal);
    if (told) request.name += "_" + field.word;
  }
  if (kernel.arch_specific && std::getenv("FOVEA_RACECHECK") != nullptr) request.unit = "#define FOVEA_RACECHECK\n";
  request.unit += "#include \"" + std::string(kernel.header) + "\"\n\nnamespace fovea::cuda {\n\n" +
                  std::string(kernel.text) + "constexpr " + spec + " kSpec{\n" + values +
                  "};\n\nextern \"C\" __global__ __launch_bounds__(" + std::to_string(kernel.threads) + ", " +
                  std::to_string(kernel.min_blocks) + ") " +
                  (kernel.cluster > 1 ? "__cluster_dims__(" + std::to_string(kernel.cluster) + ") " : "") + "void " +
                  kEntryPoint + "(const __grid_constant__ " + params + " params) {\n  " + function +
                  "<kSpec>(params);\n}\n\n}  // namespace fovea::cuda\n";
  return request;
}

}  // namespace fovea::cuda::jit
