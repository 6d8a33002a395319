#include "nn/masks.h"

#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea::nn {
namespace {

void check(const char* name, const Tensor& t, const MaskSizes& s) {
  if (t.dtype != DType::kBool && t.dtype != DType::kFloat32 && t.dtype != s.dtype) {
    refuse(name, " is ", fovea::name(t.dtype), " but must be bool, fp32 or the layer's ", fovea::name(s.dtype));
  }
  check_device(name, t.device, "the layer is on", s.device);
}

/// attn_mask as [1 or batch, 1 or heads, seqlen_q, seqlen_kv].
Tensor four_dimensions(const Tensor& mask, const MaskSizes& s) {
  Tensor t = mask;
  t.rank = 4;
  const bool shared = mask.rank == 2;
  if (shared ? mask.shape[0] != s.seqlen_q || mask.shape[1] != s.seqlen_kv
             : mask.rank != 3 || mask.shape[0] != s.batch * s.heads || mask.shape[1] != s.seqlen_q ||
                   mask.shape[2] != s.seqlen_kv) {
    refuse("attn_mask is ", shape_text(mask), " but must be [", s.seqlen_q, ", ", s.seqlen_kv, "] or [",
           s.batch * s.heads, ", ", s.seqlen_q, ", ", s.seqlen_kv, "]");
  }
  const auto& strides = mask.strides;
  t.shape = {shared ? 1 : s.batch, shared ? 1 : s.heads, s.seqlen_q, s.seqlen_kv};
  t.strides = {shared ? 0 : s.heads * strides[0], shared ? 0 : strides[0], strides[mask.rank - 2],
               strides[mask.rank - 1]};
  return t;
}

/// key_padding_mask as [batch, 1, 1, seqlen_kv].
Tensor padding(const Tensor& mask, const MaskSizes& s) {
  Tensor t = mask;
  const bool alone = mask.rank == 1 && s.batch == 1;
  if ((!alone && (mask.rank != 2 || mask.shape[0] != s.batch)) || mask.shape[mask.rank - 1] != s.seqlen_kv) {
    refuse("key_padding_mask is ", shape_text(mask), " but must be [", s.batch, ", ", s.seqlen_kv, "]");
  }
  t.rank = 4;
  t.shape = {s.batch, 1, 1, s.seqlen_kv};
  t.strides = {alone ? 0 : mask.strides[0], 0, 0, mask.strides[mask.rank - 1]};
  return t;
}

/// The part of a mask with extra keys that the caller's mask speaks of.
Tensor given_part(const Tensor& whole, const MaskSizes& s) { return slice(whole, 3, 0, s.seqlen_kv); }

Array made(DType dtype, const Tensor& shape, const MaskSizes& s) {
  return {dtype, {shape.shape[0], shape.shape[1], shape.shape[2], s.seqlen_kv + s.extra}, s.device};
}

/// The same elements spread over [batch, heads, rows, keys] by strides 0.
Tensor spread(Tensor t, const std::array<std::int64_t, 4>& shape) {
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (t.shape[i] == shape[i]) continue;
    t.shape[i] = shape[i];
    t.strides[i] = 0;
  }
  return t;
}

class Translation {
 public:
  explicit Translation(const MaskSizes& sizes) : s_(sizes), ops_(ops_of(sizes.device)) {}

  void attention(const Tensor& given) {
    const Tensor t = four_dimensions(given, s_);
    check_memory("attn_mask", given, Use::kStrided);
    if (t.dtype == DType::kBool) {
      hide(t);
    } else if (s_.extra == 0 && t.strides[3] <= 1) {  // keys side by side, or one for all: attention takes no others
      masks_.bias = t;
    } else {
      add_bias(t);
    }
  }

  void keys(const Tensor& given) {
    const Tensor t = padding(given, s_);
    check_memory("key_padding_mask", given, Use::kStrided);
    if (t.dtype != DType::kBool) return add_bias(t);
    if (s_.lengths_serve && s_.extra == 0 && by_lengths(t)) return;
    if (!masks_.mask.defined()) return hide(t);
    // The one mask is taken, so the bias, which a boolean attn_mask leaves free, hides the padding.
    masks_.bias_memory = made(DType::kFloat32, t, s_);
    masks_.bias = masks_.bias_memory.view();
    ops_.bias_of(t, given_part(masks_.bias, s_));
  }

  [[nodiscard]] Masks take() { return std::move(masks_); }

 private:
  void hide(const Tensor& ignore) {
    masks_.mask_memory = made(DType::kBool, ignore, s_);
    masks_.mask = masks_.mask_memory.view();
    if (s_.extra > 0) {
      const Array nothing(DType::kBool, {1}, s_.device);
      ops_.keep_of(spread({nothing.view().data, DType::kBool, s_.device, 4, {1, 1, 1, 1}, {}}, masks_.mask.shape),
                   masks_.mask);
    }
    ops_.keep_of(ignore, given_part(masks_.mask, s_));
  }

  void add_bias(const Tensor& t) {
    if (!masks_.bias.defined()) {
      masks_.bias_memory = made(t.dtype, t, s_);
      masks_.bias = masks_.bias_memory.view();
      return ops_.copy(t, given_part(masks_.bias, s_));
    }
    const Tensor before = given_part(masks_.bias, s_);
    std::array<std::int64_t, 4> shape{};
    for (int i = 0; i < 4; ++i) shape[i] = std::max(before.shape[i], t.shape[i]);
    Array sum(DType::kFloat32, {shape[0], shape[1], shape[2], s_.seqlen_kv + s_.extra}, s_.device);
    ops_.add(spread(before, shape), spread(t, shape), given_part(sum.view(), s_));
    masks_.bias_memory = sum;
    masks_.bias = sum.view();
  }

  /// Keys behind a sequence's last visible one are not walked; false where a mask must hide others.
  bool by_lengths(const Tensor& ignore) {
    const Array lengths = Array::unset(DType::kInt32, {s_.batch}, s_.device);
    Tensor flat = ignore;
    flat.rank = 2;
    flat.shape = {s_.batch, s_.seqlen_kv};
    flat.strides = {ignore.strides[0], ignore.strides[3]};
    masks_.lengths_memory = lengths;
    masks_.kv_lengths = lengths.view();
    return ops_.lengths_of(flat, lengths.view());
  }

  const MaskSizes& s_;
  const Ops& ops_;
  Masks masks_;
};

}  // namespace

Masks masks_of(const AttentionCall& call, const MaskSizes& sizes) {
  Translation translation(sizes);
  if (call.attn_mask.defined()) {
    check("attn_mask", call.attn_mask, sizes);
    translation.attention(call.attn_mask);
  }
  if (call.key_padding_mask.defined()) {
    check("key_padding_mask", call.key_padding_mask, sizes);
    translation.keys(call.key_padding_mask);
  }
  return translation.take();
}

}  // namespace fovea::nn
