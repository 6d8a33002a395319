#pragma once

#include <fovea/nn/array.h>

// What training makes smaller.  Results are on the inputs' device: copy() brings the number to the host.
namespace fovea::nn {

/// fp32 [1]: the mean of (out − target)² over all elements.  dout, like out, becomes its gradient.  All [..., features]
/// with rows evenly spaced, of one dtype.
[[nodiscard]] FOVEA_API Array mean_square(const Tensor& out, const Tensor& target, const Tensor& dout);

/// fp32 [1]: the mean over rows of −log softmax(logits)[class].  logits [..., classes]; classes int32, one for each
/// row, dense and on the same device; a class that is not there, −1 say, leaves its row out of the sum.  dlogits, like
/// logits, becomes the gradient.
[[nodiscard]] FOVEA_API Array cross_entropy(const Tensor& logits, const Tensor& classes, const Tensor& dlogits);

}  // namespace fovea::nn
