#pragma once

#include <fovea/fovea.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace fovea::test {

/// The sentence with which a call fails; one that does not fail, or with another code, fails the test.
inline std::string words(ErrorCode code, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

/// The sentence with which a call is refused as the user's error.
inline std::string refusal(const std::function<void()>& call) { return words(ErrorCode::kInvalidArgument, call); }

inline ::testing::AssertionResult contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "'" << part << "' is not in: " << text;
}

/// The larger of two errors; NaN, which std::max would pass over, counts as infinite.
inline double worse(double so_far, double error) { return std::max(so_far, std::isnan(error) ? HUGE_VAL : error); }

/// A valid problem with every option switched by chance; `largest` bounds lengths and heads.
inline Problem random_valid_problem(std::uint64_t seed, std::int64_t largest) {
  std::mt19937_64 random(seed);
  const auto below = [&](std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
  };
  const auto chance = [&] { return below(2) == 0; };
  const auto real = [&] { return static_cast<float>(below(1 << 24)) * 0x1p-24F; };
  const auto extent = [&] { return Extent{chance(), chance(), chance(), chance()}; };
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  Problem p;
  p.direction = static_cast<Direction>(below(3));
  p.dtype = kTypes[below(3)];
  p.batch = 1 + below(4);
  p.num_kv_heads = 1 + below(largest);
  p.num_q_heads = p.num_kv_heads * (1 + below(4));
  p.head_dim = 1 + below(512);
  p.head_dim_v = chance() ? p.head_dim : 1 + below(512);
  const auto lengths_below = [&](std::int64_t most) {
    Lengths lengths{true, {}};
    for (std::int64_t b = 0; b < p.batch; ++b) lengths.values.push_back(below(most + 1));
    return lengths;
  };
  const auto pack = [&](Lengths& packed, std::int64_t& seqlen, std::int64_t& total) {
    packed = lengths_below(largest);
    for (const std::int64_t length : packed.values) {
      seqlen = std::max(seqlen, length);
      total += length;
    }
    if (below(4) == 0) packed.values.clear();
  };
  if (chance()) {
    pack(p.packed_q, p.seqlen_q, p.total_q);
    pack(p.packed_kv, p.seqlen_kv, p.total_kv);
    if (chance()) {
      p.packed_kv = p.packed_q;
      p.seqlen_kv = p.seqlen_q;
      p.total_kv = p.total_q;
    }
  } else {
    p.seqlen_q = below(largest + 1);
    p.seqlen_kv = chance() ? p.seqlen_q : below(largest + 1);
  }
  const auto use = [&](const Lengths& packed, std::int64_t seqlen) {
    if (chance()) return Lengths{};
    if (packed.present && packed.values.empty()) return Lengths{true, {}};
    Lengths lengths = packed.present ? packed : lengths_below(seqlen);
    for (std::int64_t& length : lengths.values) length = below(length + 1);
    if (below(4) == 0) lengths.values.clear();
    return lengths;
  };
  p.q_lengths = use(p.packed_q, p.seqlen_q);
  p.kv_lengths = use(p.packed_kv, p.seqlen_kv);
  p.causal = static_cast<Causal>(below(3));
  if (chance()) p.window_left = below(largest);
  if (chance()) p.window_right = below(largest);
  if (chance()) p.mask = extent();
  if (chance()) {
    p.bias = extent();
    p.bias_dtype = chance() ? p.dtype : DType::kFloat32;
  }
  p.alibi = static_cast<Alibi>(below(3));
  p.sink = chance();
  if (chance()) p.softcap = 50 * real();
  if (chance()) p.softmax_scale = 4 * real() - 2;
  if (chance()) p.dropout = {0.99F * real(), random() >> below(64), random() >> below(64)};
  const bool same = p.seqlen_q == p.seqlen_kv && p.total_q == p.total_kv && p.packed_q == p.packed_kv;
  p.layout = static_cast<Layout>(below(same ? 3 : 2));
  p.deterministic = chance();
  return p;
}

