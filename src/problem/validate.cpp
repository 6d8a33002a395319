#include "problem/validate.h"

#include "problem/refuse.h"

#include <cmath>
#include <initializer_list>
#include <optional>

namespace fovea {
namespace {

constexpr std::int64_t kMaxElements = std::int64_t{1} << 58;  // of one tensor: bytes and offsets stay below 2^63
constexpr std::int64_t kMaxHeadDim = 512;
constexpr float kMaxSoftcap = 1e30F;  // beyond, scores over it lose digits, and it is infinite in units of log 2

struct Size {
  const char* name;
  std::int64_t value;
};

void check_range(const Size& size, std::int64_t least, std::int64_t most) {
  if (size.value < least) refuse(size.name, " (", size.value, ") must be at least ", least);
  if (size.value > most) refuse(size.name, " (", size.value, ") must be at most ", most);
}

/// Refuses tensors of more than kMaxElements.  A size of 0 counts as 1, so that products of the others fit as well.
void check_product(const char* tensor, std::initializer_list<Size> sizes) {
  std::int64_t product = 1;
  for (const Size& size : sizes) {
    if (!__builtin_mul_overflow(product, std::max<std::int64_t>(size.value, 1), &product) && product <= kMaxElements)
      continue;
    const Size& largest =
        *std::max_element(sizes.begin(), sizes.end(), [](auto a, auto b) { return a.value < b.value; });
    refuse(largest.name, " (", largest.value, ") is too large: ", tensor, " would hold more than 2^58 elements");
  }
}

void check_tensor_sizes(const Problem& p) {
  const Size b{"batch", p.batch}, hq{"num_q_heads", p.num_q_heads}, hkv{"num_kv_heads", p.num_kv_heads};
  const Size sq{"seqlen_q", p.seqlen_q}, skv{"seqlen_kv", p.seqlen_kv};
  const Size d{"head_dim", std::max(p.head_dim, p.head_dim_v)};
  if (p.packed()) {
    check_product("q", {{"packed_q", p.total_q}, hq, d});
    check_product("k", {{"packed_kv", p.total_kv}, hkv, d});
  }
  check_product("q", {b, sq, hq, d});
  check_product("k", {b, skv, hkv, d});
  const auto check_extent = [&](const char* tensor, const std::optional<Extent>& extent) {
    if (!extent) return;
    const auto own = [](bool has, const Size& size) { return has ? size : Size{size.name, 1}; };
    check_product(tensor,
                  {own(extent->batch, b), own(extent->heads, hq), own(extent->queries, sq), own(extent->keys, skv)});
  };
  check_extent("mask", p.mask);
  check_extent("bias", p.bias);
}

void check_length(const char* field, std::size_t i, std::int64_t length, const char* limit_name, std::int64_t limit) {
  if (length < 0) refuse(field, "[", i, "] (", length, ") must be at least 0");
  if (length > limit) refuse(field, "[", i, "] (", length, ") must be at most ", limit_name, " (", limit, ")");
}

/// Packed lengths must be one a sequence and agree with the longest and the total.
void check_packed(const char* field, const Lengths& packed, std::int64_t batch, const Size& seqlen, const Size& total) {
  const auto& values = packed.values;
  if (values.empty()) {  // known at run time
    const double most = static_cast<double>(batch) * static_cast<double>(seqlen.value);
    if (total.value < seqlen.value || static_cast<double>(total.value) > most) {
      refuse(field, " of ", total.value, " rows cannot be ", batch, " sequences, the longest of ", seqlen.value);
    }
    return;
  }
  if (std::ssize(values) != batch) refuse(field, " has the size ", values.size(), " but batch is ", batch);
  for (std::size_t i = 0; i < values.size(); ++i) check_length(field, i, values[i], "2^58", kMaxElements);
  if (longest(values) != seqlen.value) {
    refuse(seqlen.name, " (", seqlen.value, ") must be the longest sequence of ", field, " (", longest(values), ")");
  }
  if (saturating_sum(values) != total.value) {
    refuse(total.name, " (", total.value, ") must be the sum of ", field, " (", saturating_sum(values), ")");
  }
}

/// Lengths must lie within their sequence: the padded one, or the slot of a packed one.
void check_lengths(const char* field, const Lengths& lengths, std::int64_t batch, const Size& seqlen,
                   const Lengths& packed) {
  const auto& values = lengths.values;
  if (values.empty()) return;
  if (!lengths.present) refuse(field, " has values although it is not present");
  if (std::ssize(values) != batch) refuse(field, " has the size ", values.size(), " but batch is ", batch);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (packed.values.empty()) {
      check_length(field, i, values[i], seqlen.name, seqlen.value);
    } else {
      check_length(field, i, values[i], "the length of its sequence", packed.values[i]);
    }
  }
}

bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

}  // namespace

