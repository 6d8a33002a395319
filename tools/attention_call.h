#pragma once

#include <fovea/plan.h>

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "files/tensor_data.h"
#include "workload.h"

namespace fovea::tools {

/// The tensors of a call by the names that files and messages use.
template <typename Set>
struct Named {
  const char* name;
  Tensor Set::*tensor;
};
inline constexpr Named<Inputs> kInputNames[] = {
    {"q", &Inputs::q},
    {"k", &Inputs::k},
    {"v", &Inputs::v},
    {"mask", &Inputs::mask},
    {"bias", &Inputs::bias},
    {"alibi_slopes", &Inputs::alibi_slopes},
    {"sink", &Inputs::sink},
    {"q_lengths", &Inputs::q_lengths},
    {"kv_lengths", &Inputs::kv_lengths},
    {"cu_seqlens_q", &Inputs::cu_seqlens_q},
    {"cu_seqlens_kv", &Inputs::cu_seqlens_kv},
    {"dout", &Inputs::dout},
    {"dlse", &Inputs::dlse},
};
inline constexpr Named<Outputs> kOutputNames[] = {
    {"out", &Outputs::out},
    {"lse", &Outputs::lse},
    {"dq", &Outputs::dq},
    {"dk", &Outputs::dk},
    {"dv", &Outputs::dv},
    {"dbias", &Outputs::dbias},
    {"dalibi_slopes", &Outputs::dalibi_slopes},
    {"dsink", &Outputs::dsink},
};

using NamedTensors = std::vector<std::pair<std::string, Tensor>>;

/// Where a call's tensors come from.
struct CallSource {
  std::string file;                           ///< FILE.safetensors, or
  std::map<std::string, std::string> arrays;  ///< tensor name → .npy file, or
  std::string problem;                        ///< a problem line, filled with random numbers
  std::uint64_t seed = 0;                     ///< of those
  std::string options;                        ///< tokens of the problem line, on top of the tensors
  bool gradients = false;
};

/// A call made ready: its problem, its tensors and their memory.
struct AttentionCall {
  Problem problem;  ///< forward, or both directions where gradients are wanted
  Inputs inputs;
  Outputs outputs;
  std::map<std::string, std::string> metadata;  ///< of the file
  std::vector<std::string> unused;              ///< tensors of the file that this call does not read

  std::vector<files::OwnedTensor> storage;
  std::unique_ptr<Workload> workload;

  /// Every fault of the tensors or options is an Error(kInvalidArgument) that starts with the file's name.
  [[nodiscard]] static AttentionCall prepare(const CallSource& source);

  /// Inputs and results as files hold them: by name, in the axis order that --options name.
  [[nodiscard]] NamedTensors given() const;
  [[nodiscard]] NamedTensors results() const;

  [[nodiscard]] std::vector<Allocation> allocations() const;
};

}  // namespace fovea::tools
