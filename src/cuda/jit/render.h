#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cuda/jit/request.h"
#include "cuda/spec.h"

// From a spec to the few lines of source that make one kernel of it.
namespace fovea::cuda::jit {

/// A kernel template of the device text, and how its blocks look.
struct Template {
  std::string_view function;   ///< "forward": template <ForwardSpec S> __device__ void forward(const ForwardParams&)
  std::string_view header;     ///< "cuda/kernels/forward.cuh"
  std::string_view spec;       ///< "ForwardSpec"
  std::string_view params;     ///< "ForwardParams"
  int threads = 128;           ///< of a block
  int min_blocks = 1;          ///< on a multiprocessor at once
  int cluster = 1;             ///< blocks that run together
  int shared_bytes = 0;        ///< dynamic
  std::string_view text{};     ///< that the template needs beside its header
  bool arch_specific = false;  ///< `KernelRequest::arch_specific`
  bool early = false;          ///< `KernelRequest::early`, where the architecture has it
};

struct Field {
  std::string name;
  std::string literal;  ///< the value, in C++
  std::string word;     ///< the field in the name of a kernel: "d128", "bf16", "no_async_copy"
};
[[nodiscard]] Field field_of(std::string_view name, bool value);
[[nodiscard]] Field field_of(std::string_view name, int value);
[[nodiscard]] FOVEA_API Field field_of(std::string_view name, Type value);
[[nodiscard]] Field field_of(std::string_view name, Mma value);

template <class Spec>
[[nodiscard]] std::vector<Field> fields_of(const Spec& spec) {
  std::vector<Field> fields;
  each_field(spec, [&](std::string_view name, auto value) { fields.push_back(field_of(name, value)); });
  return fields;
}

/// The unit states every field, the name what differs from `usual`, and always type and head dim.
[[nodiscard]] FOVEA_API KernelRequest render(const Template& kernel, const std::vector<Field>& fields,
                                             const std::vector<Field>& usual, int arch);

template <class Spec>
[[nodiscard]] KernelRequest render(const Template& kernel, const Spec& spec, int arch) {
  return render(kernel, fields_of(spec), fields_of(Spec{}), arch);
}

}  // namespace fovea::cuda::jit
