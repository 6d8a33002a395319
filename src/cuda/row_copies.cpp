#include "cuda/row_copies.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>

#include "dispatch/views.h"

namespace fovea::cuda {
namespace {

constexpr std::int64_t kPiece = 16;      // bytes
constexpr double kWorthwhile = 1 << 20;  // elements of k and v from which on copies pay (docs/notes)

std::size_t aligned(std::size_t bytes) { return (bytes + 127) / 128 * 128; }

/// A copy of as many rows as are told apart by strides.
RowCopy row_copy(const RowView& from, const RowView& to, int sequences, int heads, int rows, std::int64_t bytes,
                 std::int64_t written) {
  constexpr u64 kWord = 4;
  const auto places = [](const RowView& view) {
    return reinterpret_cast<std::uintptr_t>(view.data) | static_cast<u64>(view.batch | view.head | view.row);
  };
  return {.from = from,
          .to = to,
          .planes = heads * sequences,
          .heads = heads,
          .rows = rows,
          .chunks = static_cast<int>(ceil_div(written, kCopiedBytes)),
          .bytes = static_cast<int>(bytes),
          .written = static_cast<int>(written),
          .in_words = (places(from) | places(to) | static_cast<u64>(bytes)) % kWord == 0};
}

std::int64_t whole(std::int64_t dim, DType dtype) { return math::round_up(dim, kPiece / size_bytes(dtype)); }

/// A pass with copies of what a caller gives and wants, whose rows have zeros behind them.
class PaddedPlan final : public PlannedKernel {
 public:
  PaddedPlan(const Problem& problem, std::shared_ptr<const PlannedKernel> plan, const Device& device, int arch)
      : problem_(problem), plan_(std::move(plan)), device_(device), copying_(device, arch) {
    const bool backward = problem.direction == Direction::kBackward;
    for (const auto& [given, of_keys, is_v] : kGiven) {
      if (backward || (given != &Inputs::out && given != &Inputs::dout)) add(given_, given, of_keys, is_v);
    }
    for (const auto& [wanted, of_keys, is_v] : kWanted) {
      if (backward == (wanted != &Outputs::out)) add(wanted_, wanted, of_keys, is_v);
    }
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return begin_ + plan_->workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    auto list = plan_->details();
    std::string dims = std::to_string(whole(problem_.head_dim, problem_.dtype));
    if (problem_.head_dim_v != problem_.head_dim)
      dims += " and " + std::to_string(whole(problem_.head_dim_v, problem_.dtype));
    list.emplace_back("rows padded", "to " + dims + " columns by " + copying_.describe());
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    Inputs in = inputs;
    Outputs out = outputs;
    std::array<RowCopy, kMostCopies> copies{};
    std::size_t count = 0;
    const auto run = [&] { copying_.run(std::span(copies).first(std::exchange(count, 0)), device_, stream); };
    for (const auto& place : given_) {
      Tensor& tensor = in.*place.of;
      const Tensor to = padded_tensor(tensor, place, workspace);
      copies.at(count++) = copy(tensor, to);
      tensor = to;
    }
    run();
    for (const auto& place : wanted_) out.*place.of = padded_tensor(outputs.*place.of, place, workspace);
    plan_->execute(in, out, static_cast<std::byte*>(workspace) + begin_, stream);
    for (const auto& place : wanted_) copies.at(count++) = copy(out.*place.of, outputs.*place.of);
    run();
  }

 private:
  /// A tensor of a call, and where its copy begins in the workspace.
  template <class Call>
  struct Place {
    Tensor Call::*of;
    std::int64_t columns;
    std::size_t begin;
  };
  template <class Call>
  struct Kind {
    Tensor Call::*of;
    bool of_keys, is_v;
  };
  static constexpr std::array<Kind<Inputs>, 5> kGiven{{{&Inputs::q, false, false},
                                                       {&Inputs::k, true, false},
                                                       {&Inputs::v, true, true},
                                                       {&Inputs::out, false, true},
                                                       {&Inputs::dout, false, true}}};
  static constexpr std::array<Kind<Outputs>, 4> kWanted{{{&Outputs::out, false, true},
                                                         {&Outputs::dq, false, false},
                                                         {&Outputs::dk, true, false},
                                                         {&Outputs::dv, true, true}}};

