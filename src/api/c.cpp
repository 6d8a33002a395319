#include <fovea/c.h>
#include <fovea/fovea.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>

#include "problem/refuse.h"

using namespace fovea;

struct fovea_plan {
  Plan plan;
  std::string report;
};

namespace {

// ---- errors

constexpr std::size_t kLongestSentence = 2048;
thread_local std::array<char, kLongestSentence> last_sentence{};

/// Bytes of the text that fit into so many, in whole characters of UTF-8.
std::size_t fitting(std::string_view text, std::size_t most) noexcept {
  if (text.size() <= most) return text.size();
  while (most > 0 && (text[most] & 0xc0) == 0x80) --most;
  return most;
}

fovea_status fail(ErrorCode code, std::string_view sentence) noexcept {
  const std::size_t length = fitting(sentence, kLongestSentence - 1);
  std::memmove(last_sentence.data(), sentence.data(), length);
  last_sentence[length] = '\0';
  return static_cast<fovea_status>(code);
}

/// Runs one call of the interface and turns every exception into a status.
template <typename Call>
fovea_status guard(const Call& call) noexcept {
  try {
    call();
    return FOVEA_OK;
  } catch (const Error& error) {
    return fail(error.code(), error.what());
  } catch (const std::bad_alloc&) {  // also of making an Error
    return fail(ErrorCode::kOutOfMemory, kMemoryRanOut);
  } catch (const std::exception& error) {
    return fail(ErrorCode::kInternal, error.what());
  } catch (...) {
    return fail(ErrorCode::kInternal, "an unknown exception was thrown inside Fovea; please report it");
  }
}

static_assert(FOVEA_INVALID_ARGUMENT == static_cast<int>(ErrorCode::kInvalidArgument));
static_assert(FOVEA_INTERNAL == static_cast<int>(ErrorCode::kInternal));
static_assert(FOVEA_INT32 == static_cast<int>(DType::kInt32));
static_assert(FOVEA_CUDA == static_cast<int>(DeviceKind::kCuda));
static_assert(FOVEA_CAUSAL_BOTTOM_RIGHT == static_cast<int>(Causal::kBottomRight));
static_assert(FOVEA_BACKWARD == static_cast<int>(Direction::kBackward));

// ---- from C to C++ values

template <typename T>
T& need(T* pointer, const char* name) {
  if (pointer == nullptr) refuse(name, " is NULL");
  return *pointer;
}

template <typename Enum>
Enum to_enum(const char* name, std::int32_t value, Enum last) {
  if (value < 0 || value > static_cast<int>(last)) refuse(name, " (", value, ") must be 0 to ", static_cast<int>(last));
  return static_cast<Enum>(value);
}

/// A copy of a sized struct, whichever version of the header its caller was compiled with.
template <typename Struct>
Struct read(const char* name, const Struct* given) {
  constexpr std::size_t kMost = 4096;
  Struct copy{};
  if (given == nullptr) return copy;
  if (given->size < sizeof(std::size_t) || given->size > kMost) {
    refuse(name, "->size (", given->size, ") must be sizeof(", name, ")");
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  std::memcpy(&copy, bytes, std::min(given->size, sizeof copy));
  if (std::any_of(bytes + std::min(given->size, sizeof copy), bytes + given->size, [](auto b) { return b != 0; })) {
    throw Error(ErrorCode::kUnsupported,
                std::string(name) + " sets a member that Fovea " FOVEA_VERSION " does not know");
  }
  return copy;
}

Device to_device(const fovea_device& device) {
  return {to_enum("device kind", device.kind, DeviceKind::kCuda), device.index, device.compute_capability};
}
Device to_device(const fovea_device* device) { return device == nullptr ? Device{} : to_device(*device); }

Tensor to_tensor(const char* name, const fovea_tensor* given) {
  Tensor t;
  if (given == nullptr || given->rank == 0) return t;
  if (given->rank < 0 || given->rank > Tensor::kMaxRank) refuse(name, "'s rank (", given->rank, ") must be 0 to 4");
  t.data = given->data;
  t.dtype = to_enum((std::string(name) + "'s dtype").c_str(), given->dtype, DType::kInt32);
  t.device = to_device(given->device);
  t.rank = given->rank;
  std::copy_n(given->shape, t.rank, t.shape.begin());
  std::copy_n(given->strides, t.rank, t.strides.begin());
  return t;
}

/// A tensor of a C struct and the one of a C++ struct that it becomes.
template <typename C, typename Cpp>
struct Field {
  const char* name;
  const fovea_tensor* C::*from;
  Tensor Cpp::*to;
};

template <typename C, typename Cpp, std::size_t N>
void convert(const C& from, Cpp& to, const Field<C, Cpp> (&fields)[N]) {
  for (const auto& field : fields) to.*field.to = to_tensor(field.name, from.*field.from);
}

#define FOVEA_FIELD(name) \
  { #name, &C::name, &Cpp::name }
template <typename C, typename Cpp>
constexpr Field<C, Cpp> kOptionFields[] = {
    FOVEA_FIELD(mask),      FOVEA_FIELD(bias),       FOVEA_FIELD(alibi_slopes), FOVEA_FIELD(sink),
    FOVEA_FIELD(q_lengths), FOVEA_FIELD(kv_lengths), FOVEA_FIELD(cu_seqlens_q), FOVEA_FIELD(cu_seqlens_kv)};
template <typename C, typename Cpp>
constexpr Field<C, Cpp> kInputFields[] = {FOVEA_FIELD(q), FOVEA_FIELD(k), FOVEA_FIELD(v)};
template <typename C, typename Cpp>
constexpr Field<C, Cpp> kBackwardFields[] = {FOVEA_FIELD(out), FOVEA_FIELD(lse), FOVEA_FIELD(dout), FOVEA_FIELD(dlse)};
template <typename C, typename Cpp>
constexpr Field<C, Cpp> kOutputFields[] = {FOVEA_FIELD(out), FOVEA_FIELD(lse)};
template <typename C, typename Cpp>
constexpr Field<C, Cpp> kGradientFields[] = {
    FOVEA_FIELD(dq),   FOVEA_FIELD(dk), FOVEA_FIELD(dv), FOVEA_FIELD(dbias), FOVEA_FIELD(dalibi_slopes),
    FOVEA_FIELD(dsink)};
#undef FOVEA_FIELD

PlanOptions plan_options_of(const auto& c) {
  return {.backend = c.backend == nullptr ? "" : c.backend, .strict = c.strict != 0, .num_threads = c.num_threads};
}

AttentionOptions to_options(const fovea_options* given) {
  const fovea_options c = read("fovea_options", given);
  AttentionOptions o;
  convert(c, o, kOptionFields<fovea_options, AttentionOptions>);
  o.causal = to_enum("causal", c.causal, Causal::kBottomRight);
  if (c.has_softmax_scale != 0) o.softmax_scale = c.softmax_scale;
  if (c.has_window_left != 0) o.window_left = c.window_left;
  if (c.has_window_right != 0) o.window_right = c.window_right;
  o.softcap = c.softcap;
  o.dropout = {c.dropout_probability, c.dropout_seed, c.dropout_offset};
  o.deterministic = c.deterministic != 0;
  o.max_seqlen_q = c.max_seqlen_q;
  o.max_seqlen_kv = c.max_seqlen_kv;
  static_cast<PlanOptions&>(o) = plan_options_of(c);
  return o;
}

PlanOptions to_plan_options(const fovea_plan_options* given) {
  return plan_options_of(read("fovea_plan_options", given));
}

void make_plan(const Problem& problem, const Device& device, const PlanOptions& options, fovea_plan*& plan) {
  if (problem.direction == Direction::kForwardBackward) {
    refuse("a plan runs one direction, fwd or bwd, but the line says fwd+bwd; make two plans");
  }
  Plan made = problem.forward() ? plan_forward(problem, device, options) : plan_backward(problem, device, options);
  std::string report = to_string(made.report());
  plan = std::make_unique<fovea_plan>(fovea_plan{std::move(made), std::move(report)}).release();
}

}  // namespace

// ---- the interface

extern "C" {

const char* fovea_version(void) { return FOVEA_VERSION; }

const char* fovea_last_error(void) { return last_sentence.data(); }

fovea_status fovea_attention_forward(const fovea_tensor* q, const fovea_tensor* k, const fovea_tensor* v,
                                     const fovea_options* options, const fovea_tensor* out, const fovea_tensor* lse) {
  return guard([&] {
    attention_forward(to_tensor("q", q), to_tensor("k", k), to_tensor("v", v), to_options(options),
                      to_tensor("out", out), to_tensor("lse", lse));
  });
}

fovea_status fovea_attention_backward(const fovea_tensor* q, const fovea_tensor* k, const fovea_tensor* v,
                                      const fovea_tensor* out, const fovea_tensor* lse, const fovea_tensor* dout,
                                      const fovea_options* options, const fovea_outputs* gradients,
                                      const fovea_tensor* dlse) {
  return guard([&] {
    Gradients wanted;
    convert(read("fovea_outputs", &need(gradients, "gradients")), wanted, kGradientFields<fovea_outputs, Gradients>);
    attention_backward(to_tensor("q", q), to_tensor("k", k), to_tensor("v", v), to_tensor("out", out),
                       to_tensor("lse", lse), to_tensor("dout", dout), to_options(options), wanted,
                       to_tensor("dlse", dlse));
  });
}

fovea_status fovea_plan_from_line(const char* line, const fovea_device* device, const fovea_plan_options* options,
                                  fovea_plan** plan) {
  return guard([&] {
    need(plan, "plan") = nullptr;
    make_plan(parse_problem(&need(line, "line")), to_device(device), to_plan_options(options), *plan);
  });
}

fovea_status fovea_plan_from_tensors(int32_t direction, const fovea_tensor* q, const fovea_tensor* k,
                                     const fovea_tensor* v, const fovea_options* options, fovea_plan** plan) {
  return guard([&] {
    need(plan, "plan") = nullptr;
    const Tensor queries = to_tensor("q", q);
    const AttentionOptions o = to_options(options);
    const Problem problem = describe(to_enum("direction", direction, Direction::kBackward), queries, to_tensor("k", k),
                                     to_tensor("v", v), o);
    make_plan(problem, queries.device, o, *plan);
  });
}

fovea_status fovea_plan_workspace_bytes(const fovea_plan* plan, size_t* bytes) {
  return guard([&] { need(bytes, "bytes") = need(plan, "plan").plan.workspace_bytes(); });
}

const char* fovea_plan_report(const fovea_plan* plan) {
  const char* report = nullptr;
  guard([&] { report = need(plan, "plan").report.c_str(); });
  return report;
}

fovea_status fovea_plan_execute(const fovea_plan* plan, const fovea_inputs* inputs, const fovea_outputs* outputs,
                                void* workspace, void* stream) {
  return guard([&] {
    const fovea_inputs given = read("fovea_inputs", &need(inputs, "inputs"));
    const fovea_outputs results = read("fovea_outputs", &need(outputs, "outputs"));
    const Plan& ready = need(plan, "plan").plan;
    Inputs in;
    Outputs out;
    convert(given, in, kInputFields<fovea_inputs, Inputs>);
    convert(given, in, kOptionFields<fovea_inputs, Inputs>);
    if (const auto* draws = given.dropout_draws) in.dropout_draws = {draws->seed, draws->offset};
    const bool forward = ready.problem().forward();
    if (forward) convert(results, out, kOutputFields<fovea_outputs, Outputs>);
    if (!forward) convert(given, in, kBackwardFields<fovea_inputs, Inputs>);
    if (!forward) convert(results, out, kGradientFields<fovea_outputs, Outputs>);
    ready.execute(in, out, workspace, stream);
  });
}

void fovea_plan_destroy(fovea_plan* plan) { const std::unique_ptr<fovea_plan> owned(plan); }

fovea_status fovea_explain(const char* line, const fovea_device* device, const fovea_plan_options* options, char* text,
                           size_t capacity, size_t* length) {
  return guard([&] {
    if (capacity > 0) need(text, "text");
    const std::string report =
        to_string(explain(parse_problem(&need(line, "line")), to_device(device), to_plan_options(options)));
    if (length != nullptr) *length = report.size();
    if (capacity > 0) text[report.copy(text, fitting(report, capacity - 1))] = '\0';
  });
}

}  // extern "C"
