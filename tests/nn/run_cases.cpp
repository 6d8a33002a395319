// usage: fovea_nn_cases DEVICE IN.safetensors OUT.safetensors [PARAMETERS_FOLDER]
// Runs every case of IN on cpu or cuda and writes CASE/RESULT; the parameters, as loaded and saved again, to
// PARAMETERS_FOLDER/CASE.
#include <cstdio>
#include <exception>
#include <string_view>

#include "tests/nn/cases.h"

int main(int count, char** words) {
  if (count < 4) {
    std::fputs("usage: fovea_nn_cases DEVICE IN.safetensors OUT.safetensors [PARAMETERS_FOLDER]\n", stderr);
    return 2;
  }
  try {
    const bool on_gpu = std::string_view(words[1]) == "cuda";
    const fovea::Device device{on_gpu ? fovea::DeviceKind::kCuda : fovea::DeviceKind::kCpu};
    const auto file = fovea::files::SafetensorsFile::open(words[2]);
    std::vector<std::pair<std::string, fovea::Tensor>> tensors;
    std::vector<fovea::test::Results> kept;
    for (const auto& [name, unused] : file.metadata()) {
      kept.push_back(
          fovea::test::run_case(words[2], name, device, count > 4 ? std::string(words[4]) + "/" + name : ""));
      for (const auto& [what, array] : kept.back()) tensors.emplace_back(name + "/" + what, array.view());
    }
    fovea::files::write_safetensors(words[3], tensors);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fovea_nn_cases: %s\n", error.what());
    return 1;
  }
  return 0;
}
