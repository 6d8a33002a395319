#include "workload.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "cpu/elements.h"
#include "cpu/threads.h"
#include "problem/refuse.h"
#include "random.h"

namespace fovea::tools {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kPoison = 0xff;  // four or two such bytes are a NaN of every floating type
constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kShare = 1 << 16;  // elements that a thread makes at a time

/// Streams of random numbers, one a purpose, so that no tensor's values depend on which others there are.
enum Stream : std::uint64_t {
  kGaps,
  kSpread,
  kValueHabits,
  kPoisonHabits,
  kOutputHabits,
  kLengthsQ,
  kLengthsKv,
  kSlotsQ,
  kSlotsKv,
  kQ,
  kK,
  kV,
  kMask,
  kMaskBlocks,
  kBias,
  kHiddenBias,
  kSlopes,
  kSink,
  kDout,
  kDlse,
  kVisibleNaN,
  kMaskTiles,
};

std::uint64_t checksum_of(const std::byte* begin, std::size_t bytes) {
  std::uint64_t sum = 0xcbf29ce484222325;
  for (std::size_t i = 0; i < bytes; ++i) sum = (sum ^ std::to_integer<std::uint64_t>(begin[i])) * 0x100000001b3;
  return sum;
}

/// A length of each sequence, now and then 0 or all of its slot.
std::vector<std::int64_t> random_lengths(const std::vector<std::int64_t>& slots, Draw draw) {
  std::vector<std::int64_t> lengths;
  for (const std::int64_t slot : slots) {
    const std::int64_t kind = draw.between(0, 7), length = draw.between(0, slot);
    lengths.push_back(kind == 0 ? 0 : kind <= 2 ? slot : length);
  }
  return lengths;
}

/// Slots that hold `total` rows, the longest of them `longest`, none shorter than its `least`.
std::vector<std::int64_t> random_slots(std::vector<std::int64_t> least, std::int64_t longest, std::int64_t total,
                                       Draw draw) {
  std::vector<std::int64_t> slots = std::move(least);
  const std::int64_t batch = std::ssize(slots);
  std::int64_t left = total - std::accumulate(slots.begin(), slots.end(), std::int64_t{0});
  std::int64_t full = draw.between(0, batch - 1);  // the longest one
  if (longest - slots[full] > left) full = std::max_element(slots.begin(), slots.end()) - slots.begin();
  left -= longest - slots[full];
  slots[full] = longest;
  if (left < 0) {
    refuse("packed sequences of ", total, " rows cannot hold the lengths that the line states; state less");
  }
  std::int64_t room = batch * longest - std::accumulate(slots.begin(), slots.end(), std::int64_t{0});
  for (std::int64_t& slot : slots) {
    const std::int64_t own = longest - slot;
    room -= own;  // what the slots after this one can take
    const std::int64_t more = draw.between(std::max<std::int64_t>(0, left - room), std::min(own, left));
    slot += more;
    left -= more;
  }
  return slots;
}

/// The problem with every length that is known only at run time made definite.
Problem definite(Problem p, std::uint64_t seed) {
  const bool alike = p.packed_q == p.packed_kv && p.seqlen_q == p.seqlen_kv && p.total_q == p.total_kv;
  const auto least = [&](const Lengths& own, const Lengths& other) {
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(p.batch));
    for (std::size_t b = 0; b < own.values.size(); ++b) lengths[b] = own.values[b];
    for (std::size_t b = 0; alike && b < other.values.size(); ++b) lengths[b] = std::max(lengths[b], other.values[b]);
    return lengths;
  };
  const auto fill_slots = [&](Lengths& slots, std::vector<std::int64_t> lengths, std::int64_t longest,
                              std::int64_t total, Stream stream) {
    if (!slots.present || !slots.values.empty()) return;
    slots.values = random_slots(std::move(lengths), longest, total, Draw(seed, stream));
  };
  fill_slots(p.packed_q, least(p.q_lengths, p.kv_lengths), p.seqlen_q, p.total_q, kSlotsQ);
  fill_slots(p.packed_kv, least(p.kv_lengths, p.q_lengths), p.seqlen_kv, p.total_kv, alike ? kSlotsQ : kSlotsKv);

