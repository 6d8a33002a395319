#include "xla.h"

#include <fovea/error.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "call.h"
#include "plans.h"
#include "xla_ffi.h"

namespace fovea::python {
namespace {

[[noreturn]] void refuse(const std::string& sentence) { throw Error(ErrorCode::kInvalidArgument, sentence); }

/// A string attribute of the call; fovea.jax gives all of them.
std::string_view attribute(const xla::Attributes& attributes, std::string_view name) {
  for (std::int64_t i = 0; i < attributes.count; ++i) {
    const xla::Span& given = *attributes.names[i];
    if (std::string_view(given.data, given.length) != name) continue;
    if (attributes.types[i] != xla::kStringAttribute) break;
    const auto& value = *static_cast<const xla::Span*>(attributes.values[i]);
    return {value.data, value.length};
  }
  refuse("attribute '" + std::string(name) + "' is missing; call fovea.jax.attention");
}

std::int64_t number(const xla::Attributes& attributes, std::string_view name) {
  return std::stoll(std::string(attribute(attributes, name)));
}

DType to_dtype(xla::DataType type, std::string_view name) {
  switch (type) {
    case xla::kF32:
      return DType::kFloat32;
    case xla::kF16:
      return DType::kFloat16;
    case xla::kBf16:
      return DType::kBFloat16;
    case xla::kPred:
      return DType::kBool;
    case xla::kS32:
      return DType::kInt32;
    default:
      break;
  }
  refuse(std::string(name) +
         " has a dtype that Fovea does not read; it takes float32, float16 and bfloat16, bool for"
         " masks and int32 for lengths");
}

/// XLA's buffers are dense, last dimension fastest.
Tensor to_view(const xla::Buffer& buffer, std::string_view name, const Device& device) {
  if (buffer.rank > Tensor::kMaxRank) refuse(std::string(name) + " has more than four dimensions");
  Tensor view;
  view.data = buffer.data;
  view.dtype = to_dtype(buffer.dtype, name);
  view.device = device;
  view.rank = static_cast<int>(buffer.rank);
  std::int64_t stride = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    view.shape[axis] = buffer.dims[axis];
    view.strides[axis] = stride;
    stride *= std::max<std::int64_t>(buffer.dims[axis], 1);
  }
  return view;
}

template <typename Set>
struct Named {
  std::string_view name;
  Tensor Set::*tensor;
  enum class Kind { kTokens, kEntries, kOther } kind = Kind::kOther;
};
constexpr auto kTokens = Named<Inputs>::Kind::kTokens;
constexpr auto kEntries = Named<Inputs>::Kind::kEntries;
constexpr Named<Inputs> kInputs[] = {
    {"q", &Inputs::q, kTokens},
    {"k", &Inputs::k, kTokens},
    {"v", &Inputs::v, kTokens},
    {"out", &Inputs::out, kTokens},
    {"dout", &Inputs::dout, kTokens},
    {"mask", &Inputs::mask, kEntries},
    {"bias", &Inputs::bias, kEntries},
    {"alibi_slopes", &Inputs::alibi_slopes},
    {"sink", &Inputs::sink},
    {"q_lengths", &Inputs::q_lengths},
    {"kv_lengths", &Inputs::kv_lengths},
    {"cu_seqlens_q", &Inputs::cu_seqlens_q},
    {"cu_seqlens_kv", &Inputs::cu_seqlens_kv},
    {"lse", &Inputs::lse},
    {"dlse", &Inputs::dlse},
};
constexpr Named<Outputs> kOutputs[] = {
    {"out", &Outputs::out, Named<Outputs>::Kind::kTokens},
    {"lse", &Outputs::lse},
    {"dq", &Outputs::dq, Named<Outputs>::Kind::kTokens},
    {"dk", &Outputs::dk, Named<Outputs>::Kind::kTokens},
    {"dv", &Outputs::dv, Named<Outputs>::Kind::kTokens},
    {"dbias", &Outputs::dbias, Named<Outputs>::Kind::kEntries},
    {"dalibi_slopes", &Outputs::dalibi_slopes},
    {"dsink", &Outputs::dsink},
};

/// One call of XLA's as one of the library's.
class XlaCall {
 public:
  XlaCall(const xla::CallFrame& frame, const Device& device)
      : frame_(frame), device_(device), heads_first_(attribute(frame.attributes, "layout") == "bhsd") {
    Problem options;
    parse_options(attribute(frame.attributes, "options"), options);
    rules_ = static_cast<const Rules&>(options);
    call_.direction = attribute(frame.attributes, "pass") == "bwd" ? Direction::kBackward : Direction::kForward;
    call_.max_seqlen_q = number(frame.attributes, "max_seqlen_q");
    call_.max_seqlen_kv = number(frame.attributes, "max_seqlen_kv");
    attach(frame.arguments, attribute(frame.attributes, "arguments"), kInputs, call_.in);
    attach(frame.results, attribute(frame.attributes, "results"), kOutputs, out_);
  }

