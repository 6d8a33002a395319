#pragma once

#include <fovea/nn/array.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace fovea::nn {

/// What training changes.  The gradient is fp32 whatever the dtype of the value; backward adds to it.
struct Parameter {
  Array value;
  Array gradient;  ///< fp32, shape of value; made by the first backward that reaches it

  Parameter() = default;
  Parameter(DType dtype, std::initializer_list<std::int64_t> shape, const Device& device)
      : value(dtype, shape, device) {}

  /// The gradient to add to, zero where no backward has come by yet.
  [[nodiscard]] FOVEA_API const Tensor& gradient_sum();
};

/// Anything that has parameters.  Names are those of torch's state_dict: "self_attn.in_proj_weight".
class FOVEA_API Module {
 public:
  using Visit = std::function<void(const std::string& name, Parameter& parameter)>;

  Module() = default;
  Module(const Module&) = delete;
  Module& operator=(const Module&) = delete;
  Module(Module&&) = default;
  Module& operator=(Module&&) = default;
  virtual ~Module() = default;

  /// Calls visit for every parameter, in torch's order, each name behind `prefix`.
  virtual void visit(const std::string& prefix, const Visit& visit) = 0;
};

/// Every parameter with its name, in torch's order.
[[nodiscard]] FOVEA_API std::vector<std::pair<std::string, Parameter*>> parameters(Module& module);

/// Forgets all gradients.
FOVEA_API void zero_gradients(Module& module);

/// Fills every parameter from a safetensors file whose names are the module's behind `prefix`; F32, F16 and BF16 are
/// converted to the parameter's dtype, to nearest.  Throws Error(kInvalidArgument) with the file and the name where a
/// tensor is absent or of another shape; other tensors of the file are left alone.
FOVEA_API void load(Module& module, const std::string& path, const std::string& prefix = "");

/// Writes every parameter under its name, in its dtype.  All or nothing.
FOVEA_API void save(Module& module, const std::string& path, const std::string& prefix = "");

}  // namespace fovea::nn
