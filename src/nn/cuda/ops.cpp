#include "nn/cuda/ops.h"

#include <fovea/error.h>

#include <algorithm>

#include "cpu/elements.h"
#include "cuda/driver.h"
#include "dispatch/views.h"
#include "nn/cuda/cublas_lt.h"
#include "nn/cuda/kernels.h"
#include "nn/cuda/memory.h"
#include "nn/layout.h"
#include "problem/refuse.h"

namespace fovea::nn {
namespace {

using math::ceil_div, math::i64;

static_assert(cuda::kRelu == static_cast<int>(Activation::kRelu) && cuda::kGelu == static_cast<int>(Activation::kGelu));
static_assert(static_cast<int>(DType::kFloat16) == static_cast<int>(cuda::Type::kFloat16) &&
              static_cast<int>(DType::kBFloat16) == static_cast<int>(cuda::Type::kBFloat16));
static_assert(static_cast<int>(DType::kBool) == 3 && static_cast<int>(DType::kInt32) == 4);  // in elements.cuh

constexpr i64 kMostParts = 256;  // that the rows of a sum are shared out to

i64 blocks_of(i64 threads) { return ceil_div(threads, cuda::kLayerThreads); }
i64 blocks_of_rows(i64 rows) { return ceil_div(rows, cuda::kRowsOfLayerBlock); }

cuda::LayerRows rows_view(const Tensor& t) {
  if (!t.defined()) return {};
  return {static_cast<char*>(t.data), t.strides[0] * size_bytes(t.dtype)};
}

const char* bytes_of(const Tensor& t) { return static_cast<const char*>(t.data); }

/// Dimensions behind leading ones of size 1.
cuda::LayerView view_of(const Tensor& t) {
  cuda::LayerView view{.data = static_cast<char*>(t.data), .strides = {}, .dtype = static_cast<int>(t.dtype)};
  std::copy_n(t.strides.begin(), t.rank, view.strides + Tensor::kMaxRank - t.rank);
  return view;
}

bool on_gpu(const Tensor& t) { return t.device.kind == DeviceKind::kCuda; }

class CudaOps final : public Ops {
 public:
  explicit CudaOps(int gpu) : gpu_(gpu), kernels_(gpu), products_(gpu) {}

  [[nodiscard]] std::shared_ptr<std::byte> allocate(std::size_t bytes) const override {
    return allocate_on_gpu(gpu_, bytes);
  }
  void clear(void* memory, std::size_t bytes) const override { cuda::fill_async(gpu_, memory, 0, bytes, nullptr); }
  [[nodiscard]] std::size_t peak_bytes(bool forget) const override { return peak_on_gpu(gpu_, forget); }

  void linear(const Tensor& x, const Tensor& w, const Finish& finish, const Tensor& places, const Tensor& y,
              const Tensor& before) const override {
    if (y.shape[0] == 0) return;
    MatrixProduct product{.a = x, .b = w, .d = y, .transpose_b = true};
    if (!finish.changes_gradient() && !before.defined()) {
      product.c = finish.residual;
      product.bias = finish.bias;
      if (products_.multiply(product)) return;
      product.c = product.bias = {};
    }
    multiply(product);
    cuda::FinishParams p = finish_params(y, finish, places, y);
    p.before = rows_view(before);
    p.residual = rows_view(finish.residual);
    p.bias = bytes_of(finish.bias);
    kernels_.launch(KernelName::kFinish, y.dtype, blocks_of_rows(p.rows), p);
  }

  void linear_input_gradient(const Tensor& dy, const Tensor& w, const Tensor& plus, const Tensor& dx) const override {
    if (dx.shape[0] != 0) multiply({.a = dy, .b = w, .d = dx, .c = plus});
  }

  void linear_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& dbias) const override {
    if (dy.shape[0] == 0) return;
    multiply({.a = dy, .b = x, .d = dw, .transpose_a = true, .c = dw});
    if (dbias.defined()) add_rows(dy, dbias);
  }

  void finish_gradient(const Tensor& dy, const Finish& finish, const Tensor& places, const Tensor& before,
                       const Tensor& dz) const override {
    cuda::FinishParams p = finish_params(dy, finish, places, dz);
    if (finish.activation != Activation::kNone) p.before = rows_view(before);
    kernels_.launch(KernelName::kFinishGradient, dy.dtype, blocks_of_rows(p.rows), p);
  }

