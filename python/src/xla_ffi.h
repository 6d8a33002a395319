#pragma once

#include <cstddef>
#include <cstdint>

/// The parts of XLA's foreign function interface (https://openxla.org/xla/custom_call) that a handler meets, declared
/// anew so that nothing of JAX is needed to build.  Layouts are XLA's, unchanged since its version 0.1.
namespace fovea::python::xla {

struct Extension {
  std::size_t size;
  std::int32_t type;
  Extension* next;
};
constexpr std::int32_t kMetadata = 1;

struct Version {
  std::size_t size;
  Extension* extensions;
  int major;
  int minor;
};

/// What XLA asks of a handler before it calls it.
struct Metadata {
  std::size_t size;
  Version version;
  std::uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Error;
enum ErrorKind : std::int32_t { kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13 };
struct ErrorCreate {
  std::size_t size;
  Extension* extensions;
  const char* message;
  ErrorKind kind;
};

struct Context;
struct StreamGet {
  std::size_t size;
  Extension* extensions;
  Context* context;
  void* stream;
};
struct MemoryAllocate {
  std::size_t size;
  Extension* extensions;
  Context* context;
  std::size_t bytes;
  std::size_t alignment;
  void* data;
};
struct MemoryFree {
  std::size_t size;
  Extension* extensions;
  Context* context;
  std::size_t bytes;
  void* data;
};
struct OrdinalGet {
  std::size_t size;
  Extension* extensions;
  Context* context;
  std::int32_t ordinal;
};

struct Api {
  std::size_t size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*error_create)(ErrorCreate*);
  void* error_get_message;
  void* error_destroy;
  void* handler_register;
  Error* (*stream_get)(StreamGet*);
  void* type_register;
  void* context_get;
  void* state_set;
  void* state_get;
  Error* (*memory_allocate)(MemoryAllocate*);
  Error* (*memory_free)(MemoryFree*);
  void* pool_schedule;
  void* pool_threads;
  void* future_create;
  void* future_available;
  void* future_error;
  void* run_id_get;
  Error* (*ordinal_get)(OrdinalGet*);  // since 0.2
};

enum DataType : std::int32_t { kPred = 1, kS32 = 4, kS64 = 5, kU32 = 8, kF16 = 10, kF32 = 11, kBf16 = 16 };
struct Buffer {
  std::size_t size;
  Extension* extensions;
  DataType dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

/// Arguments and results: all of them buffers here.
struct Buffers {
  std::size_t size;
  Extension* extensions;
  std::int64_t count;
  std::int32_t* types;
  Buffer** buffers;
};

struct Span {
  const char* data;
  std::size_t length;
};
constexpr std::int32_t kStringAttribute = 4;
struct Attributes {
  std::size_t size;
  Extension* extensions;
  std::int64_t count;
  std::int32_t* types;
  Span** names;
  void** values;
};

struct CallFrame {
  std::size_t size;
  Extension* extensions;
  const Api* api;
  Context* context;
  std::int32_t stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};
constexpr std::int32_t kExecute = 3;

}  // namespace fovea::python::xla
