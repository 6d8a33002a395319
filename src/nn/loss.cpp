#include <fovea/nn/loss.h>

#include <algorithm>

#include "nn/layout.h"
#include "problem/refuse.h"

namespace fovea::nn {
namespace {

/// The rows of a tensor that is written to.
Tensor rows_in_place(const char* name, const Tensor& t) {
  Array copied;
  const Tensor rows = as_rows(t, copied);
  if (copied.size_bytes() > 0) refuse(name, " is ", shape_text(t), " with rows that are not evenly spaced");
  return rows;
}

/// Sums what `loss` gives for each row.
template <class Loss>
Array sum_of_rows(const Tensor& x, std::int64_t rows, const Loss& loss) {
  const Array each = Array::unset(DType::kFloat32, {rows, 1}, x.device);
  Array sum(DType::kFloat32, {1}, x.device);
  loss(each.view());
  if (rows > 0) ops_of(x.device).add_rows(each.view(), sum.view());
  return sum;
}

}  // namespace

Array mean_square(const Tensor& out, const Tensor& target, const Tensor& dout) {
  return or_out_of_memory([&] {
    const std::int64_t features = out.rank == 0 ? 0 : out.shape[out.rank - 1];
    check_features("target", target, features, out.dtype, out.device);
    check_features("dout", dout, features, out.dtype, out.device);
    check_same_rows("target", target, "out", out);
    check_same_rows("dout", dout, "out", out);
    Array dense, dense_target;
    const Tensor x = as_rows(out, dense);
    const float share = 1.0F / static_cast<float>(std::max<std::int64_t>(1, x.shape[0] * features));
    return sum_of_rows(out, x.shape[0], [&](const Tensor& losses) {
      ops_of(out.device).squares(x, as_rows(target, dense_target), share, losses, rows_in_place("dout", dout));
    });
  });
}

Array cross_entropy(const Tensor& logits, const Tensor& classes, const Tensor& dlogits) {
  return or_out_of_memory([&] {
    check_features("dlogits", dlogits, logits.rank == 0 ? 0 : logits.shape[logits.rank - 1], logits.dtype,
                   logits.device);
    check_same_rows("dlogits", dlogits, "logits", logits);
    Array dense;
    const Tensor x = as_rows(logits, dense);
    std::int64_t count = classes.rank == 0 ? 0 : 1;
    for (int i = 0; i < classes.rank; ++i) count *= classes.shape[i];
    if (classes.dtype != DType::kInt32 || count != x.shape[0] || classes.device.kind != logits.device.kind) {
      refuse("classes is ", fovea::name(classes.dtype), " ", shape_text(classes), " on ", fovea::name(classes.device),
             " but must be int32, one for each of the ", x.shape[0], " rows, on ", fovea::name(logits.device));
    }
    const float share = 1.0F / static_cast<float>(std::max<std::int64_t>(1, x.shape[0]));
    return sum_of_rows(logits, x.shape[0], [&](const Tensor& losses) {
      ops_of(logits.device).entropies(x, classes, share, losses, rows_in_place("dlogits", dlogits));
    });
  });
}

}  // namespace fovea::nn