void validate(const Problem& p) {
  check_named("direction", p.direction, Direction::kForwardBackward);
  if (!is_floating(p.dtype)) refuse("dtype (", name(p.dtype), ") must be fp32, fp16 or bf16");
  check_range({"batch", p.batch}, 1, kMaxElements);
  check_range({"num_q_heads", p.num_q_heads}, 1, kMaxElements);
  check_range({"num_kv_heads", p.num_kv_heads}, 1, kMaxElements);
  if (p.num_q_heads % p.num_kv_heads != 0) {
    refuse("num_q_heads (", p.num_q_heads, ") must be a multiple of num_kv_heads (", p.num_kv_heads, ")");
  }
  if (p.packed_q.present != p.packed_kv.present) refuse("packed_q and packed_kv must be given together");
  if (p.packed()) {
    const auto &of_q = p.packed_q.values, &of_kv = p.packed_kv.values;
    if (!of_q.empty() && !of_kv.empty() && of_q.size() != of_kv.size())
      refuse("packed_q has ", of_q.size(), " sequences but packed_kv has ", of_kv.size());
    check_packed("packed_q", p.packed_q, p.batch, {"seqlen_q", p.seqlen_q}, {"total_q", p.total_q});
    check_packed("packed_kv", p.packed_kv, p.batch, {"seqlen_kv", p.seqlen_kv}, {"total_kv", p.total_kv});
  } else if (p.total_q != 0 || p.total_kv != 0 || !p.packed_q.values.empty() || !p.packed_kv.values.empty()) {
    refuse("total_q (", p.total_q, "), total_kv (", p.total_kv, ") and packed lengths belong to packed problems alone");
  }
  check_range({"seqlen_q", p.seqlen_q}, 0, kMaxElements);
  check_range({"seqlen_kv", p.seqlen_kv}, 0, kMaxElements);
  check_range({"head_dim", p.head_dim}, 1, kMaxHeadDim);
  check_range({"head_dim_v", p.head_dim_v}, 1, kMaxHeadDim);

  check_tensor_sizes(p);
  check_lengths("q_lengths", p.q_lengths, p.batch, {"seqlen_q", p.seqlen_q}, p.packed_q);
  check_lengths("kv_lengths", p.kv_lengths, p.batch, {"seqlen_kv", p.seqlen_kv}, p.packed_kv);

  check_named("causal", p.causal, Causal::kBottomRight);
  check_named("alibi", p.alibi, Alibi::kPerBatchAndHead);
  check_named("layout", p.layout, Layout::kQkvPacked);
  if (p.window_left) check_range({"window_left", *p.window_left}, 0, kMaxElements);
  if (p.window_right) check_range({"window_right", *p.window_right}, 0, kMaxElements);
  if (p.bias_dtype != DType::kFloat32 && (!p.bias || p.bias_dtype != p.dtype)) {
    refuse("bias_dtype (", name(p.bias_dtype), ") must be fp32",
           p.bias ? " or the problem's dtype" : " where there is no bias");
  }
  check_real("softcap", p.softcap, p.softcap >= 0 && p.softcap <= kMaxSoftcap, "0 (no softcap) to 1e30");
  if (p.softmax_scale) check_real("softmax_scale", *p.softmax_scale, true, "finite");
  const float drop = p.dropout.probability;
  check_real("dropout", drop, drop >= 0 && drop < 1, "at least 0 and less than 1");
  if (std::lround((1.0 - static_cast<double>(drop)) * 65536.0) < 1) {
    refuse("dropout (", shortest(drop), ") keeps fewer than one in 65536 entries; lower it");
  }
  if (p.layout == Layout::kQkvPacked &&
      (p.seqlen_q != p.seqlen_kv || p.total_q != p.total_kv || p.packed_q != p.packed_kv)) {
    refuse("layout qkv_packed needs keys as long as queries, but seqlen_q is ", p.seqlen_q, " and seqlen_kv is ",
           p.seqlen_kv, p.packed() ? " (or the packed lengths differ)" : "");
  }
}

