#pragma once

#include <cstdint>

/// The parts of DLPack's C ABI (https://dmlc.github.io/dlpack, 1.3) that tensors come and go by.  Layouts are DLPack's.
namespace fovea::python::dlpack {

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};
constexpr std::uint32_t kMajor = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
struct Device {
  std::int32_t type;
  std::int32_t index;
};

enum TypeCode : std::uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };
struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t rank;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  ///< in elements; null: densely packed
  std::uint64_t byte_offset;
};

/// What a capsule named "dltensor" holds.
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

/// What a capsule named "dltensor_versioned" holds.
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};
constexpr std::uint64_t kReadOnly = 1;

/// What a capsule named "dlpack_exchange_api" holds, an attribute of array types: exchange without Python calls.
struct ExchangeApi {
  Version version;
  const ExchangeApi* older;
  int (*allocate)(Tensor* like, ManagedVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*own)(void* object, ManagedVersioned** out);
  int (*to_object)(ManagedVersioned* tensor, void** object);
  int (*borrow)(void* object, Tensor* out);
  int (*current_stream)(std::int32_t type, std::int32_t index, void** stream);
};

}  // namespace fovea::python::dlpack
