#pragma once

#include <fovea/tensor.h>
#include <nanobind/nanobind.h>

#include <memory>
#include <span>
#include <vector>

#include "dlpack.h"

// Arrays of Python's frameworks as views of the library's, and back, without a copy.
namespace fovea::python {

namespace nb = nanobind;

/// A Python array seen by the library.  It holds what keeps the memory alive beyond the array object itself.
struct Borrowed {
  Tensor view{};
  nb::object capsule{};
};

/// A new array: what Python gets, and what the library writes.
struct Made {
  nb::object object{};
  Tensor view{};
};

/// An array without data, such as those of graphs that are being traced: what DLPack would say of it.
struct Outline {
  std::vector<std::int64_t> shape, strides;
  int type_code = 0, type_bits = 0;
  int device_type = 0, device_index = 0;
};

/// How to read and make arrays of one Python type, and the stream in which their work is queued.
class Framework {
 public:
  virtual ~Framework() = default;

  /// Throws ValueError with `name` for what the library cannot read.
  [[nodiscard]] virtual Borrowed borrow(nb::handle array, const char* name, bool written) const = 0;

  /// Uninitialised.  `order` lists the dimensions as they lie in memory, outermost first.
  [[nodiscard]] virtual Made make(std::span<const std::int64_t> shape, std::span<const int> order, DType dtype,
                                  const Device& device) const = 0;

  /// The caller's current stream there, a CUstream.
  [[nodiscard]] virtual void* stream(const Device& device) const = 0;

  /// The one that serves arrays of this type: by the exchange ABI of the type, else by fovea._frameworks.
  [[nodiscard]] static const Framework& of(nb::handle array, const char* name);
};

}  // namespace fovea::python