// ---- tensors

namespace {

void check_shape(const char* name, const Tensor& t, const Tensor& wanted) {
  if (t.rank < 1 || t.rank > Tensor::kMaxRank) {
    refuse(name, " has ", t.rank, " dimensions but must have the shape ", shape_text(wanted));
  }
  if (t.rank != wanted.rank || !std::equal(t.shape.begin(), t.shape.begin() + t.rank, wanted.shape.begin())) {
    refuse(name, " has the shape ", shape_text(t), " but must have ", shape_text(wanted));
  }
}

/// Whether two elements share a place: sorted by stride, some dimension steps no further than the smaller ones reach.
bool overlaps_itself(const Tensor& t) {
  std::array<int, Tensor::kMaxRank> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  std::int64_t reach = 0;  // offset of the last element of the dimensions so far
  for (const int axis : order) {
    if (axis >= t.rank) continue;
    const std::int64_t extent = t.shape[axis], stride = t.strides[axis];
    if (extent > 1 && stride <= reach) return true;
    reach += (extent - 1) * stride;
  }
  return false;
}

}  // namespace

void check_memory(const char* name, const Tensor& t, Use use) {
  std::int64_t last = 0;
  if (std::find(t.shape.begin(), t.shape.begin() + t.rank, 0) != t.shape.begin() + t.rank) return;
  if (t.data == nullptr) refuse(name, " is ", shape_text(t), " but its data is null");
  if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::uintptr_t>(size_bytes(t.dtype)) != 0) {
    refuse(name, "'s data must be aligned to the ", size_bytes(t.dtype), " bytes of its elements");
  }
  for (int i = 0; i < t.rank; ++i) {
    std::int64_t step = 0;
    if (t.strides[i] < 0) refuse(name, "'s stride of dimension ", i, " (", t.strides[i], ") must not be negative");
    if (__builtin_mul_overflow(t.shape[i] - 1, t.strides[i], &step) || __builtin_add_overflow(last, step, &last) ||
        last > 4 * kMaxElements) {
      refuse(name, "'s stride of dimension ", i, " (", t.strides[i], ") leads beyond 64-bit addresses");
    }
  }
  const std::int64_t stride = t.strides[t.rank - 1];
  if (t.shape[t.rank - 1] > 1 && stride != 1 && !(use == Use::kBroadcast && stride == 0) && use != Use::kStrided) {
    refuse(name, "'s last dimension must be contiguous, but its stride is ", stride);
  }
  if (use == Use::kOutput && overlaps_itself(t)) {
    refuse(name, " is written but its strides [", join({t.strides.data(), static_cast<std::size_t>(t.rank)}, ", "),
           "] put several elements in one place");
  }
}

namespace {

enum class Presence { kRequired, kOptional };

/// `wanted`: dtype, device and shape of the tensor; undefined where the problem has none.
void check(const char* name, const Tensor& t, const Tensor& wanted, Use use, Presence presence = Presence::kRequired) {
  if (t.rank == 0 && (presence == Presence::kOptional || wanted.rank == 0)) return;
  if (t.rank == 0) refuse(name, " is missing; it must have the shape ", shape_text(wanted));
  if (wanted.rank == 0) refuse(name, " is given but the problem has none; leave it out");
  check_shape(name, t, wanted);
  if (t.dtype != wanted.dtype) refuse(name, " is ", fovea::name(t.dtype), " but must be ", fovea::name(wanted.dtype));
  check_device(name, t.device, "the plan is for", wanted.device);
  check_memory(name, t, use);
}

/// The tensors that a problem wants, without data.  A gradient has the shape and dtype of its tensor.
struct Wanted {
  Tensor q, k, v, out, lse, mask, bias, alibi_slopes, sink;

