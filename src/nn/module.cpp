#include <fovea/nn/module.h>

#include "files/safetensors.h"
#include "nn/layout.h"
#include "problem/refuse.h"

namespace fovea::nn {

const Tensor& Parameter::gradient_sum() {
  if (value.defined() && !gradient.defined()) {
    gradient = Array(DType::kFloat32, shape_of(value.view()), value.view().device);
  }
  return gradient.view();
}

std::vector<std::pair<std::string, Parameter*>> parameters(Module& module) {
  std::vector<std::pair<std::string, Parameter*>> all;
  const auto add = [&](const std::string& name, Parameter& parameter) { all.emplace_back(name, &parameter); };
  or_out_of_memory([&] { module.visit("", add); });
  return all;
}

void zero_gradients(Module& module) {
  or_out_of_memory(
      [&] { module.visit("", [](const std::string&, Parameter& parameter) { parameter.gradient = {}; }); });
}

void load(Module& module, const std::string& path, const std::string& prefix) {
  or_out_of_memory([&] {
    const auto file = files::SafetensorsFile::open(path);
    // Read and compared first, so that a bad file changes nothing.
    std::vector<std::pair<files::OwnedTensor, Tensor>> read;
    module.visit(prefix, [&](const std::string& name, Parameter& parameter) {
      const Tensor& to = parameter.value.view();
      files::OwnedTensor from = file.load(name);
      const Tensor& got = from.view();
      if (got.rank != to.rank || got.shape != to.shape) {
        refuse(path, ": '", name, "' is ", shape_text(got), " but the module's is ", shape_text(to));
      }
      if (got.dtype != DType::kFloat32 && got.dtype != DType::kFloat16 && got.dtype != DType::kBFloat16) {
        refuse(path, ": '", name, "' is ", fovea::name(got.dtype), " but parameters are F32, F16 or BF16");
      }
      read.emplace_back(std::move(from), to);
    });
    for (const auto& [from, to] : read) copy(from.view(), to);
  });
}

void save(Module& module, const std::string& path, const std::string& prefix) {
  or_out_of_memory([&] {
    std::vector<std::pair<std::string, Tensor>> tensors;
    std::vector<Array> hosts;
    module.visit(prefix, [&](const std::string& name, Parameter& parameter) {
      Tensor value = parameter.value.view();
      if (value.device.kind != DeviceKind::kCpu) {
        hosts.push_back(Array::unset(value.dtype, shape_of(value)));
        copy(value, hosts.back().view());
        value = hosts.back().view();
      }
      tensors.emplace_back(name, value);
    });
    files::write_safetensors(path, tensors, {{"format", "pt"}});
  });
}

}  // namespace fovea::nn