  const auto fill_lengths = [&](Lengths& lengths, const Lengths& slots, std::int64_t seqlen, Stream stream) {
    if (!lengths.present || !lengths.values.empty()) return;
    lengths.values = random_lengths(
        slots.present ? slots.values : std::vector<std::int64_t>(static_cast<std::size_t>(p.batch), seqlen),
        Draw(seed, stream));
  };
  fill_lengths(p.q_lengths, p.packed_q, p.seqlen_q, kLengthsQ);
  fill_lengths(p.kv_lengths, p.packed_kv, p.seqlen_kv, kLengthsKv);
  return p;
}

std::vector<std::int64_t> running_sum(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> ends{0};
  for (const std::int64_t length : lengths) ends.push_back(ends.back() + length);
  return ends;
}

}  // namespace

std::vector<double> Workload::read(const Tensor& tensor) { return cpu::load_all(tensor); }

/// Makes the tensors of one workload.
class Workload::Maker {
 public:
  Maker(Workload& work, std::uint64_t seed, Data data)
      : work_(work),
        p_(work.problem_),
        seed_(seed),
        hostile_(data == Data::kHostile),
        gaps_(seed, kGaps),
        spread_(hostile_ && Draw(seed, kSpread).chance(0.75)) {}

  void make_inputs() {
    Inputs& in = work_.inputs_;
    Draw habits(seed_, kValueHabits);
    const double sharpness = hostile_ && habits.chance(0.3) ? static_cast<double>(habits.between(2, 6)) : 1.0;
    make_qkv(in.q, in.k, in.v, false);
    fill_normal(in.q, kQ, sharpness);
    fill_normal(in.k, kK);
    fill_normal(in.v, kV);
    if (p_.mask) make_mask(in.mask);
    if (p_.bias) make_bias(in.bias, habits);
    if (p_.alibi != Alibi::kNone) {
      in.alibi_slopes = make(DType::kFloat32, slopes_shape(), {0, 1}, false);
      fill(in.alibi_slopes,
           [random = Random(seed_, kSlopes)](std::int64_t i) { return 0.6 * random.uniform(i) - 0.1; });
    }
    if (p_.sink) {
      in.sink = make(DType::kFloat32, {p_.num_q_heads}, {0}, false);
      fill_normal(in.sink, kSink);
      if (hostile_ && habits.chance(0.05)) cpu::store(in.sink, 0, -kInfinity);
    }
    make_integers(in.q_lengths, p_.q_lengths.present, p_.q_lengths.values);
    make_integers(in.kv_lengths, p_.kv_lengths.present, p_.kv_lengths.values);
    make_integers(in.cu_seqlens_q, p_.packed(), running_sum(p_.packed_q.values));
    make_integers(in.cu_seqlens_kv, p_.packed(), running_sum(p_.packed_kv.values));
    if (!p_.backward()) return;
    in.dout = make_rows(p_.num_q_heads, p_.head_dim_v, true, false);
    fill_normal(in.dout, kDout);
    if (hostile_ && habits.chance(0.25)) return;  // without dlse
    in.dlse = make_lse(false);
    fill_normal(in.dlse, kDlse);
  }

  /// Every element of q, k, v, bias and gradients that nothing visible depends on becomes NaN.
  void poison_inputs() {
    const bool everything = Draw(seed_, kPoisonHabits).chance(0.5);  // or only what lies past the lengths
    Inputs& in = work_.inputs_;
    const cpu::Operands x(p_, in);
    std::vector<char> row_used(x.q.size() / p_.head_dim), key_used(x.k.size() / p_.head_dim);
    std::vector<char> bias_used(x.bias.values.size());
    for_each_sequence_head(x, [&](const cpu::SequenceRows& s, std::int64_t b, std::int64_t h) {
      for (std::int64_t i = 0; i < s.len_q; ++i) {
        for (std::int64_t j = 0; j < s.len_kv; ++j) {
          if (everything && !x.visible(b, h, i, j)) continue;
          row_used[x.q_row(b, h, i)] = key_used[x.kv_row(b, h, j)] = 1;
          if (x.bias.present) bias_used[x.bias.at(b, h, i, j)] = 1;
        }
      }
    });
    poison_unused(in.q, row_used, p_.head_dim);
    poison_unused(in.k, key_used, p_.head_dim);
    poison_unused(in.v, key_used, p_.head_dim_v);
    poison_unused(in.dout, row_used, p_.head_dim_v);
    if (in.bias.defined()) {
      std::vector<char> keep = bias_used;
      for (std::size_t i = 0; i < keep.size(); ++i) keep[i] |= x.bias.values[i] < -2e38 ? 1 : 0;
      if (!broadcast_in_memory(in.bias)) poison_unused(in.bias, keep, 1);
    }
    if (in.dlse.defined()) {
      std::vector<char> used(x.dlse.size());
      for_each_sequence_head(x, [&](const cpu::SequenceRows& s, std::int64_t b, std::int64_t h) {
        for (std::int64_t i = 0; i < s.slot_q; ++i) used[x.lse_at(b, h, i)] = row_used[x.q_row(b, h, i)];
      });
      poison_unused(in.dlse, used, 1);
    }
    plant_visible_nan();
  }

