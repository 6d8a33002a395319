#include "arrays.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>

namespace fovea::python {
namespace {

[[noreturn]] void refuse(const std::string& sentence) { throw nb::value_error(sentence.c_str()); }

[[noreturn]] void refuse_unreadable(const char* name, const nb::python_error& error) {
  const std::string why = nb::str(error.value()).c_str();
  refuse(std::string(name) + " cannot be read by DLPack: " + why.substr(0, why.find('\n')));
}

std::string dtype_name(const dlpack::DataType& type) {
  constexpr const char* kCodes[] = {"int", "uint", "fp", "opaque", "bf", "complex", "bool"};
  std::string name = type.code < std::size(kCodes) ? kCodes[type.code] : "fp";  // the rest are floats of 8 bits or less
  if (type.code != dlpack::kBool) name += std::to_string(type.bits);
  return type.lanes == 1 ? name : name + "x" + std::to_string(type.lanes);
}

DType to_dtype(const dlpack::DataType& type, const char* name) {
  const auto is = [&](dlpack::TypeCode code, int bits) {
    return type.code == code && type.bits == bits && type.lanes == 1;
  };
  if (is(dlpack::kFloat, 32)) return DType::kFloat32;
  if (is(dlpack::kFloat, 16)) return DType::kFloat16;
  if (is(dlpack::kBfloat, 16)) return DType::kBFloat16;
  if (is(dlpack::kBool, 8)) return DType::kBool;
  if (is(dlpack::kInt, 32)) return DType::kInt32;
  refuse(std::string(name) + " is " + dtype_name(type) +
         ", which Fovea does not read; it takes fp32, fp16 and bf16, bool for masks and int32 for lengths");
}

dlpack::DataType from_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {dlpack::kFloat, 32, 1};
    case DType::kFloat16:
      return {dlpack::kFloat, 16, 1};
    case DType::kBFloat16:
      return {dlpack::kBfloat, 16, 1};
    case DType::kBool:
      return {dlpack::kBool, 8, 1};
    case DType::kInt32:
      return {dlpack::kInt, 32, 1};
  }
  return {};
}

Tensor to_view(const dlpack::Tensor& t, const char* name) {
  Tensor view;
  view.dtype = to_dtype(t.dtype, name);
  if (t.device.type == dlpack::kCuda || t.device.type == dlpack::kCudaManaged) {
    view.device = {DeviceKind::kCuda, t.device.index};
  } else if (t.device.type != dlpack::kCpu && t.device.type != dlpack::kCudaHost) {
    refuse(std::string(name) + " is on a device of DLPack's type " + std::to_string(t.device.type) +
           "; move it to the CPU or an NVIDIA GPU");
  }
  if (t.rank < 0 || t.rank > Tensor::kMaxRank) {
    refuse(std::string(name) + " has " + std::to_string(t.rank) + " dimensions; Fovea takes at most " +
           std::to_string(Tensor::kMaxRank));
  }
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  if (t.data == nullptr) view.data = nullptr;
  view.rank = t.rank;
  std::copy_n(t.shape, t.rank, view.shape.begin());
  std::int64_t dense = 1;
  for (int axis = t.rank - 1; axis >= 0; --axis) {
    // Where a dimension holds one element its stride never counts, and frameworks write what they like.
    view.strides[axis] = t.strides == nullptr || t.shape[axis] == 1 ? dense : t.strides[axis];
    dense *= std::max<std::int64_t>(t.shape[axis], 1);
  }
  return view;
}

/// The strides of a dense shape whose dimensions have this order in memory, outermost first.
void fill_strides(std::span<const std::int64_t> shape, std::span<const int> order, std::int64_t* strides) {
  std::int64_t stride = 1;
  for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
    strides[*axis] = stride;
    stride *= std::max<std::int64_t>(shape[*axis], 1);
  }
}

/// Types with DLPack's exchange ABI (PyTorch since 2.10), which takes no Python calls.
class ExchangeFramework final : public Framework {
 public:
  explicit ExchangeFramework(const dlpack::ExchangeApi& api) : api_(api) {}

  [[nodiscard]] Borrowed borrow(nb::handle array, const char* name, bool /*written*/) const override {
    dlpack::Tensor tensor{};
    if (api_.borrow(array.ptr(), &tensor) != 0) refuse_unreadable(name, nb::python_error());
    return {to_view(tensor, name), {}};
  }

  [[nodiscard]] Made make(std::span<const std::int64_t> shape, std::span<const int> order, DType dtype,
                          const Device& device) const override {
    // The framework lays elements out densely; the order of dimensions is written into its description afterwards.
    std::array<std::int64_t, Tensor::kMaxRank> dims{};
    for (std::size_t i = 0; i < shape.size(); ++i) dims[i] = shape[order[i]];
    dlpack::Tensor like{};
    like.device = {device.kind == DeviceKind::kCpu ? dlpack::kCpu : dlpack::kCuda, device.index};
    like.rank = static_cast<std::int32_t>(shape.size());
    like.dtype = from_dtype(dtype);
    like.shape = dims.data();
    dlpack::ManagedVersioned* made = nullptr;
    std::string error;
    const auto keep = [](void* context, const char* /*kind*/, const char* message) {
      *static_cast<std::string*>(context) = message;
    };
    if (api_.allocate(&like, &made, &error, keep) != 0) throw std::runtime_error(error);
    std::copy(shape.begin(), shape.end(), made->tensor.shape);
    fill_strides(shape, order, made->tensor.strides);
    Made result{{}, to_view(made->tensor, "a result")};
    void* object = nullptr;
    if (api_.to_object(made, &object) != 0) nb::raise_python_error();
    result.object = nb::steal(static_cast<PyObject*>(object));
    return result;
  }

