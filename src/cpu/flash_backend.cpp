#include "cpu/flash_backend.h"

#include <fovea/error.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <bit>
#include <cstdlib>

#include "cpu/threads.h"
#include "dispatch/views.h"

namespace fovea::cpu {
namespace {

using math::ceil_div, math::round_up;

using dispatch::entry_view, dispatch::row_view, dispatch::head_view, dispatch::stat_view;

struct Isa {
  const char* name;
  const char* needs;  // CPU features, for the report
  bool present;
  const FlashKernels* kernels;
};

#ifdef __x86_64__
/// Leaf 7 of cpuid: not every compiler's __builtin_cpu_supports knows all of its bits.
struct Leaf7 {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf7(unsigned subleaf) { __get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool has_avx512_bf16() { return (Leaf7(1).eax >> 5 & 1U) != 0; }

/// AMX is there, and Linux lets this process use it, which has to be asked for.
bool may_use_amx() {
  const unsigned features = Leaf7(0).edx;
  if ((features >> 22 & 1U) == 0 || (features >> 24 & 1U) == 0) return false;
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

/// Every instruction set compiled in, best first.
const std::vector<Isa>& isas() {
  static const auto& list = *[] {  // kept: threads may call at exit
    auto all = std::make_unique<std::vector<Isa>>();
#ifdef __x86_64__
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C, whose name clang 14 does not know.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && has_avx512_bf16();
    all->push_back(
        {"amx", "AVX-512 BF16 and AMX BF16, or the system's leave to use them", bf16 && may_use_amx(), &amx::kernels});
    all->push_back({"avx512_bf16", "AVX-512 F, BW, DQ, VL and BF16", bf16, &avx512_bf16::kernels});
    all->push_back({"avx512", "AVX-512 F, BW, DQ and VL", avx512, &avx512::kernels});
    // On Intel's processors a dot product of pairs takes as long as four FMAs: floats are twice as fast.
    if (__builtin_cpu_is("intel")) std::swap(all->at(1), all->at(2));
    all->push_back({"avx2", "AVX2, FMA and F16C", avx2, &avx2::kernels});
#endif
    all->push_back({"portable", "nothing", true, &portable::kernels});
    return all.release();
  }();
  return list;
}

/// What FOVEA_CPU_ISA names; empty where it is not set.
std::string pinned_isa() {
  const char* set = std::getenv("FOVEA_CPU_ISA");
  std::string name = set == nullptr ? "" : set, names;
  for (const Isa& isa : isas()) {
    if (name.empty() || name == isa.name) return name;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw Error(ErrorCode::kInvalidArgument,
              "FOVEA_CPU_ISA ('" + name + "') is no instruction set of this build; set it to one of " + names);
}

Element element(DType dtype) {
  if (dtype == DType::kFloat16) return Element::kFloat16;
  return dtype == DType::kBFloat16 ? Element::kBFloat16 : Element::kFloat32;
}

std::int32_t value(const Tensor& t, i64 index) {
  return static_cast<const std::int32_t*>(t.data)[index * t.strides[0]];
}

/// What a problem says of a call; `attach_tensors` adds what its tensors say.
FlashCall describe_call(const Problem& problem) {
  FlashCall call;
  call.type = element(problem.dtype);
  call.bias_type = element(problem.bias_dtype);
  call.batch = problem.batch;
  call.q_heads = problem.num_q_heads;
  call.kv_heads = problem.num_kv_heads;
  call.head_dim = problem.head_dim;
  call.head_dim_v = problem.head_dim_v;
  call.scale = problem.scale();
  call.softcap = problem.softcap;
  call.alibi = problem.alibi != Alibi::kNone;
  call.keep_threshold = dispatch::keep_threshold(problem.dropout.probability);
  call.seed = problem.dropout.seed;
  call.offset = problem.dropout.offset;
  return call;
}

void attach_tensors(FlashCall& call, bool backward, const Inputs& in, const Outputs& out) {
  if (in.dropout_draws) call.seed = in.dropout_draws->seed, call.offset = in.dropout_draws->offset;
  call.q = row_view(in.q);
  call.k = row_view(in.k);
  call.v = row_view(in.v);
  call.out = row_view(backward ? in.out : out.out);
  call.lse = stat_view(backward ? in.lse : out.lse);
  call.mask = entry_view(in.mask);
  call.bias = entry_view(in.bias);
  call.slopes = head_view(in.alibi_slopes);
  call.sink = head_view(in.sink).data;
  if (!backward) return;
  call.dout = row_view(in.dout);
  call.dlse = stat_view(in.dlse);
  call.dq = row_view(out.dq);
  call.dk = row_view(out.dk);
  call.dv = row_view(out.dv);
  call.dbias = entry_view(out.dbias);
  call.dslopes = head_view(out.dalibi_slopes);
  call.dsink = head_view(out.dsink).data;
}

/// Where each sequence lies and what its rows see.
void describe_sequences(const Problem& problem, const Inputs& in, Sequence* sequences) {
  const i64 group = problem.num_q_heads / problem.num_kv_heads;
  i64 groups = 0;
  for (i64 b = 0; b < problem.batch; ++b) {
    Sequence s;
    s.q_begin = problem.packed() ? value(in.cu_seqlens_q, b) : 0;
    s.kv_begin = problem.packed() ? value(in.cu_seqlens_kv, b) : 0;
    s.q_rows = problem.packed() ? value(in.cu_seqlens_q, b + 1) - s.q_begin : problem.seqlen_q;
    s.kv_rows = problem.packed() ? value(in.cu_seqlens_kv, b + 1) - s.kv_begin : problem.seqlen_kv;
    s.first_group = groups;
    groups += ceil_div(s.q_rows * group, kGroupRows);
    s.band = math::Band::of(math::BandRule::of(problem), in.q_lengths.defined() ? value(in.q_lengths, b) : s.q_rows,
                            in.kv_lengths.defined() ? value(in.kv_lengths, b) : s.kv_rows);
    sequences[b] = s;
  }
}

// How work is cut.  What changes the order of additions (key splits, key blocks) depends on the problem alone, never on
// the number of threads: the same bits on any number of them.
constexpr i64 kEnoughTasks = 64;       // for any number of threads
constexpr int kFewWorkers = 4;         // up to which all heads of some keys are one task in decoding
constexpr i64 kPieces = 4;             // that late blocks are cut into
constexpr i64 kBlockFloats = 1 << 18;  // of a block's rows of q and out, or k and v: 1 MiB of L2

/// The most rows of a block.  Larger ones outgrow L2; smaller ones pack and fetch keys more often.
i64 most_rows(const Problem& problem) { return kBlockFloats / (problem.head_dim + problem.head_dim_v); }

ForwardShape shape_forward(const Problem& problem, int workers, const FlashKernels& kernels) {
  ForwardShape shape;
  shape.workers = workers;
  shape.max_rows = problem.seqlen_q * (problem.num_q_heads / problem.num_kv_heads);
  const i64 heads = problem.batch * problem.num_kv_heads;
  shape.pairs = kernels.pairs && problem.dtype == DType::kBFloat16 && shape.max_rows > kernels.rows_in_place;
  const bool even = !math::BandRule::of(problem).bounded();
  const i64 tasks_a_worker = shape.pairs && even ? 2 : 4;  // so that workers end at about the same time
  const i64 shared = ceil_div(heads * shape.max_rows, tasks_a_worker * workers);
  shape.block_rows =
      round_up(std::max<i64>(1, std::min({most_rows(problem), shared, shape.max_rows})), kernels.panel_rows);
  shape.blocks = ceil_div(shape.max_rows, shape.block_rows);
  const i64 tasks = std::max<i64>(1, heads * ceil_div(shape.max_rows, kGroupRows));
  const i64 key_tiles = ceil_div(problem.seqlen_kv, kForwardKeys);
  const i64 splits = std::clamp<i64>(std::min(kEnoughTasks / tasks, key_tiles / 4), 1, kEnoughTasks);
  shape.keys_per_split = std::max<i64>(1, ceil_div(key_tiles, splits)) * kForwardKeys;
  const i64 vector = kernels.panel_rows / 3,
            rows = static_cast<i64>(std::bit_ceil(static_cast<std::uint64_t>(shape.max_rows)));
  if (rows <= vector && !shape.pairs) {
    shape.row_lanes = vector / std::max<i64>(rows, 1);
    // All heads of some keys are a task: the rows of one head alone lie apart in memory.
    const i64 of_all_heads = ceil_div(problem.seqlen_kv, ceil_div(kEnoughTasks, problem.batch + 1));
    if (of_all_heads >= 128) {
      if (workers <= kFewWorkers) shape.heads_a_task = problem.num_kv_heads;
      shape.keys_per_split = round_up(of_all_heads, kJoinedKeys);
    }
  }
  shape.key_splits = std::max<i64>(1, ceil_div(problem.seqlen_kv, shape.keys_per_split));
  shape.piece_rows = round_up(ceil_div(shape.block_rows, kPieces), kernels.panel_rows);
  // Under a causal rule the last blocks are short anyway.
  if (shape.key_splits == 1 && workers > 1 && even) shape.cut_blocks = std::min<i64>(workers, heads * shape.blocks);
  return shape;
}

BackwardShape shape_backward(const Problem& problem, int workers, const FlashKernels& kernels) {
  BackwardShape shape;
  shape.workers = workers;
  shape.max_queries = problem.seqlen_q;
  shape.max_keys = problem.seqlen_kv;
  const i64 heads = problem.batch * problem.num_kv_heads, group = problem.num_q_heads / problem.num_kv_heads;
  shape.pairs = kernels.pairs && problem.dtype == DType::kBFloat16;
  const Extent bias = problem.bias.value_or(Extent{});
  if (bias.queries && bias.keys && (bias.heads || kernels.panel_rows % group == 0))  // no query in two panels
    shape.bias_sharers = (bias.batch ? 1 : problem.batch) * (bias.heads ? 1 : problem.num_kv_heads);
  const i64 shared = ceil_div(heads * shape.max_keys, kEnoughTasks);
  const auto whole_tiles = [](i64 keys) { return std::max(kKeyTile, round_up(keys, kKeyTile)); };
  const i64 most = shape.bias_sharers > 1 ? kBiasKeys : shared;
  shape.blocks = ceil_div(shape.max_keys, whole_tiles(std::min({most_rows(problem) / 2, shared, most})));
  shape.block_keys = whole_tiles(ceil_div(shape.max_keys, std::max<i64>(1, shape.blocks)));  // as even as can be
  shape.blocks = ceil_div(shape.max_keys, shape.block_keys);
  shape.max_groups = ceil_div(problem.seqlen_q * group, kGroupRows);
  shape.total_groups =
      problem.packed() ? problem.total_q * group / kGroupRows + problem.batch : problem.batch * shape.max_groups;
  return shape;
}

class FlashPlan final : public PlannedKernel {
 public:
  FlashPlan(const Problem& problem, const Isa& isa, int workers)
      : problem_(problem),
        isa_(isa),
        call_(describe_call(problem)),
        sequences_bytes_(static_cast<std::size_t>(round_up(problem.batch * i64{sizeof(Sequence)}, 64))) {
    if (problem.direction == Direction::kBackward) {
      backward_ = shape_backward(problem, workers, *isa.kernels);
      workspace_bytes_ = sequences_bytes_ + isa.kernels->backward(call_, backward_, nullptr);
    } else {
      forward_ = shape_forward(problem, workers, *isa.kernels);
      workspace_bytes_ = sequences_bytes_ + isa.kernels->forward(call_, forward_, nullptr);
    }
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return workspace_bytes_; }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    const auto text = [](i64 n) { return std::to_string(n); };
    std::vector<std::pair<std::string, std::string>> list = {{"instruction set", isa_.name}};
    if (problem_.direction == Direction::kBackward) {
      list.emplace_back("block", text(backward_.block_keys) + " keys, in tiles of " + text(kGroupRows) + " rows × " +
                                     text(kKeyTile) + " keys");
    } else {
      list.emplace_back("block", text(forward_.block_rows) + " rows, in tiles of " + text(isa_.kernels->panel_rows) +
                                     " rows × " + text(kForwardKeys) + " keys");
      list.emplace_back("key splits", text(forward_.key_splits));
    }
    list.emplace_back("threads",
                      text(problem_.direction == Direction::kBackward ? backward_.workers : forward_.workers));
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* /*stream*/) const override {
    FlashCall call = call_;
    const bool backward = problem_.direction == Direction::kBackward;
    attach_tensors(call, backward, inputs, outputs);
    auto* memory = static_cast<std::byte*>(workspace);
    auto* sequences = reinterpret_cast<Sequence*>(memory);
    describe_sequences(problem_, inputs, sequences);
    call.sequences = sequences;
    if (backward) {
      isa_.kernels->backward(call, backward_, memory + sequences_bytes_);
    } else {
      isa_.kernels->forward(call, forward_, memory + sequences_bytes_);
    }
  }

 private:
  Problem problem_;
  const Isa& isa_;
  FlashCall call_;
  ForwardShape forward_;
  BackwardShape backward_;
  std::size_t sequences_bytes_;
  std::size_t workspace_bytes_ = 0;
};

class FlashBackend final : public Backend {
 public:
  explicit FlashBackend(const Isa& isa) : isa_(isa) {}

  [[nodiscard]] std::string name() const override { return std::string("cpu_") + isa_.name; }

  [[nodiscard]] Verdict judge(const Problem& problem, const Device& device) const override {
    Verdict verdict{.backend = name()};
    if (device.kind != DeviceKind::kCpu)
      verdict.reasons.push_back("it runs on CPUs only, and the tensors are on " + fovea::name(device));
    if (!isa_.present) verdict.reasons.push_back(std::string("this CPU lacks ") + isa_.needs);
    const std::string pinned = pinned_isa();
    if (!pinned.empty() && pinned != isa_.name) {
      verdict.reasons.push_back("FOVEA_CPU_ISA=" + pinned + " pins another instruction set");
    }
    verdict.available = verdict.reasons.empty();
    const i64 length = std::max(problem.seqlen_q, problem.seqlen_kv) + 1, most = i64{1} << 44;
    if (problem.batch * length > most / problem.num_q_heads)  // the size of its workspace might not fit 64 bits
      verdict.reasons.emplace_back("sequences of all heads hold more than 2^44 rows, which no memory does");
    return verdict;
  }

  [[nodiscard]] std::shared_ptr<const PlannedKernel> plan(const Problem& problem, const Device& /*device*/,
                                                          const PlanOptions& options) const override {
    return std::make_shared<FlashPlan>(problem, isa_, worker_count(options.num_threads));
  }

 private:
  const Isa& isa_;
};

}  // namespace

std::vector<std::unique_ptr<const Backend>> make_flash_backends() {
  std::vector<std::unique_ptr<const Backend>> backends;
  for (const Isa& isa : isas()) backends.push_back(std::make_unique<FlashBackend>(isa));
  return backends;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.present) names.emplace_back(isa.name);
  }
  return names;
}

const FlashKernels& flash_kernels(const std::string& isa) {
  for (const Isa& each : isas()) {
    if (each.present && isa == each.name) return *each.kernels;
  }
  throw Error(ErrorCode::kInvalidArgument, "instruction set '" + isa + "' is not one this CPU has; ask `fovea doctor`");
}

}  // namespace fovea::cpu