  void make_outputs() {
    Outputs& out = work_.outputs_;
    Draw habits(seed_, kOutputHabits);
    const auto wanted = [&] { return !hostile_ || habits.chance(0.85); };  // optional results are left out now and then
    // A plain backward workload reads what the forward pass wrote here.
    if (p_.forward() || !hostile_) {
      out.out = make_rows(p_.num_q_heads, p_.head_dim_v, true, true);
      if (wanted() || p_.backward()) out.lse = make_lse(true);
    }
    if (!p_.backward()) return;
    make_qkv(out.dq, out.dk, out.dv, true);
    if (p_.bias && wanted()) out.dbias = make(p_.bias_dtype, matrix_shape(*p_.bias), {0, 1, 2, 3}, true);
    if (p_.alibi != Alibi::kNone && wanted()) out.dalibi_slopes = make(DType::kFloat32, slopes_shape(), {0, 1}, true);
    if (p_.sink && wanted()) out.dsink = make(DType::kFloat32, {p_.num_q_heads}, {0}, true);
    if (!hostile_) {
      work_.inputs_.out = out.out;
      work_.inputs_.lse = out.lse;
      return;
    }
    work_.inputs_.out = make_rows(p_.num_q_heads, p_.head_dim_v, true, false);
    work_.inputs_.lse = make_lse(false);
    cpu::store_all(work_.inputs_.out, work_.exact_->out);
    cpu::store_all(work_.inputs_.lse, work_.exact_->lse);
  }

 private:
  using Shape = std::vector<std::int64_t>;

  /// A tensor whose axes lie in memory in the given order, the slowest first, with gaps after rows, heads and so on.
  Tensor make(DType dtype, const Shape& shape, const std::vector<int>& order, bool written) {
    Tensor t;
    t.dtype = dtype;
    for (const std::int64_t extent : shape) t.shape[t.rank++] = extent;
    std::int64_t stride = 1;
    for (int n = t.rank - 1; n >= 0; --n) {
      t.strides[order[n]] = stride;
      stride = stride * t.shape[order[n]] + gap();
    }
    place(t, stride, written);
    return t;
  }

  /// An odd number of elements that belong to nobody.
  std::int64_t gap() { return spread_ ? 2 * gaps_.between(0, 2) + 1 : 0; }

  /// Memory for `elements` elements, and the view on it.
  void place(Tensor& t, std::int64_t elements, bool written) {
    const auto size = static_cast<std::size_t>(size_bytes(t.dtype));
    const std::size_t shift = spread_ ? size * static_cast<std::size_t>(gaps_.between(0, 3)) : 0;
    Buffer buffer;
    buffer.bytes = static_cast<std::size_t>(elements) * size;
    buffer.memory = std::make_unique_for_overwrite<std::byte[]>(buffer.bytes + kAlignment + shift);
    const auto address = reinterpret_cast<std::uintptr_t>(buffer.memory.get());
    buffer.begin = buffer.memory.get() + (kAlignment - address % kAlignment) % kAlignment + shift;
    buffer.written = written;
    std::memset(buffer.begin, kPoison, buffer.bytes);
    t.data = hostile_ && cpu::element_count(t) == 0 ? nullptr : buffer.begin;
    buffer.views.push_back(t);
    work_.buffers_.push_back(std::move(buffer));
  }

  /// [batch, seqlen, heads, dim] or [total, heads, dim] in the problem's layout.
  Tensor make_rows(std::int64_t heads, std::int64_t dim, bool query, bool written) {
    const bool heads_first = p_.layout == Layout::kBhsd;
    if (p_.packed()) {
      const std::vector<int> order = heads_first ? std::vector{1, 0, 2} : std::vector{0, 1, 2};
      return make(p_.dtype, {query ? p_.total_q : p_.total_kv, heads, dim}, order, written);
    }
    const std::vector<int> order = heads_first ? std::vector{0, 2, 1, 3} : std::vector{0, 1, 2, 3};
    return make(p_.dtype, {p_.batch, query ? p_.seqlen_q : p_.seqlen_kv, heads, dim}, order, written);
  }