  Wanted(const Problem& p, const Device& device) : problem_(p), device_(device) {
    const auto tokens = [&](std::int64_t total, std::int64_t seqlen, std::int64_t heads, std::int64_t dim) {
      return p.packed() ? dense(p.dtype, {total, heads, dim}) : dense(p.dtype, {p.batch, seqlen, heads, dim});
    };
    const auto matrix = [&](DType dtype, const std::optional<Extent>& e) {
      if (!e) return Tensor{};
      return dense(dtype, {e->batch ? p.batch : 1, e->heads ? p.num_q_heads : 1, e->queries ? p.seqlen_q : 1,
                           e->keys ? p.seqlen_kv : 1});
    };
    constexpr DType kFloat = DType::kFloat32;
    q = tokens(p.total_q, p.seqlen_q, p.num_q_heads, p.head_dim);
    k = tokens(p.total_kv, p.seqlen_kv, p.num_kv_heads, p.head_dim);
    v = tokens(p.total_kv, p.seqlen_kv, p.num_kv_heads, p.head_dim_v);
    out = tokens(p.total_q, p.seqlen_q, p.num_q_heads, p.head_dim_v);
    lse = p.packed() ? dense(kFloat, {p.num_q_heads, p.total_q}) : dense(kFloat, {p.batch, p.num_q_heads, p.seqlen_q});
    mask = matrix(DType::kBool, p.mask);
    bias = matrix(p.bias_dtype, p.bias);
    if (p.alibi == Alibi::kPerHead) alibi_slopes = dense(kFloat, {p.num_q_heads});
    if (p.alibi == Alibi::kPerBatchAndHead) alibi_slopes = dense(kFloat, {p.batch, p.num_q_heads});
    if (p.sink) sink = dense(kFloat, {p.num_q_heads});
  }

  void check_inputs(const Inputs& in) const {
    check("q", in.q, q, Use::kInput);
    check("k", in.k, k, Use::kInput);
    check("v", in.v, v, Use::kInput);
    check("mask", own_part(in.mask), mask, Use::kBroadcast);
    check("bias", in.bias, bias, Use::kBroadcast);
    check("alibi_slopes", in.alibi_slopes, alibi_slopes, Use::kInput);
    check("sink", in.sink, sink, Use::kInput);
    const auto& p = problem_;
    const Size sq{"seqlen_q", p.seqlen_q}, skv{"seqlen_kv", p.seqlen_kv};
    const Lengths slots_q = check_slots("cu_seqlens_q", in.cu_seqlens_q, p.packed_q, p.total_q, sq);
    const Lengths slots_kv = check_slots("cu_seqlens_kv", in.cu_seqlens_kv, p.packed_kv, p.total_kv, skv);
    check_lengths_tensor("q_lengths", in.q_lengths, p.q_lengths, sq, slots_q);
    check_lengths_tensor("kv_lengths", in.kv_lengths, p.kv_lengths, skv, slots_kv);
  }

 private:
  [[nodiscard]] Tensor dense(DType dtype, std::initializer_list<std::int64_t> shape) const {
    return Tensor::contiguous(nullptr, dtype, shape, device_);
  }

  /// A mask expanded by strides of 0 counts as broadcast where the problem broadcasts it.
  [[nodiscard]] Tensor own_part(const Tensor& t) const {
    const std::array full{problem_.batch, problem_.num_q_heads, problem_.seqlen_q, problem_.seqlen_kv};
    Tensor own = t;
    for (std::size_t axis = 0; axis < full.size(); ++axis) {
      if (t.shape[axis] == full[axis] && t.strides[axis] == 0) own.shape[axis] = mask.shape[axis];
    }
    return own.shape == mask.shape ? own : t;
  }

  /// int32 [count] where the problem has it.  True where its values can be checked, too: on the CPU.
  bool check_ints(const char* name, const Tensor& t, bool present, std::int64_t count) const {
    check(name, t, present ? dense(DType::kInt32, {count}) : Tensor{}, Use::kInput);
    return present && device_.kind == DeviceKind::kCpu;
  }

