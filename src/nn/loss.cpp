#include <fovea/nn/loss.h>

#include <algorithm>

#include "nn/layout.h"
#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea::nn {
namespace {

/// Refuses what no loss is made of; gives the features.
std::int64_t check_floats(const char* name, const Tensor& x) {
  if (x.dtype == DType::kBool || x.dtype == DType::kInt32) {
    refuse(name, " is ", fovea::name(x.dtype), " but must be fp32, fp16 or bf16");
  }
  const std::int64_t features = x.rank == 0 ? 0 : x.shape[x.rank - 1];
  check_features(name, x, features, x.dtype, x.device);
  return features;
}

/// Refuses all but one number for each row, each behind the last: kernels step through them.
void check_classes(const Tensor& classes, std::int64_t rows, const Device& device) {
  std::int64_t count = classes.rank == 0 ? 0 : 1;
  bool known = classes.rank >= 0 && classes.rank <= Tensor::kMaxRank;  // and a number of 64 bits
  for (int i = 0; known && i < classes.rank; ++i)
    known = !__builtin_mul_overflow(count, std::max<std::int64_t>(0, classes.shape[i]), &count);
  if (classes.dtype != DType::kInt32 || !known || count != rows) {
    refuse("classes is ", name(classes.dtype), " ", shape_text(classes), " but must be int32, one for each of the ",
           rows, " rows");
  }
  check_device("classes", classes.device, "logits is on", device);
  if (!dense(classes)) {
    refuse("classes is ", shape_text(classes), ", its elements not one behind the other; make it contiguous");
  }
  check_memory("classes", classes, Use::kInput);
}

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
    const std::int64_t features = check_floats("out", out);
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
    check_features("dlogits", dlogits, check_floats("logits", logits), logits.dtype, logits.device);
    check_same_rows("dlogits", dlogits, "logits", logits);
    Array dense;
    const Tensor x = as_rows(logits, dense);
    check_classes(classes, x.shape[0], logits.device);
    const float share = 1.0F / static_cast<float>(std::max<std::int64_t>(1, x.shape[0]));
    return sum_of_rows(logits, x.shape[0], [&](const Tensor& losses) {
      ops_of(logits.device).entropies(x, classes, share, losses, rows_in_place("dlogits", dlogits));
    });
  });
}

}  // namespace fovea::nn
