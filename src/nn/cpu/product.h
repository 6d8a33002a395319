#pragma once

#include <fovea/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fovea::nn {

/// c[m, n] = a[m, k] · b[k, n], or added to c: by oneDNN, on the calling thread alone.  a and b are stored as they are
/// or transposed, with `lda` and `ldb` elements from one stored row to the next; c is fp32.
struct ProductShape {
  bool transpose_a = false, transpose_b = false;
  std::int64_t m = 0, n = 0, k = 0, lda = 0, ldb = 0, ldc = 0;
  bool accumulate = false;
};

/// Whether this CPU multiplies bf16 without widening it first.
[[nodiscard]] bool multiplies_bf16();

/// A product made ready; any number of threads may run it at once, each with a scratch of its own.
class Product {
 public:
  /// `type` fp32, or bf16 where multiplies_bf16().
  Product(DType type, const ProductShape& shape);
  ~Product();
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  Product(Product&&) noexcept;
  Product& operator=(Product&&) noexcept;

  [[nodiscard]] std::size_t scratch_bytes() const;
  void run(const void* a, const void* b, float* c, void* scratch) const;

 private:
  struct Primitive;
  ProductShape shape_;
  std::unique_ptr<Primitive> primitive_;  // bf16 alone
};

}  // namespace fovea::nn
