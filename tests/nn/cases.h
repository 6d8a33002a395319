#pragma once

#include <fovea/nn/nn.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "files/safetensors.h"

// Layers as a file describes them: its metadata has one JSON object a case, its tensors are CASE/weight/NAME,
// CASE/query, CASE/key, CASE/value, CASE/dout and the masks; tests/nn/torch_cases.py writes such files.
namespace fovea::test {

/// Everything that a case's forward and backward gave: out, weights, dquery, dkey, dvalue, grad/NAME, all fp32.
using Results = std::map<std::string, nn::Array>;

/// Runs one case on a device.  `saved`, where not empty, is a file to which the layer's parameters are written before.
[[nodiscard]] Results run_case(const std::string& path, const std::string& name, const Device& device = {},
                               const std::string& saved = "");

}  // namespace fovea::test