  void norm(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& y,
            const Tensor& statistics) const override {
    cuda::NormParams p = norm_params(x, weight, statistics);
    p.y = rows_view(y);
    p.bias = bytes_of(bias);
    p.eps = eps;
    kernels_.launch(KernelName::kNorm, x.dtype, blocks_of_rows(p.rows), p);
  }

  void norm_gradient(const Tensor& x, const Tensor& weight, const Tensor& statistics, const Tensor& dy,
                     const Tensor& plus, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) const override {
    cuda::NormParams p = norm_params(x, weight, statistics);
    p.y = rows_view(dy);
    p.plus = rows_view(plus);
    p.dx = rows_view(dx);
    kernels_.launch(KernelName::kNormGradient, x.dtype, blocks_of_rows(p.rows), p);
    sum_columns(dy, x, p.statistics, dbias, dweight);
  }

  void rotate(const Tensor& x, const Rotary& rotary, const Tensor& places, bool back) const override {
    const cuda::RotateParams p{.x = rows_view(x),
                               .places = static_cast<const int*>(places.data),
                               .rows = x.shape[0],
                               .head_stride = x.strides[1] * size_bytes(x.dtype),
                               .heads = static_cast<int>(x.shape[1]),
                               .dim = static_cast<int>(rotary.dim),
                               .base = rotary.base,
                               .interleaved = rotary.interleaved,
                               .back = back};
    kernels_.launch(KernelName::kRotate, x.dtype, blocks_of(p.rows * (rotary.dim / 2)), p);
  }

  void copy(const Tensor& from, const Tensor& to) const override {
    if (cpu::element_count(to) == 0) return;
    if (!on_gpu(from)) return upload(from, to);
    if (!on_gpu(to)) return download(from, to);
    pointwise(cuda::Pointwise::kCopy, from, {}, to);
  }

  void place_rows(const Tensor& cu_seqlens, i64 batch, bool interleaved, const Tensor& places) const override {
    const cuda::PlaceParams p{.ends = static_cast<const int*>(cu_seqlens.data),
                              .places = static_cast<int*>(places.data),
                              .rows = places.shape[0],
                              .batch = batch,
                              .interleaved = interleaved};
    kernels_.launch(KernelName::kPlaceRows, DType::kFloat32, blocks_of(p.rows), p);
  }

  void keep_of(const Tensor& ignore, const Tensor& keep) const override {
    pointwise(cuda::Pointwise::kNot, ignore, {}, keep);
  }
  void bias_of(const Tensor& ignore, const Tensor& bias) const override {
    pointwise(cuda::Pointwise::kHide, ignore, {}, bias);
  }

  [[nodiscard]] bool lengths_of(const Tensor& ignore, const Tensor& lengths) const override {
    const cuda::LengthsParams p{.ignore = static_cast<const unsigned char*>(ignore.data),
                                .lengths = static_cast<int*>(lengths.data),
                                .batch_stride = ignore.strides[0],
                                .key_stride = ignore.strides[1],
                                .batch = static_cast<int>(ignore.shape[0]),
                                .keys = static_cast<int>(ignore.shape[1])};
    kernels_.launch(KernelName::kLengths, DType::kFloat32, blocks_of(ignore.shape[0] * cuda::kLanes), p);
    return false;  // whether there are holes as well, only the device knows
  }

  void add(const Tensor& a, const Tensor& b, const Tensor& sum) const override {
    pointwise(cuda::Pointwise::kAdd, a, b, sum);
  }

  void mean_of_heads(const Tensor& x, const Tensor& mean) const override {
    Tensor first = x;  // head 0 of each row, as mean lies: the kernel walks the others
    first.rank = 3;
    first.shape = {x.shape[0], x.shape[1], x.shape[3]};
    first.strides = {x.strides[0], x.strides[1], x.strides[3]};
    pointwise(cuda::Pointwise::kMean, first, {}, mean, x.shape[2], x.strides[2]);
  }

  void weight_of_zero(const Tensor& lse, const Tensor& weight) const override {
    pointwise(cuda::Pointwise::kWeightOfZero, lse, {}, weight);
  }

