#include "nn/layout.h"

#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea::nn {

void check_features(const char* name, const Tensor& x, std::int64_t features, DType dtype, const Device& device,
                    int least, int most) {
  if (x.rank < least || x.rank > most || x.shape[x.rank - 1] != features) {
    refuse(name, " is ", shape_text(x), " but must have ", features, " features in the last of ", least, " to ", most,
           " dimensions");
  }
  if (x.dtype != dtype) refuse(name, " is ", fovea::name(x.dtype), " but the layer is ", fovea::name(dtype));
  check_device(name, x.device, "the layer is on", device);
  for (int i = 0; i < x.rank; ++i) {
    if (x.shape[i] < 0) refuse(name, " is ", shape_text(x), "; a dimension must not be negative");
  }
  check_memory(name, x, Use::kInput);
}

bool dense(const Tensor& x) {
  std::int64_t stride = 1;
  for (int i = x.rank - 1; i >= 0; --i) {
    if (x.shape[i] != 1 && x.strides[i] != stride) return false;
    stride *= x.shape[i];
  }
  return true;
}

Tensor as_rows(const Tensor& x, Array& owner) {
  Tensor rows = x;
  rows.rank = 2;
  rows.shape = {1, x.shape[x.rank - 1]};
  rows.strides = {rows.shape[1], 1};
  bool even = true;
  for (int i = x.rank - 2; i >= 0; --i) {
    if (x.shape[i] == 1) continue;  // its stride says nothing of what lies between rows
    if (rows.shape[0] == 1) rows.strides[0] = x.strides[i];
    even = even && x.strides[i] == rows.shape[0] * rows.strides[0];
    rows.shape[0] *= x.shape[i];
  }
  if (even && rows.strides[0] >= rows.shape[1]) return rows;
  owner = like(x);
  ops_of(x.device).copy(x, owner.view());
  return rows_of(owner);
}

Tensor rows_of(const Array& x) {
  Array none;  // dense rows are evenly spaced
  return as_rows(x.view(), none);
}

void check_same_rows(const char* a_name, const Tensor& a, const char* b_name, const Tensor& b) {
  if (a.rank == b.rank && std::equal(a.shape.begin(), a.shape.begin() + a.rank - 1, b.shape.begin())) return;
  refuse(a_name, " is ", shape_text(a), " and ", b_name, " ", shape_text(b),
         "; they must agree in all dimensions but the last");
}

Array like(const Tensor& x, std::int64_t features) {
  Tensor t = x;
  t.shape[x.rank - 1] = features;
  return Array::unset(x.dtype, shape_of(t), x.device);
}

Tensor heads_of_rows(const Tensor& rows, std::int64_t first_column, std::int64_t heads, std::int64_t head_dim) {
  Tensor t = slice(rows, 1, first_column, heads * head_dim);
  t.rank = 3;
  t.shape = {rows.shape[0], heads, head_dim};
  t.strides = {rows.strides[0], head_dim, 1};
  return t;
}

Sequences Sequences::of(const char* name, const Tensor& x, const Tensor& cu_seqlens, bool batch_first) {
  Sequences s;
  s.cu_seqlens = cu_seqlens;
  if (cu_seqlens.defined()) {
    if (x.rank != 2) refuse(name, " is ", shape_text(x), " but packed sequences are [total, features]");
    const std::string of = std::string(name) + "'s cu_seqlens";
    if (cu_seqlens.dtype != DType::kInt32 || cu_seqlens.rank != 1 || cu_seqlens.shape[0] < 1) {
      refuse(of, " is ", fovea::name(cu_seqlens.dtype), " ", shape_text(cu_seqlens), " but must be int32 [batch + 1]");
    }
    if (cu_seqlens.device.kind != DeviceKind::kCpu) {
      refuse(of, " is on ", fovea::name(cu_seqlens.device), "; give it on the CPU, where it is read");
    }
    check_memory(of.c_str(), cu_seqlens, Use::kStrided);
    const auto* ends = static_cast<const std::int32_t*>(cu_seqlens.data);
    s.rows = x.shape[0];
    s.batch = cu_seqlens.shape[0] - 1;
    for (std::int64_t b = 0; b < s.batch; ++b) {
      const std::int64_t begin = ends[b * cu_seqlens.strides[0]];
      const std::int64_t length = ends[(b + 1) * cu_seqlens.strides[0]] - begin;
      if (length < 0) refuse(of, " decreases at sequence ", b, "; give the ends in order");
      s.seqlen = std::max(s.seqlen, length);
    }
    if (ends[0] != 0 || ends[s.batch * cu_seqlens.strides[0]] != s.rows) {
      refuse(of, " runs from ", ends[0], " to ", ends[s.batch * cu_seqlens.strides[0]], " but must run from 0 to its ",
             s.rows, " rows");
    }
    if (x.device.kind != DeviceKind::kCpu) {
      s.memory = Array::unset(DType::kInt32, {s.batch + 1}, x.device);
      ops_of(x.device).copy(cu_seqlens, s.memory.view());
      s.cu_seqlens = s.memory.view();
    }
    return s;
  }
  const int length = batch_first ? 1 : 0;
  s.batch = x.rank == 2 ? 1 : x.shape[1 - length];
  s.seqlen = x.rank == 2 ? x.shape[0] : x.shape[length];
  s.interleaved = x.rank == 3 && !batch_first;
  s.rows = s.batch * s.seqlen;
  return s;
}

Tensor Sequences::heads(const Tensor& x, std::int64_t heads, std::int64_t head_dim) const {
  Tensor t = heads_of_rows(x, 0, heads, head_dim);
  if (packed()) return t;
  const std::int64_t row = x.strides[0];
  t.rank = 4;
  t.shape = {batch, seqlen, heads, head_dim};
  t.strides = {interleaved ? row : seqlen * row, interleaved ? batch * row : row, head_dim, 1};
  return t;
}

Array Sequences::places(const Device& device) const {
  Array places = Array::unset(DType::kInt32, {rows, 2}, device);
  ops_of(device).place_rows(cu_seqlens, batch, interleaved, places.view());
  return places;
}

}  // namespace fovea::nn