/// Tensors of a problem, densely packed and zero, with lengths as the problem states them.
class Call {
 public:
  explicit Call(const Problem& p) {
    const auto tokens = [&](std::int64_t seqlen, std::int64_t total, std::int64_t heads, std::int64_t dim) {
      return p.packed() ? make(p.dtype, {total, heads, dim}) : make(p.dtype, {p.batch, seqlen, heads, dim});
    };
    const auto q_like = [&] { return tokens(p.seqlen_q, p.total_q, p.num_q_heads, p.head_dim); };
    const auto k_like = [&] { return tokens(p.seqlen_kv, p.total_kv, p.num_kv_heads, p.head_dim); };
    const auto v_like = [&] { return tokens(p.seqlen_kv, p.total_kv, p.num_kv_heads, p.head_dim_v); };
    const auto out_like = [&] { return tokens(p.seqlen_q, p.total_q, p.num_q_heads, p.head_dim_v); };
    const auto lse_like = [&] {
      return p.packed() ? make(DType::kFloat32, {p.num_q_heads, p.total_q})
                        : make(DType::kFloat32, {p.batch, p.num_q_heads, p.seqlen_q});
    };
    const auto matrix = [&](const Extent& e, DType dtype) {
      return make(dtype, {e.batch ? p.batch : 1, e.heads ? p.num_q_heads : 1, e.queries ? p.seqlen_q : 1,
                          e.keys ? p.seqlen_kv : 1});
    };
    in.q = q_like();
    in.k = k_like();
    in.v = v_like();
    out.out = out_like();
    out.lse = lse_like();
    if (p.backward()) {
      in.out = out.out;
      in.lse = out.lse;
      in.dout = out_like();
      in.dlse = lse_like();
      out.dq = q_like();
      out.dk = k_like();
      out.dv = v_like();
    }
    if (p.mask) in.mask = matrix(*p.mask, DType::kBool);
    if (p.bias) {
      in.bias = matrix(*p.bias, p.bias_dtype);
      if (p.backward()) out.dbias = matrix(*p.bias, p.bias_dtype);
    }
    const auto slopes = [&] {
      return p.alibi == Alibi::kPerHead ? make(DType::kFloat32, {p.num_q_heads})
                                        : make(DType::kFloat32, {p.batch, p.num_q_heads});
    };
    if (p.alibi != Alibi::kNone) {
      in.alibi_slopes = slopes();
      if (p.backward()) out.dalibi_slopes = slopes();
    }
    if (p.sink) {
      in.sink = make(DType::kFloat32, {p.num_q_heads});
      if (p.backward()) out.dsink = make(DType::kFloat32, {p.num_q_heads});
    }
    if (p.q_lengths.present) in.q_lengths = ints(made_up(p.q_lengths, p.batch, 0, 0));
    if (p.kv_lengths.present) in.kv_lengths = ints(made_up(p.kv_lengths, p.batch, 0, 0));
    if (p.packed()) {
      in.cu_seqlens_q = ints(ends(made_up(p.packed_q, p.batch, p.seqlen_q, p.total_q)));
      in.cu_seqlens_kv = ints(ends(made_up(p.packed_kv, p.batch, p.seqlen_kv, p.total_kv)));
    }
  }

  [[nodiscard]] AttentionOptions options(const Problem& p) const {
    AttentionOptions o;
    o.softmax_scale = p.softmax_scale;
    o.causal = p.causal;
    o.window_left = p.window_left;
    o.window_right = p.window_right;
    o.softcap = p.softcap;
    o.dropout = p.dropout;
    o.deterministic = p.deterministic;
    o.mask = in.mask;
    o.bias = in.bias;
    o.alibi_slopes = in.alibi_slopes;
    o.sink = in.sink;
    o.q_lengths = in.q_lengths;
    o.kv_lengths = in.kv_lengths;
    o.cu_seqlens_q = in.cu_seqlens_q;
    o.cu_seqlens_kv = in.cu_seqlens_kv;
    return o;
  }

  Inputs in;
  Outputs out;

 private:
  Tensor make(DType dtype, std::initializer_list<std::int64_t> shape) {
    Tensor t = Tensor::contiguous(nullptr, dtype, shape);
    std::int64_t bytes = size_bytes(dtype);
    for (const std::int64_t extent : shape) bytes *= extent;
    storage_.push_back(std::make_unique<std::byte[]>(static_cast<std::size_t>(bytes)));
    t.data = storage_.back().get();
    return t;
  }
  Tensor ints(const std::vector<std::int64_t>& values) {
    const Tensor t = make(DType::kInt32, {std::ssize(values)});
    for (std::size_t i = 0; i < values.size(); ++i) {
      static_cast<std::int32_t*>(t.data)[i] = static_cast<std::int32_t>(values[i]);
    }
    return t;
  }
  /// Lengths known only now: the first sequences are as long as may be, until nothing of the total is left.
  static std::vector<std::int64_t> made_up(const Lengths& lengths, std::int64_t batch, std::int64_t longest,
                                           std::int64_t total) {
    std::vector<std::int64_t> values = lengths.values;
    for (std::int64_t b = std::ssize(values); b < batch; ++b) {
      values.push_back(std::min(longest, total));
      total -= values.back();
    }
    return values;
  }
  static std::vector<std::int64_t> ends(const std::vector<std::int64_t>& lengths) {
    std::vector<std::int64_t> sums{0};
    for (const std::int64_t length : lengths) sums.push_back(sums.back() + length);
    return sums;
  }

  std::vector<std::unique_ptr<std::byte[]>> storage_;
};

}  // namespace fovea::test
