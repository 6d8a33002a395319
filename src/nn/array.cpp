#include <fovea/nn/array.h>

#include <algorithm>

#include "cpu/elements.h"
#include "nn/layout.h"
#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea::nn {

Array::Array(DType dtype, std::span<const std::int64_t> shape, const Device& device)
    : Array(unset(dtype, shape, device)) {
  ops_of(device).clear(view().data, size_bytes());
}

Array Array::unset(DType dtype, std::span<const std::int64_t> shape, const Device& device) {
  if (shape.empty() || shape.size() > Tensor::kMaxRank) {
    refuse("a tensor cannot have ", shape.size(), " dimensions; give 1 to ", Tensor::kMaxRank);
  }
  // A shape that overflows is refused even beside a 0, so that strides never overflow either.
  std::int64_t bytes = fovea::size_bytes(dtype);
  bool empty = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) refuse("a tensor's dimension (", extent, ") must not be negative");
    empty = empty || extent == 0;
    if (extent > 0 && __builtin_mul_overflow(bytes, extent, &bytes)) {
      refuse("a tensor of shape [", join(shape, ", "), "] is larger than any memory");
    }
  }
  auto held = or_out_of_memory([] { return std::make_shared<Held>(); });
  held->size_bytes = empty ? 0 : static_cast<std::size_t>(bytes);
  held->memory = or_out_of_memory([&] { return ops_of(device).allocate(held->size_bytes); });
  Tensor& view = held->view;
  view.data = held->memory.get();
  view.dtype = dtype;
  view.device = device;
  view.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = shape[i];
    view.strides[i] = stride;
    stride *= shape[i];
  }
  Array a;
  a.held_ = std::move(held);
  return a;
}

namespace {

/// Refuses what cannot be walked.
void check_elements(const std::string& name, const Tensor& t) {
  if (t.rank < 1 || t.rank > Tensor::kMaxRank) {
    refuse(name, " has ", t.rank, " dimensions but must have 1 to ", Tensor::kMaxRank);
  }
  if (std::ranges::any_of(shape_of(t), [](std::int64_t extent) { return extent < 0; })) {
    refuse(name, " is ", shape_text(t), "; a dimension must not be negative");
  }
  check_named((name + "'s dtype").c_str(), t.dtype, DType::kInt32);
  check_memory(name.c_str(), t, Use::kStrided);
}

}  // namespace

void copy(const Tensor& from, const Tensor& to) {
  or_out_of_memory([&] {
    check_elements("the tensor to copy from", from);
    check_elements("the tensor to copy to", to);
    if (!std::ranges::equal(shape_of(from), shape_of(to))) {
      refuse("a tensor of shape ", shape_text(from), " cannot be copied to one of shape ", shape_text(to));
    }
    if (cpu::element_count(to) == 0) return;
    ops_of(to.device.kind == DeviceKind::kCpu ? from.device : to.device).copy(from, to);
  });
}

std::size_t peak_bytes(const Device& device, bool forget) { return ops_of(device).peak_bytes(forget); }

}  // namespace fovea::nn
