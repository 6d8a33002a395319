#include "nn/cpu/product.h"

#include <fovea/error.h>

#include <oneapi/dnnl/dnnl.hpp>
#include <string>

// Of the OpenMP that oneDNN may have been built with; null where it was not.  fovea shares work out by itself, so
// inside its tasks a product takes one thread: no second pool beside oneTBB's, and none to wait for after fork.
extern "C" {
[[gnu::weak]] int omp_get_max_threads();
[[gnu::weak]] void omp_set_num_threads(int threads);
}

namespace fovea::nn {
namespace {

class OneThread {
 public:
  OneThread() {
    if (omp_get_max_threads == nullptr || omp_set_num_threads == nullptr) return;
    before_ = omp_get_max_threads();
    if (before_ != 1) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (before_ > 1) omp_set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
  OneThread(OneThread&&) = delete;
  OneThread& operator=(OneThread&&) = delete;

 private:
  int before_ = 1;
};

[[noreturn]] void fail(const std::string& reason) {
  throw Error(ErrorCode::kDevice, "oneDNN could not multiply (" + reason + "); please report it with its version, " +
                                      std::to_string(dnnl_version()->major) + "." +
                                      std::to_string(dnnl_version()->minor));
}

const dnnl::engine& engine() {
  static const auto& cpu = *std::make_unique<const dnnl::engine>(dnnl::engine::kind::cpu, 0).release();
  return cpu;
}

/// How rows × columns lie in memory, stored as they are or transposed.
dnnl::memory::desc matrix(dnnl::memory::data_type type, std::int64_t rows, std::int64_t columns, std::int64_t ld,
                          bool transposed) {
  const dnnl::memory::dims strides = transposed ? dnnl::memory::dims{1, ld} : dnnl::memory::dims{ld, 1};
  return {{rows, columns}, type, strides};
}

dnnl::matmul::primitive_desc describe(const ProductShape& s) {
  constexpr auto kBf16 = dnnl::memory::data_type::bf16;
  const auto a = matrix(kBf16, s.m, s.k, s.lda, s.transpose_a), b = matrix(kBf16, s.k, s.n, s.ldb, s.transpose_b);
  const auto c = matrix(dnnl::memory::data_type::f32, s.m, s.n, s.ldc, false);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if (s.accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0F);
    attributes.set_post_ops(sum);
  }
#if DNNL_VERSION_MAJOR >= 3
  return {engine(), a, b, c, attributes};
#else
  return {{a, b, c}, attributes, engine()};
#endif
}

}  // namespace

bool multiplies_bf16() {
  static const bool answer = [] {
    try {
      for (const bool transpose : {false, true}) {
        const auto product = describe({.transpose_a = transpose,
                                       .transpose_b = !transpose,
                                       .m = 64,
                                       .n = 64,
                                       .k = 64,
                                       .lda = 64,
                                       .ldb = 64,
                                       .ldc = 64,
                                       .accumulate = transpose});
        if (std::string(product.impl_info_str()).find("ref") != std::string::npos) return false;
      }
      return true;
    } catch (const dnnl::error&) {
      return false;
    }
  }();
  return answer;
}

struct Product::Primitive {
  dnnl::matmul::primitive_desc description;
  dnnl::matmul matmul;
};

Product::Product(DType type, const ProductShape& shape) : shape_(shape) {
  if (type == DType::kFloat32 || shape.m == 0 || shape.n == 0 || shape.k == 0) return;
  try {
    const OneThread one;
    const auto description = describe(shape);
    primitive_ = std::make_unique<Primitive>(Primitive{description, dnnl::matmul(description)});
  } catch (const dnnl::error& error) {
    fail(error.what());
  }
}

Product::~Product() = default;
Product::Product(Product&&) noexcept = default;
Product& Product::operator=(Product&&) noexcept = default;

std::size_t Product::scratch_bytes() const {
  return primitive_ == nullptr ? 0 : primitive_->description.scratchpad_desc().get_size();
}

void Product::run(const void* a, const void* b, float* c, void* scratch) const {
  const OneThread one;
  const ProductShape& s = shape_;
  if (primitive_ == nullptr) {
    const auto status = dnnl_sgemm(s.transpose_a ? 'T' : 'N', s.transpose_b ? 'T' : 'N', s.m, s.n, s.k, 1.0F,
                                   static_cast<const float*>(a), s.lda, static_cast<const float*>(b), s.ldb,
                                   s.accumulate ? 1.0F : 0.0F, c, s.ldc);
    if (status != dnnl_success) fail("dnnl_sgemm says " + std::to_string(status));
    return;
  }
  try {
    const auto& d = primitive_->description;
    const auto view = [](const dnnl::memory::desc& desc, const void* data) {
      return dnnl::memory(desc, engine(), const_cast<void*>(data));
    };
    dnnl::stream stream(engine());
    primitive_->matmul.execute(stream, {{DNNL_ARG_SRC, view(d.src_desc(), a)},
                                        {DNNL_ARG_WEIGHTS, view(d.weights_desc(), b)},
                                        {DNNL_ARG_DST, view(d.dst_desc(), c)},
                                        {DNNL_ARG_SCRATCHPAD, view(d.scratchpad_desc(), scratch)}});
    stream.wait();
  } catch (const dnnl::error& error) {
    fail(error.what());
  }
}

}  // namespace fovea::nn