  void diagonal(const Tensor& x, i64 first) const override {
    pointwise(cuda::Pointwise::kDiagonal, {}, {}, x, 0, first);
  }

  void add_rows(const Tensor& x, const Tensor& sum) const override { sum_columns(x, {}, nullptr, sum, {}); }

  void squares(const Tensor& x, const Tensor& target, float share, const Tensor& losses,
               const Tensor& dx) const override {
    cuda::LossParams p = loss_params(x, share, losses, dx);
    p.target = rows_view(target);
    kernels_.launch(KernelName::kSquares, x.dtype, blocks_of_rows(p.rows), p);
  }

  void entropies(const Tensor& x, const Tensor& classes, float share, const Tensor& losses,
                 const Tensor& dx) const override {
    cuda::LossParams p = loss_params(x, share, losses, dx);
    p.classes = static_cast<const int*>(classes.data);
    kernels_.launch(KernelName::kEntropies, x.dtype, blocks_of_rows(p.rows), p);
  }

  void adamw(const AdamWStep& s) const override {
    const AdamWRates rates = rates_of(s);
    const Tensor& kept = s.master.defined() ? s.master : s.value;
    const cuda::AdamWParams p{.gradient = static_cast<const float*>(s.gradient.data),
                              .mean = static_cast<float*>(s.mean.data),
                              .variance = static_cast<float*>(s.variance.data),
                              .master = static_cast<float*>(kept.data),
                              .value = static_cast<char*>(s.value.data),
                              .count = cpu::element_count(s.value),
                              .beta1 = s.beta1,
                              .beta2 = s.beta2,
                              .rate = rates.rate,
                              .spread = rates.spread,
                              .decay = rates.decay,
                              .eps = s.eps};
    kernels_.launch(KernelName::kAdamW, s.value.dtype, blocks_of(p.count), p);
  }

 private:
  void multiply(const MatrixProduct& p) const {
    if (products_.multiply(p)) return;
    throw Error(ErrorCode::kUnsupported, "cuBLASLt has no product of [" + join(shape_of(p.a), ", ") + "] and [" +
                                             join(shape_of(p.b), ", ") + "] in " + name(p.a.dtype) +
                                             " on this GPU; name another one in FOVEA_CUBLASLT");
  }

  [[nodiscard]] static cuda::FinishParams finish_params(const Tensor& in, const Finish& finish, const Tensor& places,
                                                        const Tensor& out) {
    return {.in = rows_view(in),
            .out = rows_view(out),
            .before = {},
            .residual = {},
            .bias = nullptr,
            .places = static_cast<const int*>(places.data),
            .rows = out.shape[0],
            .columns = static_cast<int>(out.shape[1]),
            .activation = static_cast<int>(finish.activation),
            .keep_threshold = dispatch::keep_threshold(finish.dropout.probability),
            .seed = finish.dropout.seed,
            .offset = finish.dropout.offset};
  }

  [[nodiscard]] static cuda::NormParams norm_params(const Tensor& x, const Tensor& weight, const Tensor& statistics) {
    return {.x = rows_view(x),
            .y = {},
            .plus = {},
            .dx = {},
            .weight = bytes_of(weight),
            .bias = nullptr,
            .statistics = static_cast<float*>(statistics.data),
            .rows = x.shape[0],
            .columns = static_cast<int>(x.shape[1]),
            .eps = 0.0F};
  }

  [[nodiscard]] static cuda::LossParams loss_params(const Tensor& x, float share, const Tensor& losses,
                                                    const Tensor& dx) {
    return {.x = rows_view(x),
            .target = {},
            .dx = rows_view(dx),
            .classes = nullptr,
            .losses = static_cast<float*>(losses.data),
            .rows = x.shape[0],
            .columns = static_cast<int>(x.shape[1]),
            .share = share};
  }

