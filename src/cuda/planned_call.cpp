#include "cuda/planned_call.h"

#include <fovea/error.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>

#include "cuda/driver.h"
#include "dispatch/views.h"

namespace fovea::cuda {
namespace {

using dispatch::entry_view, dispatch::row_view, dispatch::head_view;

/// Whether keys 8n to 8n + 7 of a bias are neighbours in memory, aligned for loads of up to 16 bytes.
bool in_runs(const Tensor& t) {
  if (!t.defined()) return true;
  const std::int64_t size = size_bytes(t.dtype), run = std::min<std::int64_t>(8 * size, 16);
  bool runs = t.shape[3] > 1 && t.strides[3] == 1 && reinterpret_cast<std::uintptr_t>(t.data) % run == 0;
  for (int axis = 0; axis < 3; ++axis) runs = runs && (t.shape[axis] == 1 || dispatch::byte_stride(t, axis) % run == 0);
  return runs;
}

IndexView index_view(const Tensor& t) {
  if (!t.defined()) return {};
  return {static_cast<const int*>(t.data), t.strides[0]};
}

int capability_of(const Device& device) {
  return device.compute_capability != 0 ? device.compute_capability : gpu(device.index).compute_capability;
}

/// The layout of the words of a mask that has these dimensions of its own.
WordView word_view(const CallParams& p, WordOrder order, bool batch, bool heads, bool queries) {
  WordView view{};
  // There are words of whole multiples of these.
  const int rows = order == WordOrder::kColumns ? 64 : 1, keys = order == WordOrder::kRows ? 32 : 128;
  view.rows = static_cast<int>(math::round_up(queries ? p.seqlen_q : 1, rows));
  view.count = static_cast<int>(math::round_up(p.seqlen_kv, keys) / 32);
  view.order = order;
  view.heads = heads ? p.q_heads : 1;
  view.planes = batch ? view.heads * p.batch : view.heads;
  view.row = queries ? 1 : 0;
  view.head = heads ? view.plane() : 0;
  view.batch = batch ? view.plane() * view.heads : 0;
  return view;
}

/// tanh(x) / x = Σ terms[i] · x²ⁱ for x² below `most_square`, as an exponent; x = s · to_x.  Nothing where a term has
/// too few digits.
template <std::size_t kTerms>
CappedExponent capped_exponent(const std::array<double, kTerms>& terms, double most_square, double to_x, double scale) {
  const double to_square = to_x * to_x, square = std::exp2(std::floor(std::log2(most_square / to_square)));
  std::array<double, kTerms> shifted{};  // Σ terms[i] · ((z − square) · to_square)ⁱ by powers of z
  for (std::size_t i = kTerms; i-- > 0;) {
    for (std::size_t k = kTerms; k-- > 0;) {
      shifted[k] = to_square * ((k > 0 ? shifted[k - 1] : 0.0) - square * shifted[k]);
    }
    shifted[0] += terms[i];
  }
  CappedExponent exponent{static_cast<float>(square), {}};
  for (std::size_t k = 0; k < kTerms; ++k) {
    exponent.terms[k] = static_cast<float>(scale * std::numbers::log2e * shifted[k]);
  }
  return std::isnormal(exponent.terms[kTerms - 1]) ? exponent : CappedExponent{};
}

/// Polynomials for tanh(x) / x (Remez), of relative error 4e-8; 4e-7 with few terms, for |x| below 0.24, where it is
/// one of a small score.
void expand_softcap(CallParams& p) {
  constexpr double kMost = 0.35, kMostOfFew = 0.06, kMostOfMore = 0.6;  // |x|, x², x²
  constexpr std::array kTerms{1.0, -0.333326627, 0.132998254, -0.0491485022};
  constexpr std::array kFew{0.9999996494, -0.3332278842, 0.1286074912};
  constexpr std::array kMore{0.999999959, -0.3333283625, 0.1332345431, -0.05323766544, 0.0193478438, -0.004537121355};
  const double to_x = static_cast<double>(p.scale) * p.per_softcap;
  double power = to_x;
  for (std::size_t i = 0; i < kTerms.size(); ++i, power *= to_x * to_x) {
    p.small_terms[i] = static_cast<float>(kTerms[i] * power);
  }
  if (!std::isnormal(p.small_terms[3])) return;
  p.small_score = static_cast<float>(kMost / std::abs(to_x));
  p.few_terms = capped_exponent(kFew, kMostOfFew, to_x, p.scale);
  p.more_terms = capped_exponent(kMore, kMostOfMore, to_x, p.scale);
}

}  // namespace

void describe_call(const Problem& problem, CallParams& p) {
  p.batch = static_cast<int>(problem.batch);
  p.q_heads = static_cast<int>(problem.num_q_heads);
  p.kv_heads = static_cast<int>(problem.num_kv_heads);
  p.group = p.q_heads / p.kv_heads;
  p.head_dim = static_cast<int>(problem.head_dim);
  p.head_dim_v = static_cast<int>(problem.head_dim_v);
  p.seqlen_q = static_cast<int>(problem.seqlen_q);
  p.seqlen_kv = static_cast<int>(problem.seqlen_kv);
  p.total_q = static_cast<int>(problem.total_q);
  p.total_kv = static_cast<int>(problem.total_kv);
  p.band = math::BandRule::of(problem);
  p.scale = problem.scale();
  p.softcap = problem.softcap;
  // With the scale it stays finite, so that products of 0 stay 0.
  p.per_softcap = std::min(1.0F / std::max(problem.softcap, std::numeric_limits<float>::min()),
                           0.5F * std::numeric_limits<float>::max() / std::max(1.0F, std::abs(p.scale)));
  expand_softcap(p);
  p.keep_threshold = dispatch::keep_threshold(problem.dropout.probability);
  p.keep_scale = 65536.0F / static_cast<float>(p.keep_threshold);
  p.seed = problem.dropout.seed;
  p.offset = problem.dropout.offset;
}

void attach_inputs(CallParams& p, const Inputs& in) {
  if (in.dropout_draws) p.seed = in.dropout_draws->seed, p.offset = in.dropout_draws->offset;
  p.q_lengths = index_view(in.q_lengths);
  p.kv_lengths = index_view(in.kv_lengths);
  p.cu_seqlens_q = index_view(in.cu_seqlens_q);
  p.cu_seqlens_kv = index_view(in.cu_seqlens_kv);
  p.q = row_view(in.q);
  p.k = row_view(in.k);
  p.v = row_view(in.v);
  const auto in_pieces = [](const RowView& view, int dim, const Tensor& t) {
    return view.aligned && dim * size_bytes(t.dtype) % 16 == 0 && view.row >= 0 && view.row < (std::int64_t{1} << 32);
  };
  p.in_pieces = in_pieces(p.k, p.head_dim, in.k) && in_pieces(p.v, p.head_dim_v, in.v);
  p.mask = entry_view(in.mask);
  p.bias = entry_view(in.bias);
  p.bias_in_runs = in_runs(in.bias);
  p.slopes = head_view(in.alibi_slopes);
  p.sink = head_view(in.sink).data;
}

PlannedLaunch::PlannedLaunch(jit::KernelRequest wanted, const Device& device) : request(std::move(wanted)) {
  if (device.compute_capability != 0) {  // a description: the report also says what cannot be compiled here
    try {
      binary = jit::Cache::shared().binary(request);
    } catch (const Error& error) {
      why_not_compiled = error.what();
    }
  } else {
    kernel = &jit::Cache::shared().load(request, device.index);
  }
}

std::string PlannedLaunch::describe() const {
  if (!why_not_compiled.empty()) return request.name + ": not compiled, " + why_not_compiled;
  const jit::Binary& compiled = kernel != nullptr ? kernel->binary() : *binary;
  return request.name + ": " + std::to_string(compiled.registers) + " registers, " +
         std::to_string(request.shared_bytes + compiled.shared_bytes) + " bytes of shared memory, " +
         std::to_string(request.threads) + " threads, from " + jit::name(compiled.source);
}

void require_gpu(const PlannedLaunch& launch, const Device& device) {
  if (launch.kernel != nullptr) return;
  throw Error(ErrorCode::kInvalidArgument,
              "this plan is for " + name(device) + ", a description; plan for cuda:0 to execute");
}

Combining::Combining(std::int64_t splits, Type type, bool dropout, bool by_warps, const Device& device, int arch)
    : splits_(splits), rows_(by_warps ? kMostSplits / 32 : 1) {
  if (splits > 1) launch_.emplace(combine_request(type, dropout, by_warps, arch), device);
}

void Combining::describe(std::vector<std::pair<std::string, std::string>>& details) const {
  details.emplace_back("key splits", std::to_string(splits_));
  if (launch_) details.emplace_back("combine", launch_->describe());
}

void Combining::run(const ForwardParams& p, void* stream) const {
  if (!launch_) return;
  launch_->kernel->launch({.x = static_cast<unsigned>(ceil_div(std::int64_t{p.batch} * p.q_heads * p.seqlen_q, rows_)),
                           .y = static_cast<unsigned>(p.v_chunks),
                           .threads = static_cast<unsigned>(launch_->request.threads),
                           .early = launch_->request.early},
                          p, stream);
}

MaskWords::MaskWords(const Problem& problem, std::size_t workspace_bytes, const Device& device, int arch,
                     WordOrder order)
    : begin_((workspace_bytes + 127) / 128 * 128), bytes_(workspace_bytes), order_(order) {
  if (!problem.mask) return;
  launch_.emplace(mask_words_request(arch), device);
  CallParams p{};
  describe_call(problem, p);
  const WordView view = word_view(p, order_, problem.mask->batch, problem.mask->heads, problem.mask->queries);
  bytes_ = begin_ + static_cast<std::size_t>(view.plane() * view.planes) * sizeof(u32);
}

void MaskWords::make(CallParams& p, void* workspace, void* stream) const {
  if (!launch_) return;
  WordView& view = p.mask_words;  // by strides: a dimension expanded by stride 0 is read once
  view = word_view(p, order_, p.mask.batch != 0, p.mask.head != 0, p.mask.query != 0);
  view.data = reinterpret_cast<u32*>(static_cast<std::byte*>(workspace) + begin_);
  if (view.plane() == 0) return;
  launch_->kernel->launch({.x = static_cast<unsigned>(view.spans() * view.groups()),
                           .y = static_cast<unsigned>(std::min<std::int64_t>(view.planes, kMostInGrid)),
                           .z = static_cast<unsigned>(ceil_div(view.planes, kMostInGrid)),
                           .threads = static_cast<unsigned>(launch_->request.threads),
                           .shared_bytes = 0,
                           .early = launch_->request.early},
                          p, stream);
}

void refuse_device(const Device& device, bool (*runs_on)(int capability), const char* made_for, Verdict& verdict) {
  auto& reasons = verdict.reasons;
  if (device.kind != DeviceKind::kCuda) {
    reasons.emplace_back("it runs on NVIDIA GPUs only, and the tensors are on " + name(device));
  } else if (device.compute_capability == 0 && !why_no_driver().empty()) {
    reasons.push_back(why_no_driver());
  } else if (const int capability = capability_of(device); !runs_on(capability)) {
    reasons.emplace_back("it is made for " + std::string(made_for) + ", and " + name(device) + " has " +
                         std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
  verdict.available = reasons.empty();
}

void limit(Verdict& verdict, const char* what, std::int64_t value, std::int64_t most) {
  if (value <= most) return;
  verdict.reasons.emplace_back(std::string(what) + " (" + std::to_string(value) + ") is above " + std::to_string(most));
}

void refuse_long(const Problem& problem, Verdict& verdict) {
  limit(verdict, "seqlen_q", problem.seqlen_q, kLongest);
  limit(verdict, "seqlen_kv", problem.seqlen_kv, kLongest);
  limit(verdict, "total_q", problem.total_q, kLongest);
  limit(verdict, "total_kv", problem.total_kv, kLongest);
  limit(verdict, "batch × num_q_heads", problem.batch * problem.num_q_heads, kLongest);
  // Kernels that pack the heads of a group count rows of all of them.
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  limit(verdict, "total_q × num_q_heads / num_kv_heads", problem.total_q * group, std::numeric_limits<int>::max());
}

GpuModel model_of_device(const Device& device) {
  GpuModel model = model_of(capability_of(device));
  if (device.compute_capability == 0) {
    model.multiprocessors = gpu(device.index).sm_count;
    model.shared_bytes = gpu(device.index).shared_bytes_per_block;
    model.l2_bytes = gpu(device.index).l2_bytes;
    model.choices = &jit::Cache::shared().tiles(gpu(device.index).name);
  }
  return model;
}

}  // namespace fovea::cuda