  void run() const {
    PlanOptions options;
    options.backend = attribute(frame_.attributes, "backend");
    const std::shared_ptr<const Plan> plan = plan_of(call_, rules_, options);
    if (device_.kind == DeviceKind::kCpu) {
      plan->execute(call_.in, out_, CpuWorkspace(plan->workspace_bytes()).data());
      return;
    }
    xla::StreamGet get{sizeof get, nullptr, frame_.context, nullptr};
    if (frame_.api->stream_get(&get) != nullptr) throw Error(ErrorCode::kDevice, "XLA gives no CUDA stream");
    xla::MemoryAllocate memory{sizeof memory, nullptr, frame_.context, plan->workspace_bytes(), 64, nullptr};
    if (memory.bytes > 0 && frame_.api->memory_allocate(&memory) != nullptr) {
      throw Error(ErrorCode::kOutOfMemory, "a workspace of " + std::to_string(memory.bytes) +
                                               " bytes could not be had from XLA; pose a smaller problem");
    }
    // XLA's allocator hands memory on in the stream's order: it may be given back before the kernels have run.
    const auto give_back = [&](void* data) {
      xla::MemoryFree give{sizeof give, nullptr, frame_.context, memory.bytes, data};
      frame_.api->memory_free(&give);
    };
    const std::unique_ptr<void, decltype(give_back)> owned(memory.data, give_back);
    plan->execute(call_.in, out_, memory.data, get.stream);
  }

 private:
  template <typename Set, std::size_t N>
  void attach(const xla::Buffers& buffers, std::string_view names, const Named<Set> (&known)[N], Set& set) {
    for (std::int64_t i = 0; i < buffers.count; ++i) {
      const std::string_view name = names.substr(0, names.find(','));
      names.remove_prefix(std::min(name.size() + 1, names.size()));
      if (name == "seed") {
        take_seed(*buffers.buffers[i]);
        continue;
      }
      const auto found = std::find_if(known, known + N, [&](const auto& each) { return each.name == name; });
      if (found == known + N) refuse("XLA passes more arrays than fovea.jax names");
      Tensor view = to_view(*buffers.buffers[i], name, device_);
      if (found->kind == Named<Set>::Kind::kEntries) view = padded(view);
      if (found->kind == Named<Set>::Kind::kTokens && heads_first_) view = view.transposed(1, 2);
      set.*(found->tensor) = view;
    }
  }

  /// uint32 [4]: the low and high halves of seed and offset.
  void take_seed(const xla::Buffer& buffer) {
    if (device_.kind != DeviceKind::kCpu) {
      refuse("seed is an array, whose values stay on the GPU; give a Python integer there");
    }
    if (buffer.dtype != xla::kU32 || buffer.rank != 1 || buffer.dims[0] != 4) refuse("seed must be uint32 [4]");
    const auto* words = static_cast<const std::uint32_t*>(buffer.data);
    call_.in.dropout_draws = {words[0] | static_cast<std::uint64_t>(words[1]) << 32,
                              words[2] | static_cast<std::uint64_t>(words[3]) << 32};
  }

  const xla::CallFrame& frame_;
  Device device_;
  bool heads_first_;
  Rules rules_;
  Call call_;
  Outputs out_{};
};

xla::ErrorKind kind_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return xla::kInvalidArgument;
    case ErrorCode::kUnsupported:
      return xla::kUnimplemented;
    case ErrorCode::kOutOfMemory:
      return xla::kResourceExhausted;
    default:
      return xla::kInternal;
  }
}

xla::Error* fail(const xla::CallFrame& frame, xla::ErrorKind kind, const char* sentence) {
  xla::ErrorCreate create{sizeof create, nullptr, sentence, kind};
  return frame.api->error_create(&create);
}

/// No trait, that of command buffers least: a capture would keep the address of a workspace that has been given back.
void describe(const xla::Api& api, xla::Metadata& metadata) {
  metadata.version.major = api.version.major;
  metadata.version.minor = api.version.minor;
  metadata.traits = 0;
}

Device device_of(const xla::CallFrame& frame, DeviceKind kind) {
  Device device{kind, 0, 0};
  if (kind == DeviceKind::kCuda && frame.api->size >= sizeof(xla::Api)) {
    xla::OrdinalGet get{sizeof get, nullptr, frame.context, 0};
    if (frame.api->ordinal_get(&get) == nullptr) device.index = get.ordinal;
  }
  return device;
}

template <DeviceKind Kind>
xla::Error* handle(xla::CallFrame* frame) {
  if (frame->extensions != nullptr && frame->extensions->type == xla::kMetadata) {
    auto* extension = reinterpret_cast<xla::MetadataExtension*>(frame->extensions);
    describe(*frame->api, *extension->metadata);
    return nullptr;
  }
  if (frame->stage != xla::kExecute) return nullptr;
  try {
    XlaCall(*frame, device_of(*frame, Kind)).run();
    return nullptr;
  } catch (const Error& error) {
    return fail(*frame, kind_of(error.code()), error.what());
  } catch (const std::exception& error) {
    return fail(*frame, xla::kInternal, error.what());
  }
}

}  // namespace

void* xla_handler_cpu() { return reinterpret_cast<void*>(&handle<DeviceKind::kCpu>); }
void* xla_handler_cuda() { return reinterpret_cast<void*>(&handle<DeviceKind::kCuda>); }

}  // namespace fovea::python
