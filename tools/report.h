#pragma once

#include <fovea/plan.h>

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "terminal.h"

namespace fovea::tools {

/// Who runs a problem, how, and why the others do not: lines for people.
[[nodiscard]] std::string report_text(const Terminal& terminal, const Report& report);

/// The same for programs: {problem, device, backend or null, details, workspace_bytes, verdicts: [{backend, available,
/// reasons}]}.
[[nodiscard]] nlohmann::ordered_json report_json(const Report& report);

/// JSON as text, indented; bytes of names that are no UTF-8 are replaced.
[[nodiscard]] std::string json_text(const nlohmann::ordered_json& json);

}  // namespace fovea::tools
