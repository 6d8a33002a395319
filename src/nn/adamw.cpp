#include <fovea/nn/adamw.h>

#include "nn/layout.h"
#include "nn/options.h"

namespace fovea::nn {

AdamW::AdamW(Module& module, const Options& options) : options_(options) {
  or_out_of_memory([&] {
    check_not_negative("lr", options.lr);
    check_not_negative("weight_decay", options.weight_decay);
    check_positive("eps", options.eps);
    const auto check_beta = [](const char* name, float beta) {
      check_real(name, beta, beta >= 0 && beta < 1, "at least 0 and less than 1");
    };
    check_beta("beta1", options.beta1);
    check_beta("beta2", options.beta2);
    for (const auto& [name, parameter] : parameters(module)) {
      const Tensor& value = parameter->value.view();
      const auto zeros = [&] { return Array(DType::kFloat32, shape_of(value), value.device); };
      slots_.push_back({parameter, zeros(), zeros(), value.dtype == DType::kFloat32 ? Array() : zeros()});
    }
  });
}

void AdamW::set_learning_rate(float lr) {
  check_not_negative("lr", lr);
  options_.lr = lr;
}

void AdamW::step() {
  or_out_of_memory([&] {
    for (const Slot& slot : slots_) {
      const Tensor &value = slot.parameter->value.view(), &gradient = slot.parameter->gradient.view();
      const Tensor& mean = slot.mean.view();
      const auto like_mean = [&](const Tensor& t) {
        return t.rank == mean.rank && t.shape == mean.shape && t.device == mean.device;
      };
      if (!gradient.defined()) continue;
      if (!like_mean(value) || (value.dtype == DType::kFloat32) == slot.master.defined()) {
        refuse("a parameter of shape ", shape_text(mean), " has become ", name(value.dtype), " ", shape_text(value),
               " on ", name(value.device), " since its AdamW was made; make another AdamW");
      }
      if (!like_mean(gradient) || gradient.dtype != DType::kFloat32) {
        refuse("the gradient of a parameter of shape ", shape_text(mean), " is ", name(gradient.dtype), " ",
               shape_text(gradient), " on ", name(gradient.device), " but must be fp32, of its shape and device");
      }
    }
    for (Slot& slot : slots_) {
      if (!slot.parameter->gradient.defined()) continue;
      const Tensor& value = slot.parameter->value.view();
      ops_of(value.device)
          .adamw({.value = value,
                  .gradient = slot.parameter->gradient.view(),
                  .mean = slot.mean.view(),
                  .variance = slot.variance.view(),
                  .master = slot.master.view(),
                  .lr = options_.lr,
                  .beta1 = options_.beta1,
                  .beta2 = options_.beta2,
                  .eps = options_.eps,
                  .weight_decay = options_.weight_decay,
                  .step = ++slot.steps});
    }
  });
}

}  // namespace fovea::nn