  /// sum += the rows of x; with the statistics of a norm of `norm_x`, normed_sum += those of x · normed.
  void sum_columns(const Tensor& x, const Tensor& norm_x, const float* statistics, const Tensor& sum,
                   const Tensor& normed_sum) const {
    const i64 rows = x.shape[0], columns = x.shape[1];
    if (rows == 0) return;
    const i64 rows_of_part = ceil_div(ceil_div(rows, cuda::kRowsOfSum), kMostParts) * cuda::kRowsOfSum;
    const i64 parts = ceil_div(rows, rows_of_part), kinds = statistics == nullptr ? 1 : 2;
    const auto memory = allocate(static_cast<std::size_t>(parts * kinds * columns) * sizeof(double));
    auto* const sums = reinterpret_cast<double*>(memory.get());
    const cuda::ColumnSumParams p{.x = rows_view(x),
                                  .norm_x = rows_view(norm_x),
                                  .statistics = statistics,
                                  .parts = sums,
                                  .rows = rows,
                                  .rows_of_part = rows_of_part,
                                  .columns = static_cast<int>(columns)};
    kernels_.launch(KernelName::kColumnSums, x.dtype, ceil_div(columns, cuda::kColumnsOfSum), p, parts);
    const auto add_up = [&](const Tensor& to, i64 kind) {
      if (!to.defined()) return;
      const cuda::AddUpParams q{.parts = sums + kind * columns,
                                .sum = static_cast<float*>(to.data),
                                .stride = kinds * columns,
                                .count = parts,
                                .columns = p.columns};
      kernels_.launch(KernelName::kAddUp, DType::kFloat32, blocks_of(columns), q);
    };
    add_up(sum, 0);
    add_up(normed_sum, 1);
  }

  /// to = op(a, b), of to's shape.
  void pointwise(cuda::Pointwise op, const Tensor& a, const Tensor& b, const Tensor& to, i64 terms = 0,
                 i64 term_stride = 0) const {
    cuda::PointwiseParams p{.to = view_of(to),
                            .a = view_of(a),
                            .b = view_of(b),
                            .shape = {1, 1, 1, 1},
                            .count = cpu::element_count(to),
                            .op = op,
                            .terms = terms,
                            .term_stride = term_stride};
    std::copy_n(to.shape.begin(), to.rank, p.shape + Tensor::kMaxRank - to.rank);
    kernels_.launch(KernelName::kPointwise, DType::kFloat32, blocks_of(p.count), p);
  }

  /// From the host, converted there.
  void upload(const Tensor& from, const Tensor& to) const {
    const Array host = Array::unset(to.dtype, shape_of(to));
    ops_of({}).copy(from, host.view());
    if (to.dtype == DType::kInt32 && dense(to)) return put(host, static_cast<int*>(to.data));
    const Array target = dense(to) ? Array() : Array::unset(to.dtype, shape_of(to), to.device);
    cuda::copy_async(gpu_, target.defined() ? target.view().data : to.data, host.view().data, host.size_bytes(),
                     nullptr);
    if (target.defined()) pointwise(cuda::Pointwise::kCopy, target.view(), {}, to);
    cuda::synchronize(gpu_);  // before the host's copy goes
  }

  void put(const Array& host, int* to) const {
    const auto* words = static_cast<const int*>(host.view().data);
    const i64 count = cpu::element_count(host.view());
    for (i64 first = 0; first < count; first += cuda::kWordsOfLaunch) {
      cuda::PutParams p{
          .to = to + first, .count = static_cast<int>(std::min<i64>(count - first, cuda::kWordsOfLaunch)), .words = {}};
      std::copy_n(words + first, p.count, p.words);
      kernels_.launch(KernelName::kPut, DType::kFloat32, 1, p);
    }
  }

  void download(const Tensor& from, const Tensor& to) const {
    const Array source = dense(from) ? Array() : Array::unset(from.dtype, shape_of(from), from.device);
    if (source.defined()) pointwise(cuda::Pointwise::kCopy, from, {}, source.view());
    const Array host = Array::unset(from.dtype, shape_of(from));
    cuda::copy_async(gpu_, host.view().data, source.defined() ? source.view().data : from.data, host.size_bytes(),
                     nullptr);
    cuda::synchronize(gpu_);
    ops_of({}).copy(host.view(), to);
  }

  int gpu_;
  Kernels kernels_;
  CublasLt products_;
};

}  // namespace

std::unique_ptr<const Ops> make_cuda_ops(int gpu) { return std::make_unique<CudaOps>(gpu); }

}  // namespace fovea::nn