  void make_qkv(Tensor& q, Tensor& k, Tensor& v, bool written) {
    const std::int64_t hq = p_.num_q_heads, hkv = p_.num_kv_heads, d = p_.head_dim, dv = p_.head_dim_v;
    if (p_.layout != Layout::kQkvPacked) {
      q = make_rows(hq, d, true, written);
      k = make_rows(hkv, d, false, written);
      v = make_rows(hkv, dv, false, written);
      return;
    }
    // One buffer: a token's row holds its q heads, then its k heads, then its v heads.
    const std::int64_t row = hq * d + hkv * (d + dv);
    Tensor all = p_.packed() ? make(p_.dtype, {p_.total_q, row}, {0, 1}, written)
                             : make(p_.dtype, {p_.batch, p_.seqlen_q, row}, {0, 1, 2}, written);
    const auto part = [&](std::int64_t heads, std::int64_t dim, std::int64_t first) {
      Tensor t = all;
      t.rank = all.rank + 1;
      t.shape[all.rank - 1] = heads;
      t.shape[all.rank] = dim;
      t.strides[all.rank - 1] = dim;
      t.strides[all.rank] = 1;
      if (t.data != nullptr) t.data = static_cast<std::byte*>(t.data) + first * size_bytes(p_.dtype);
      return t;
    };
    q = part(hq, d, 0);
    k = part(hkv, d, hq * d);
    v = part(hkv, dv, (hq + hkv) * d);
    work_.buffers_.back().views = {q, k, v};
  }

  Tensor make_lse(bool written) {
    if (p_.packed()) return make(DType::kFloat32, {p_.num_q_heads, p_.total_q}, {0, 1}, written);
    return make(DType::kFloat32, {p_.batch, p_.num_q_heads, p_.seqlen_q}, {0, 1, 2}, written);
  }

  [[nodiscard]] Shape matrix_shape(const Extent& own) const {
    return {own.batch ? p_.batch : 1, own.heads ? p_.num_q_heads : 1, own.queries ? p_.seqlen_q : 1,
            own.keys ? p_.seqlen_kv : 1};
  }
  [[nodiscard]] Shape slopes_shape() const {
    return p_.alibi == Alibi::kPerBatchAndHead ? Shape{p_.batch, p_.num_q_heads} : Shape{p_.num_q_heads};
  }

  /// A mask or bias, now and then with one of its own dimensions broadcast by stride 0.
  Tensor make_matrix(DType dtype, const Extent& own) {
    Shape shape = matrix_shape(own);
    const std::int64_t axis = gaps_.between(0, 31);
    if (!hostile_ || axis > 3 || shape[axis] < 2) return make(dtype, shape, {0, 1, 2, 3}, false);
    const std::int64_t extent = std::exchange(shape[axis], 1);
    Tensor t = make(dtype, shape, {0, 1, 2, 3}, false);
    t.shape[axis] = extent;
    t.strides[axis] = 0;
    return t;
  }

  static bool broadcast_in_memory(const Tensor& t) {
    for (int i = 0; i < t.rank; ++i) {
      if (t.strides[i] == 0) return true;
    }
    return false;
  }