  Lengths check_slots(const char* name, const Tensor& t, const Lengths& packed, std::int64_t total, Size seqlen) const {
    if (!check_ints(name, t, packed.present, problem_.batch + 1)) return {};
    Lengths slots{true, read_cu_seqlens(name, t, problem_.batch, total)};
    for (std::size_t i = 0; i < slots.values.size(); ++i) {
      if (slots.values[i] <= seqlen.value) continue;
      refuse(name, " makes sequence ", i, " ", slots.values[i], " long, more than ", seqlen.name, " (", seqlen.value,
             ")");
    }
    check_stated(name, slots, packed);
    return slots;
  }

  void check_lengths_tensor(const char* name, const Tensor& t, const Lengths& stated, Size seqlen,
                            const Lengths& slots) const {
    if (!check_ints(name, t, stated.present, problem_.batch)) return;
    const Lengths lengths{true, read_lengths(name, t, problem_.batch)};
    check_lengths(name, lengths, problem_.batch, seqlen, slots);
    check_stated(name, lengths, stated);
  }

  /// A plan may rely on lengths that its problem states.
  static void check_stated(const char* name, const Lengths& lengths, const Lengths& stated) {
    for (std::size_t i = 0; i < stated.values.size(); ++i) {
      if (lengths.values[i] == stated.values[i]) continue;
      refuse(name, " gives sequence ", i, " the length ", lengths.values[i], " but the problem states ",
             stated.values[i], "; plan for random lengths where they change");
    }
  }

  const Problem& problem_;
  const Device& device_;
};

}  // namespace

std::vector<std::int64_t> read_lengths(const char* name, const Tensor& t, std::int64_t count) {
  if (t.dtype != DType::kInt32) refuse(name, " is ", fovea::name(t.dtype), " but must be int32");
  check_shape(name, t, Tensor::contiguous(nullptr, DType::kInt32, {count}));
  check_memory(name, t, Use::kInput);
  const auto* values = static_cast<const std::int32_t*>(t.data);
  return {values, values + count};
}

std::vector<std::int64_t> read_cu_seqlens(const char* name, const Tensor& t, std::int64_t batch, std::int64_t total) {
  const std::vector<std::int64_t> ends = read_lengths(name, t, batch + 1);
  std::vector<std::int64_t> lengths;
  if (ends.front() != 0) refuse(name, "[0] (", ends.front(), ") must be 0");
  if (ends.back() != total) refuse(name, "[", batch, "] (", ends.back(), ") must be the number of rows, ", total);
  for (std::size_t i = 1; i < ends.size(); ++i) {
    if (ends[i] < ends[i - 1]) {
      refuse(name, "[", i, "] (", ends[i], ") must not be less than ", name, "[", i - 1, "] (", ends[i - 1], ")");
    }
    lengths.push_back(ends[i] - ends[i - 1]);
  }
  return lengths;
}

void validate_forward(const Problem& problem, const Device& device, const Inputs& in, const Outputs& out) {
  const Wanted wanted(problem, device);
  wanted.check_inputs(in);
  check("out", out.out, wanted.out, Use::kOutput);
  check("lse", out.lse, wanted.lse, Use::kOutput, Presence::kOptional);
}

void validate_backward(const Problem& problem, const Device& device, const Inputs& in, const Outputs& out) {
  const Wanted wanted(problem, device);
  wanted.check_inputs(in);
  check("out", in.out, wanted.out, Use::kInput);
  check("lse", in.lse, wanted.lse, Use::kInput);
  check("dout", in.dout, wanted.out, Use::kInput);
  check("dlse", in.dlse, wanted.lse, Use::kBroadcast, Presence::kOptional);
  check("dq", out.dq, wanted.q, Use::kOutput);
  check("dk", out.dk, wanted.k, Use::kOutput);
  check("dv", out.dv, wanted.v, Use::kOutput);
  check("dbias", out.dbias, wanted.bias, Use::kOutput, Presence::kOptional);
  check("dalibi_slopes", out.dalibi_slopes, wanted.alibi_slopes, Use::kOutput, Presence::kOptional);
  check("dsink", out.dsink, wanted.sink, Use::kOutput, Presence::kOptional);
}

}  // namespace fovea