  [[nodiscard]] void* stream(const Device& device) const override {
    void* stream = nullptr;
    if (device.kind == DeviceKind::kCuda && api_.current_stream(dlpack::kCuda, device.index, &stream) != 0) {
      nb::raise_python_error();
    }
    return stream;
  }

 private:
  const dlpack::ExchangeApi& api_;
};

/// All other types, through an adapter of fovea._frameworks.
class PythonFramework final : public Framework {
 public:
  explicit PythonFramework(nb::object adapter) : adapter_(std::move(adapter)) {}

  [[nodiscard]] Borrowed borrow(nb::handle array, const char* name, bool written) const override {
    nb::object capsule = exported(array, name);
    const dlpack::Tensor* tensor = nullptr;
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
      const auto* managed = pointer<dlpack::ManagedVersioned>(capsule, "dltensor_versioned");
      if (managed->version.major != dlpack::kMajor) {
        refuse(std::string(name) + " comes by DLPack " + std::to_string(managed->version.major) +
               ", and Fovea knows DLPack 1; update Fovea");
      }
      if (written && (managed->flags & dlpack::kReadOnly) != 0) {
        refuse(std::string(name) + " is read-only; give an array that may be written");
      }
      tensor = &managed->tensor;
    } else {
      tensor = &pointer<dlpack::Managed>(capsule, "dltensor")->tensor;
    }
    return {to_view(*tensor, name), std::move(capsule)};  // an unused capsule frees its tensor when it dies
  }

  [[nodiscard]] Made make(std::span<const std::int64_t> shape, std::span<const int> order, DType dtype,
                          const Device& device) const override {
    nb::list dims, axes;
    for (const int axis : order) dims.append(shape[axis]);
    for (std::size_t axis = 0; axis < order.size(); ++axis) {
      axes.append(std::find(order.begin(), order.end(), static_cast<int>(axis)) - order.begin());
    }
    nb::object object = adapter_.attr("make")(dims, axes, name(dtype), name(device));
    Tensor view = borrow(object, "a result", true).view;  // the object keeps its memory
    return {std::move(object), view};
  }

  [[nodiscard]] void* stream(const Device& device) const override {
    if (device.kind == DeviceKind::kCpu) return nullptr;
    const nb::object number = adapter_.attr("stream")(name(device));
    void* stream = PyLong_AsVoidPtr(number.ptr());
    if (stream == nullptr && PyErr_Occurred() != nullptr) nb::raise_python_error();
    return stream;
  }

 private:
  [[nodiscard]] nb::object exported(nb::handle array, const char* name) const {
    try {
      return adapter_.attr("export")(array);
    } catch (const nb::python_error& error) {
      if (!error.matches(PyExc_BufferError)) throw;
      refuse_unreadable(name, error);
    }
  }

  template <typename T>
  static T* pointer(const nb::object& capsule, const char* name) {
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), name);
    if (pointer == nullptr) nb::raise_python_error();
    return static_cast<T*>(pointer);
  }

  nb::object adapter_;
};

/// Outlines: views whose data is null.
class OutlineFramework final : public Framework {
 public:
  [[nodiscard]] Borrowed borrow(nb::handle array, const char* name, bool /*written*/) const override {
    auto outline = nb::cast<Outline>(array);
    dlpack::Tensor tensor{};
    tensor.device = {static_cast<dlpack::DeviceType>(outline.device_type), outline.device_index};
    tensor.rank = static_cast<std::int32_t>(outline.shape.size());
    tensor.dtype = {static_cast<std::uint8_t>(outline.type_code), static_cast<std::uint8_t>(outline.type_bits), 1};
    tensor.shape = outline.shape.data();
    tensor.strides = outline.strides.data();
    return {to_view(tensor, name), {}};
  }
  [[nodiscard]] Made make(std::span<const std::int64_t> /*shape*/, std::span<const int> /*order*/, DType /*dtype*/,
                          const Device& /*device*/) const override {
    refuse("an outline has no data to compute with");
  }
  [[nodiscard]] void* stream(const Device& /*device*/) const override { return nullptr; }
};

std::unique_ptr<const Framework> find_framework(nb::handle type, const char* name) {
  if (type.is(nb::type<Outline>())) return std::make_unique<OutlineFramework>();
  if (nb::hasattr(type, "__dlpack_c_exchange_api__")) {
    const nb::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) nb::raise_python_error();
    while (api != nullptr && api->version.major != dlpack::kMajor) api = api->older;
    if (api != nullptr && api->borrow != nullptr) return std::make_unique<ExchangeFramework>(*api);
  }
  nb::object adapter = nb::module_::import_("fovea._frameworks").attr("adapter")(type, name);
  return std::make_unique<PythonFramework>(std::move(adapter));
}

}  // namespace

const Framework& Framework::of(nb::handle array, const char* name) {
  // Types are few and live as long as the process; the map holds on to them.  The GIL guards it.
  static auto& known = *new std::unordered_map<PyObject*, std::unique_ptr<const Framework>>;
  const nb::handle type = array.type();
  if (const auto found = known.find(type.ptr()); found != known.end()) return *found->second;
  auto framework = find_framework(type, name);
  type.inc_ref();
  return *known.emplace(type.ptr(), std::move(framework)).first->second;
}

}  // namespace fovea::python