  void make_mask(Tensor& mask) {
    mask = make_matrix(DType::kBool, *p_.mask);
    Draw draw(seed_, kMaskBlocks);
    const double kept = draw.one_of({0.9, 0.9, 0.5, 0.1});
    // Sometimes whole rows or whole runs of keys are hidden.
    const bool hide_rows = draw.chance(0.3), hide_keys = draw.chance(0.3);
    const std::int64_t first_row = draw.between(0, mask.shape[2]), rows = draw.between(0, 40);
    const std::int64_t first_key = draw.between(0, mask.shape[3]), keys = draw.between(0, 80);
    const std::int64_t width = mask.shape[3], height = mask.shape[2];
    // Many consist of blocks that are hidden, visible or mixed, so that kernels meet tiles of all three kinds.
    Draw blocks(seed_ + static_cast<std::uint64_t>(height * width), kMaskTiles);
    const bool blocky = hostile_ && blocks.chance(0.4);
    constexpr std::int64_t kSizes[] = {17, 32, 64, 100, 128, 192};
    const std::int64_t block_rows = blocks.one_of(kSizes), block_keys = blocks.one_of(kSizes);
    const Random kinds(blocks.bits());
    const double seen = hostile_ && blocks.chance(0.5) ? blocks.one_of({2.0, 128.0, 255.0}) : 1.0;  // any byte but 0
    fill(mask, [&, random = Random(seed_, kMask)](std::int64_t index) {
      const std::int64_t j = index % width, i = index / width % height;
      const double kind = blocky ? kinds.uniform((index / width - i + i / block_rows) * width + j / block_keys) : 1.0;
      if (kind < 0.7) return kind < 0.35 ? 0.0 : seen;
      const bool in_rows = hide_rows && height > 1 && i >= first_row && i < first_row + rows;
      const bool in_keys = hide_keys && width > 1 && j >= first_key && j < first_key + keys;
      return !in_rows && !in_keys && random.uniform(index) < kept ? seen : 0.0;
    });
  }

  void make_bias(Tensor& bias, Draw& habits) {
    bias = make_matrix(p_.bias_dtype, *p_.bias);
    const bool hides = habits.chance(0.5);
    // Far below 0, lse loses digits and exp of it underflows; only fp32 has the digits to be judged there.
    const double level = hostile_ && p_.dtype == DType::kFloat32 && habits.chance(0.1) ? -1000.0 : 0.0;
    const double hiding = habits.chance(0.5) ? -kInfinity : -0x1.fep127;  // bfloat16's lowest number hides, too
    fill(bias, [&, random = Random(seed_, kBias), hidden = Random(seed_, kHiddenBias)](std::int64_t i) {
      return hides && hidden.uniform(i) < 0.05 ? hiding : level + random.normal(i);
    });
  }

  void make_integers(Tensor& t, bool present, const std::vector<std::int64_t>& values) {
    if (!present) return;
    t = make(DType::kInt32, {std::ssize(values)}, {0}, false);
    fill(t, [&](std::int64_t i) { return static_cast<double>(values[i]); });
  }

  /// value(index) into every element, rows shared out among threads; where several are one in memory, the last one's.
  template <class Value>
  static void fill(const Tensor& t, const Value& value) {
    const int last = t.rank - 1;
    const std::int64_t width = t.shape[last], rows = width == 0 ? 0 : cpu::element_count(t) / width;
    const std::int64_t share = broadcast_in_memory(t) ? std::max<std::int64_t>(rows, 1) : 1 + kShare / (width + 1);
    auto fill_share = [&](std::int64_t n) {
      for (std::int64_t row = n * share; row < std::min((n + 1) * share, rows); ++row) {
        std::int64_t offset = 0, rest = row;
        for (int i = last - 1; i >= 0; rest /= t.shape[i--]) offset += rest % t.shape[i] * t.strides[i];
        for (std::int64_t j = 0; j < width; ++j) cpu::store(t, offset + j * t.strides[last], value(row * width + j));
      }
    };
    cpu::run_tasks((rows + share - 1) / share, cpu::worker_count(0),
                   [](void* fill_one, std::int64_t n, int) { (*static_cast<decltype(fill_share)*>(fill_one))(n); },
                   &fill_share);
  }
  void fill_normal(const Tensor& t, Stream stream, double deviation = 1.0) const {
    fill(t, [&, random = Random(seed_, stream)](std::int64_t i) { return deviation * random.normal(i); });
  }

  template <class Visit>
  void for_each_sequence_head(const cpu::Operands& x, const Visit& visit) const {
    for (std::int64_t b = 0; b < p_.batch; ++b) {
      for (std::int64_t h = 0; h < p_.num_q_heads; ++h) visit(x.sequences[b], b, h);
    }
  }

  /// NaN into every row of `width` elements that is not used.
  static void poison_unused(const Tensor& t, const std::vector<char>& used, std::int64_t width) {
    if (!t.defined()) return;
    cpu::for_each_element(t, [&](std::int64_t index, std::int64_t offset) {
      if (used[index / width] == 0) cpu::store(t, offset, kNaN);
    });
  }

