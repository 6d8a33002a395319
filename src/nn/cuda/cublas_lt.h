#pragma once

#include <fovea/tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

// NVIDIA's cuBLASLt, opened at run time: products of matrices on a GPU.
namespace fovea::nn {

/// d[m, n] = a[m, k] · b[k, n] + c[m, n] + bias[n], the last two where defined.  All are stored row by row in views of
/// two dimensions; a and b as they are or transposed.  a, b, c and bias are of one dtype but for c = d of fp32; sums
/// are in fp32.
struct MatrixProduct {
  Tensor a{}, b{}, d{};
  bool transpose_a = false, transpose_b = false;
  Tensor c{}, bias{};
  Tensor a_sums{};  ///< [m] of d's dtype, where defined and bias is not: becomes the sums of a over k
};

/// Where a product is queued: by itself in the default stream, in the products' own memory.
struct ProductQueue {
  void* stream = nullptr;
  std::function<void*(std::size_t bytes)> workspace{};
};

/// The products of one GPU; from any number of threads at once.
class CublasLt {
 public:
  /// By the library that FOVEA_CUBLASLT names, or else the first of version 12 or later and no newer than the driver
  /// among a library already loaded, the system's, the toolkit's and those of Python wheels.  Throws Error(kDevice)
  /// where there is none.
  explicit CublasLt(int gpu);

  /// False where the library has no way to do this in one step.  Throws Error where it fails.
  [[nodiscard]] bool multiply(const MatrixProduct& product, const ProductQueue& queue = {}) const;

 private:
  struct Functions;
  struct Found;
  struct Algorithm {
    bool there = false;
    std::size_t workspace_bytes = 0;
    std::uint64_t words[8] = {};  // cublasLtMatmulAlgo_t
  };
  static const Found& found();
  void check(int status, const char* what) const;

  int gpu_;
  const Functions& call_;
  std::shared_ptr<void> handle_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<std::byte> workspace_;                       // of the default stream
  mutable std::map<std::vector<std::int64_t>, Algorithm> algorithms_;  // by everything that the choice depends on
};

}  // namespace fovea::nn