  template <class Call>
  void add(std::vector<Place<Call>>& places, Tensor Call::*of, bool of_keys, bool is_v) {
    const Problem& p = problem_;
    const std::int64_t dim = is_v ? p.head_dim_v : p.head_dim, columns = whole(dim, p.dtype);
    if (columns == dim) return;
    const std::int64_t heads = of_keys ? p.num_kv_heads : p.num_q_heads, total = of_keys ? p.total_kv : p.total_q,
                       seqlen = of_keys ? p.seqlen_kv : p.seqlen_q, rows = p.packed() ? total : p.batch * seqlen;
    places.push_back({of, columns, begin_});
    begin_ = aligned(begin_ + static_cast<std::size_t>(heads * rows * columns * size_bytes(p.dtype)));
  }

  /// [batch][head][row][column], seen as the caller's tensor.
  template <class Call>
  [[nodiscard]] static Tensor padded_tensor(Tensor t, const Place<Call>& place, void* workspace) {
    t.data = static_cast<std::byte*>(workspace) + place.begin;
    const auto rank = static_cast<std::size_t>(t.rank);
    t.shape.at(rank - 1) = place.columns;
    t.strides.at(rank - 1) = 1;
    t.strides.at(rank - 3) = place.columns;
    t.strides.at(rank - 2) = place.columns * t.shape.at(rank - 3);
    if (t.rank == 4) t.strides[0] = t.strides[2] * t.shape[2];
    return t;
  }

  /// All columns of `to`; those that `from` lacks become 0.
  [[nodiscard]] static RowCopy copy(const Tensor& from, const Tensor& to) {
    const auto rank = static_cast<std::size_t>(from.rank);
    const std::int64_t size = size_bytes(from.dtype), columns = to.shape.at(rank - 1),
                       real = std::min(from.shape.at(rank - 1), columns);
    return row_copy(dispatch::row_view(from), dispatch::row_view(to),
                    from.rank == 4 ? static_cast<int>(from.shape[0]) : 1, static_cast<int>(from.shape.at(rank - 2)),
                    static_cast<int>(from.shape.at(rank - 3)), real * size, columns * size);
  }