  void plant_visible_nan() {
    Draw draw(seed_, kVisibleNaN);
    if (!draw.chance(0.06)) return;
    const Inputs& in = work_.inputs_;
    const Tensor& t = *draw.one_of({&in.q, &in.k, &in.v, &in.dout, &in.bias});
    const std::int64_t count = cpu::element_count(t);
    if (count == 0) return;
    const std::int64_t chosen = draw.between(0, count - 1);
    cpu::for_each_element(t, [&](std::int64_t index, std::int64_t offset) {
      if (index == chosen) cpu::store(t, offset, kNaN);
    });
  }

  Workload& work_;
  const Problem& p_;
  std::uint64_t seed_;
  bool hostile_;
  Draw gaps_;
  bool spread_;
};

Workload::Workload(const Problem& problem, std::uint64_t seed, Data data) : problem_(definite(problem, seed)) {
  Maker maker(*this, seed, data);
  maker.make_inputs();
  if (data == Data::kHostile) {
    maker.poison_inputs();
    operands_.emplace(problem_, inputs_);
    exact_ = cpu::reference(*operands_);
  }
  maker.make_outputs();
  if (data == Data::kPlain) return;
  for (Buffer& buffer : buffers_) buffer.checksum = checksum_of(buffer.begin, buffer.bytes);
}

std::vector<Allocation> Workload::allocations() const { return {buffers_.begin(), buffers_.end()}; }

void Workload::poison_outputs() {
  for (Buffer& buffer : buffers_) {
    if (buffer.written) std::memset(buffer.begin, kPoison, buffer.bytes);
  }
}

std::string Workload::damage() const {
  for (const Buffer& buffer : buffers_) {
    if (!buffer.written) {
      if (checksum_of(buffer.begin, buffer.bytes) != buffer.checksum) return "an input";
      continue;
    }
    std::vector<std::byte> gaps(buffer.begin, buffer.begin + buffer.bytes);  // with the elements taken out
    for (const Tensor& t : buffer.views) {
      const std::ptrdiff_t first = t.data == nullptr ? 0 : static_cast<std::byte*>(t.data) - buffer.begin;
      const std::int64_t size = size_bytes(t.dtype);
      cpu::for_each_element(t, [&](std::int64_t, std::int64_t offset) {
        std::memset(gaps.data() + first + offset * size, kPoison, static_cast<std::size_t>(size));
      });
    }
    if (std::ranges::any_of(gaps, [](std::byte b) { return b != std::byte{kPoison}; })) return "a gap of an output";
  }
  return {};
}

Problem shortened(Problem problem, std::int64_t longest) {
  const std::array all{&problem.packed_q, &problem.packed_kv, &problem.q_lengths, &problem.kv_lengths};
  std::vector<std::size_t> order(static_cast<std::size_t>(problem.batch));  // short ones would leave nothing to check
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto sizes = [&](std::size_t sequence) {
    std::array<std::int64_t, 4> found{};
    for (std::size_t i = 0; i < all.size(); ++i)
      if (!all[i]->values.empty()) found[i] = all[i]->values[sequence];
    return found;
  };
  std::ranges::stable_sort(order, std::greater<>(), sizes);
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  problem.batch = std::min<std::int64_t>(problem.batch, 2);
  problem.num_kv_heads = std::min<std::int64_t>(problem.num_kv_heads, 2);
  problem.num_q_heads = problem.num_kv_heads * group;
  problem.seqlen_q = std::min(problem.seqlen_q, longest), problem.seqlen_kv = std::min(problem.seqlen_kv, longest);
  for (Lengths* lengths : all) {
    if (lengths->values.empty()) continue;
    std::vector<std::int64_t> kept;
    kept.reserve(static_cast<std::size_t>(problem.batch));
    for (std::int64_t i = 0; i < problem.batch; ++i) kept.push_back(std::min(lengths->values[order[i]], longest));
    lengths->values = std::move(kept);
  }
  problem.total_q = std::min(problem.total_q, problem.batch * problem.seqlen_q);
  problem.total_kv = std::min(problem.total_kv, problem.batch * problem.seqlen_kv);
  const auto sum_up = [](const Lengths& lengths, std::int64_t& most, std::int64_t& total) {
    if (lengths.values.empty()) return;
    most = total = 0;
    for (const std::int64_t length : lengths.values) most = std::max(most, length), total += length;
  };
  sum_up(problem.packed_q, problem.seqlen_q, problem.total_q);
  sum_up(problem.packed_kv, problem.seqlen_kv, problem.total_kv);
  return problem;
}

}  // namespace fovea::tools
