#pragma once

#include <fovea/nn/module.h>

namespace fovea::nn {

/// y = x Wᵀ + b, as torch.nn.Linear.  Parameters: weight [out_features, in_features], bias [out_features].
class FOVEA_API Linear : public Module {
 public:
  struct Options {
    std::int64_t in_features = 0;   ///< at least 1
    std::int64_t out_features = 0;  ///< at least 1
    bool bias = true;
    DType dtype = DType::kFloat32;  ///< fp32, fp16 or bf16; of x and y too
    Device device{};
    std::uint64_t seed = 0;  ///< of the initial values: uniform within ±1/√in_features, both, as torch's
  };

  explicit Linear(const Options& options);

  /// x [..., in_features], one to four dimensions; gives [..., out_features].
  [[nodiscard]] Array forward(const Tensor& x) const;

  /// The gradient of x out of dy [..., out_features]; adds to the parameters' gradients.  `x` is forward's.
  [[nodiscard]] Array backward(const Tensor& x, const Tensor& dy);

  void visit(const std::string& prefix, const Visit& visit) override;
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  Parameter weight;
  Parameter bias;  ///< undefined where options.bias is false

 private:
  Options options_;
};

}  // namespace fovea::nn
