#pragma once

#include <fovea/nn/module.h>

namespace fovea::nn {

/// y = (x − mean(x)) / √(var(x) + eps) · weight + bias over the last dimension (1607.06450), as torch.nn.LayerNorm.
class FOVEA_API LayerNorm : public Module {
 public:
  struct Options {
    std::int64_t features = 0;  ///< at least 1
    float eps = 1e-5F;          ///< above 0
    bool bias = true;
    DType dtype = DType::kFloat32;  ///< fp32, fp16 or bf16; of x and y too
    Device device{};
  };

  explicit LayerNorm(const Options& options);

  /// x [..., features], one to four dimensions.  `statistics`, where wanted, becomes fp32 [rows, 2]: mean and
  /// 1 / √(var + eps) of each row, which backward takes.
  [[nodiscard]] Array forward(const Tensor& x, Array* statistics = nullptr) const;

  /// The gradient of x, with `plus` added where it is defined; adds to the parameters' gradients.
  [[nodiscard]] Array backward(const Tensor& x, const Array& statistics, const Tensor& dy, const Tensor& plus = {});

  void visit(const std::string& prefix, const Visit& visit) override;
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  Parameter weight;
  Parameter bias;  ///< undefined where options.bias is false

 private:
  Options options_;
};

}  // namespace fovea::nn
