#include "report.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

namespace fovea::tools {

std::string report_text(const Terminal& terminal, const Report& report) {
  std::string text;
  if (report.backend.empty()) {
    text += labelled(terminal, "runs on",
                     terminal.paint(Ink::kBad, "nobody: no backend takes it on " + name(report.device)));
  } else {
    const bool first = report.verdicts.empty() || report.verdicts.front().backend == report.backend;
    text += labelled(terminal, "runs on",
                     fmt::format("{}  {}", terminal.paint(Ink::kAccent, report.backend),
                                 terminal.paint(Ink::kDim, first ? "first choice" : "first that takes it")));
    std::string details;
    for (const auto& [key, value] : report.details)
      details += fmt::format("{}{} {}", details.empty() ? "" : ", ", key, value);
    if (!details.empty()) text += labelled(terminal, "", details);
    text += labelled(terminal, "workspace", bytes_text(static_cast<double>(report.workspace_bytes)));
  }
  std::string able;
  const char* label = "not";
  for (const Verdict& verdict : report.verdicts) {
    if (verdict.backend == report.backend) continue;
    if (verdict.reasons.empty()) {
      able += (able.empty() ? "" : ", ") + verdict.backend;
    } else {
      text += labelled(terminal, label, fmt::format("{}: {}", verdict.backend, fmt::join(verdict.reasons, ", ")));
      label = "";
    }
  }
  if (!able.empty()) text += labelled(terminal, "also able", able);
  return text;
}

nlohmann::ordered_json report_json(const Report& report) {
  nlohmann::ordered_json json;
  json["problem"] = to_string(report.problem);
  json["device"] = name(report.device);
  json["backend"] = report.backend.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(report.backend);
  json["details"] = nlohmann::ordered_json::object();
  for (const auto& [key, value] : report.details) json["details"][key] = value;
  json["workspace_bytes"] = report.workspace_bytes;
  json["verdicts"] = nlohmann::ordered_json::array();
  for (const Verdict& verdict : report.verdicts) {
    json["verdicts"].push_back(
        {{"backend", verdict.backend}, {"available", verdict.available}, {"reasons", verdict.reasons}});
  }
  return json;
}

std::string json_text(const nlohmann::ordered_json& json) {
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace fovea::tools
