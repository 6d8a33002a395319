#pragma once

#include <fovea/nn/module.h>

#include <vector>

namespace fovea::nn {

/// AdamW (1711.05101), as torch.optim.AdamW.  fp16 and bf16 parameters have an fp32 master copy here, so that steps
/// below their last place are not lost.  Values that are loaded or written between steps, of any dtype, are what the
/// next step begins from.
class FOVEA_API AdamW {
 public:
  struct Options {
    float lr = 1e-3F;    ///< at least 0, as weight_decay
    float beta1 = 0.9F;  ///< in [0, 1), as beta2
    float beta2 = 0.999F;
    float eps = 1e-8F;  ///< above 0
    float weight_decay = 1e-2F;
  };

  /// For the parameters of `module`, which must outlive the AdamW and not be moved.
  explicit AdamW(Module& module) : AdamW(module, Options()) {}
  AdamW(Module& module, const Options& options);

  /// One step along the gradients that backward has summed; parameters without a gradient stay, and so do their counts
  /// of steps.  Gradients stay too: zero_gradients() before the next backward.
  void step();

  void set_learning_rate(float lr);

 private:
  struct Slot {
    Parameter* parameter = nullptr;
    Array mean;              // fp32, shape of the parameter
    Array variance;          // fp32
    Array master;            // fp32, where the parameter is not
    std::int64_t steps = 0;  // with a gradient
  };

  Options options_;
  std::vector<Slot> slots_;
};

}  // namespace fovea::nn
