#include <fovea/problem.h>

#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea {
namespace {

void check_rank(const char* name, const Tensor& t, int rank, const char* dimensions) {
  if (t.rank == 0) refuse(name, " is missing");
  if (t.rank != rank) refuse(name, " has ", t.rank, " dimensions but must be ", dimensions);
  for (int i = 0; i < rank; ++i) {
    if (t.shape[i] < 0) refuse(name, "'s dimension ", i, " (", t.shape[i], ") must not be negative");
  }
}

void check_same(const char* what, const char* a, std::int64_t in_a, const char* b, std::int64_t in_b) {
  if (in_a != in_b) refuse(what, " differs: ", in_a, " in ", a, " and ", in_b, " in ", b);
}

/// Dimensions of size 1 are broadcast; `validate_forward` refuses all others that differ from the problem's.
std::optional<Extent> extent_of(const char* name, const Tensor& t, bool has_gradient) {
  if (t.rank == 0) return {};
  check_rank(name, t, 4, "[batch, num_q_heads, seqlen_q, seqlen_kv], 1 where it is broadcast");
  // So are those expanded by stride 0, unless entries have gradients or the tensor is empty.
  const bool all = has_gradient || std::find(t.shape.begin(), t.shape.end(), 0) != t.shape.end();
  const auto own = [&](int axis) { return t.shape[axis] != 1 && (all || t.strides[axis] != 0); };
  return Extent{own(0), own(1), own(2), own(3)};
}

Lengths lengths_of(const char* name, const Tensor& t, std::int64_t batch) {
  if (t.rank == 0) return {};
  if (t.device.kind != DeviceKind::kCpu) return {true, {}};
  return {true, read_lengths(name, t, batch)};
}

/// The slots of packed sequences, and the longest: as given, which it must be where the values are out of reach.
Lengths slots_of(const char* name, const Tensor& t, std::int64_t batch, std::int64_t total, const char* max_name,
                 std::int64_t max_seqlen, std::int64_t& seqlen) {
  if (t.device.kind != DeviceKind::kCpu) {
    if (max_seqlen <= 0 && total > 0)
      refuse(max_name, " (", max_seqlen, ") must be given where ", name, " is on a GPU");
    seqlen = std::min(max_seqlen, total);
    return {true, {}};
  }
  Lengths slots{true, read_cu_seqlens(name, t, batch, total)};
  const std::int64_t found = longest(slots.values);
  if (max_seqlen != 0 && max_seqlen < found)
    refuse(max_name, " (", max_seqlen, ") is less than the longest sequence of ", name, " (", found, ")");
  seqlen = max_seqlen == 0 ? found : std::min(max_seqlen, total);
  return seqlen == found ? slots : Lengths{true, {}};
}

}  // namespace

Problem describe(Direction direction, const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o) {
  const bool packed = o.cu_seqlens_q.rank != 0;
  if (packed != (o.cu_seqlens_kv.rank != 0)) refuse("cu_seqlens_q and cu_seqlens_kv must be given together");
  for (const auto& [name, longest] : {std::pair{"max_seqlen_q", o.max_seqlen_q}, {"max_seqlen_kv", o.max_seqlen_kv}}) {
    if (packed || longest == 0) continue;
    refuse(name, " (", longest, ") belongs to packed sequences; give cu_seqlens_q and cu_seqlens_kv, or leave it out");
  }
  const int rank = packed ? 3 : 4;
  check_rank("q", q, rank, packed ? "[total_q, num_q_heads, head_dim]" : "[batch, seqlen_q, num_q_heads, head_dim]");
  check_rank("k", k, rank,
             packed ? "[total_kv, num_kv_heads, head_dim]" : "[batch, seqlen_kv, num_kv_heads, head_dim]");
  check_rank("v", v, rank,
             packed ? "[total_kv, num_kv_heads, head_dim_v]" : "[batch, seqlen_kv, num_kv_heads, head_dim_v]");
  if (k.dtype != q.dtype || v.dtype != q.dtype) {
    refuse("q, k and v must share one dtype, but are ", name(q.dtype), ", ", name(k.dtype), " and ", name(v.dtype));
  }
  const int token = rank - 3, head = rank - 2, dim = rank - 1;  // axes
  check_same("num_kv_heads", "k", k.shape[head], "v", v.shape[head]);
  check_same("head_dim", "q", q.shape[dim], "k", k.shape[dim]);
  check_same(packed ? "total_kv" : "seqlen_kv", "k", k.shape[token], "v", v.shape[token]);

  Problem p;
  p.direction = direction;
  p.dtype = q.dtype;
  p.num_q_heads = q.shape[head];
  p.num_kv_heads = k.shape[head];
  p.head_dim = q.shape[dim];
  p.head_dim_v = v.shape[dim];
  if (packed) {
    check_rank("cu_seqlens_q", o.cu_seqlens_q, 1, "[batch + 1]");
    check_rank("cu_seqlens_kv", o.cu_seqlens_kv, 1, "[batch + 1]");
    check_same("the number of sequences", "cu_seqlens_q", o.cu_seqlens_q.shape[0] - 1, "cu_seqlens_kv",
               o.cu_seqlens_kv.shape[0] - 1);
    p.batch = o.cu_seqlens_q.shape[0] - 1;
    if (p.batch < 1)
      refuse("cu_seqlens_q has ", p.batch + 1, " elements but must have one more than there are sequences");
    p.total_q = q.shape[token];
    p.total_kv = k.shape[token];
    p.packed_q =
        slots_of("cu_seqlens_q", o.cu_seqlens_q, p.batch, p.total_q, "max_seqlen_q", o.max_seqlen_q, p.seqlen_q);
    p.packed_kv =
        slots_of("cu_seqlens_kv", o.cu_seqlens_kv, p.batch, p.total_kv, "max_seqlen_kv", o.max_seqlen_kv, p.seqlen_kv);
  } else {
    check_same("batch", "q", q.shape[0], "k", k.shape[0]);
    check_same("batch", "k", k.shape[0], "v", v.shape[0]);
    p.batch = q.shape[0];
    p.seqlen_q = q.shape[token];
    p.seqlen_kv = k.shape[token];
  }

  static_cast<Rules&>(p) = static_cast<const Rules&>(o);
  p.mask = extent_of("mask", o.mask, false);
  p.bias = extent_of("bias", o.bias, true);
  if (p.bias) p.bias_dtype = o.bias.dtype;
  if (p.bias_dtype != DType::kFloat32 && p.bias_dtype != p.dtype)
    refuse("bias is ", name(p.bias_dtype), " but must be fp32 or q's dtype, ", name(p.dtype));
  if (o.alibi_slopes.rank != 0) p.alibi = o.alibi_slopes.rank == 2 ? Alibi::kPerBatchAndHead : Alibi::kPerHead;
  p.sink = o.sink.rank != 0;
  p.q_lengths = lengths_of("q_lengths", o.q_lengths, p.batch);
  p.kv_lengths = lengths_of("kv_lengths", o.kv_lengths, p.batch);
  validate(p);
  return p;
}

}  // namespace fovea