  Problem problem_;
  std::shared_ptr<const PlannedKernel> plan_;
  Device device_;
  CopyingRows copying_;
  std::size_t begin_ = 0;  // of the other plan's workspace, behind the copies
  std::vector<Place<Inputs>> given_;
  std::vector<Place<Outputs>> wanted_;
};

}  // namespace

jit::KernelRequest copy_rows_request(int arch) {
  return jit::render({.function = "copy_rows",
                      .header = "cuda/kernels/copy_rows.cuh",
                      .spec = "ForwardSpec",
                      .params = "CopyRowsParams",
                      .threads = kCopyThreads,
                      .early = true},
                     ForwardSpec{}, arch);
}

CopyingRows::CopyingRows(const Device& device, int arch) : launch_(copy_rows_request(arch), device) {}

void CopyingRows::run(std::span<const RowCopy> copies, const Device& device, void* stream) const {
  require_gpu(launch_, device);
  CopyRowsParams params{};
  std::ranges::copy(copies, params.copies);
  std::int64_t blocks = 0, planes = 0;
  for (const RowCopy& copy : copies) {
    blocks = std::max(blocks, ceil_div(copy.rows, kCopiedRows) * copy.chunks);
    planes = std::max<std::int64_t>(planes, copy.planes);
  }
  if (blocks == 0 || planes == 0) return;
  launch_.kernel->launch({.x = static_cast<unsigned>(blocks),
                          .y = static_cast<unsigned>(std::min(planes, kMostInGrid)),
                          .z = static_cast<unsigned>(copies.size()),
                          .threads = kCopyThreads,
                          .shared_bytes = 0,
                          .early = launch_.request.early},
                         params, stream);
}

bool copies_bias(const Problem& problem) {
  const std::int64_t row_bytes = problem.seqlen_kv * size_bytes(problem.bias_dtype);
  return problem.bias && problem.bias->keys && row_bytes % kPiece != 0 &&
         row_bytes <= std::numeric_limits<int>::max() - kCopiedBytes;  // the kernel counts them in 32 bits
}

AlignedBias::AlignedBias(const Problem& problem, std::size_t workspace_bytes, const Device& device)
    : device_(device), begin_(aligned(workspace_bytes)), bytes_(workspace_bytes) {
  if (!copies_bias(problem)) return;
  copying_.emplace(device, kSm90);
  const auto& own = *problem.bias;
  row_bytes_ = problem.seqlen_kv * size_bytes(problem.bias_dtype);
  const std::int64_t rows =
      (own.batch ? problem.batch : 1) * (own.heads ? problem.num_q_heads : 1) * (own.queries ? problem.seqlen_q : 1);
  bytes_ = begin_ + static_cast<std::size_t>(rows * math::round_up(row_bytes_, kPiece));
}

void AlignedBias::describe(std::vector<std::pair<std::string, std::string>>& details) const {
  if (copying_) details.emplace_back("bias", "copied to aligned rows by " + copying_->describe());
}

void AlignedBias::make(CallParams& p, void* workspace, void* stream) const {
  EntryView& view = p.bias;
  if (!copying_ || view.key * p.seqlen_kv != row_bytes_) return;
  const std::int64_t starts =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(view.data)) | view.batch | view.head | view.query;
  if (starts % kPiece == 0) return;
  const int heads = view.head != 0 ? p.q_heads : 1, sequences = view.batch != 0 ? p.batch : 1,
            rows = view.query != 0 ? p.seqlen_q : 1;
  const std::int64_t pitch = math::round_up(row_bytes_, kPiece), plane = rows * pitch;
  char* const data = static_cast<char*>(workspace) + begin_;
  const EntryView to{data, view.batch != 0 ? plane * heads : 0, view.head != 0 ? plane : 0, view.query != 0 ? pitch : 0,
                     view.key};
  const auto rows_of = [](const EntryView& of, bool pieces) {
    return RowView{of.data, of.batch, of.query, of.head, pieces};
  };
  const RowCopy copy = row_copy(rows_of(view, false), rows_of(to, true), sequences, heads, rows, row_bytes_, pitch);
  copying_->run({&copy, 1}, device_, stream);
  view = to;
  p.bias_in_runs = true;
}

Problem padded(const Problem& problem) {
  const std::int64_t head_dim = whole(problem.head_dim, problem.dtype),
                     head_dim_v = whole(problem.head_dim_v, problem.dtype);
  const double keys = problem.packed() ? static_cast<double>(problem.total_kv)
                                       : static_cast<double>(problem.batch) * static_cast<double>(problem.seqlen_kv);
  const auto columns = static_cast<double>(problem.num_kv_heads * (problem.head_dim + problem.head_dim_v));
  const bool few = keys * columns < kWorthwhile;
  if ((head_dim == problem.head_dim && head_dim_v == problem.head_dim_v) || few) return problem;
  Problem wide = problem;
  wide.softmax_scale = problem.scale();
  wide.head_dim = head_dim;
  wide.head_dim_v = head_dim_v;
  return wide;
}

std::shared_ptr<const PlannedKernel> plan_by_padded(const Problem& problem, std::shared_ptr<const PlannedKernel> plan,
                                                    const Device& device, int arch) {
  if (padded(problem) == problem) return plan;
  return std::make_shared<PaddedPlan>(problem, std::move(plan), device, arch);
}

}  // namespace fovea::cuda
