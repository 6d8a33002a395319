// What is done to rows between products: this file is compiled once for each instruction set, with FOVEA_ISA naming the
// namespace.
#include "nn/cpu/rows.h"

#include "cpu/flash/storage.h"

namespace fovea::nn::FOVEA_ISA {
namespace {

using namespace cpu::FOVEA_ISA;

// ---- elements

/// Up to a vector of elements, the missing ones 0.
FOVEA_INLINE V read(const char* row, Element type, i64 at, i64 columns) {
  if (at + kWidth <= columns) return widen_vector(row + at * bytes(type), type);
  V x{};
  for (i64 i = 0; i < columns - at; ++i) x[i] = widen(row + (at + i) * bytes(type), type);
  return x;
}

FOVEA_INLINE void write(char* row, Element type, i64 at, i64 columns, V x) {
  if (at + kWidth <= columns) return narrow_vector(row + at * bytes(type), type, x);
  for (i64 i = 0; i < columns - at; ++i) narrow(row + (at + i) * bytes(type), type, x[i]);
}

// ---- gelu

/// Φ(x) and φ(x) of the standard normal distribution.  Near 0, Φ(x) = 1/2 + x·p(x²).  Elsewhere Φ(−|x|) =
/// φ(x)·√(π/2)·g(|x|/√2), where g(t) = exp(t²)·erfc(t) is u·p(u) with u = 1/(1 + t/2): digits of small results stay.
/// Both polynomials are fitted at Chebyshev nodes, |x| to 1.5 and t to 10, with relative errors below 4e-8 and 1e-7.
struct Normal {
  V cumulative, density;
};
FOVEA_INLINE Normal normal(V x) {
  const V e = exp2(x * x * splat(-0.5F * kLog2E));
  const V u = splat(1.0F) / (splat(1.0F) + absolute(x) * splat(0.5F * 0.70710678118654752F));
  V p = splat(-6.0108706355094910e-2F);
  p = p * u + splat(2.8944611549377441e-1F);
  p = p * u + splat(-4.9682956933975220e-1F);
  p = p * u + splat(2.8851515054702759e-1F);
  p = p * u + splat(-3.3399019390344620e-2F);
  p = p * u + splat(2.0536042749881744e-1F);
  p = p * u + splat(2.4247938394546509e-1F);
  p = p * u + splat(2.8245383501052856e-1F);
  p = p * u + splat(2.8208234906196594e-1F);
  const V tail = splat(0.5F) * u * p * e, far = x < V{} ? tail : splat(1.0F) - tail;
  const V z = x * x;
  V q = splat(-2.5210667331521108e-8F);
  q = q * z + splat(6.1194191403046716e-7F);
  q = q * z + splat(-9.3451335487770848e-6F);
  q = q * z + splat(1.1533094220794737e-4F);
  q = q * z + splat(-1.1872687609866261e-3F);
  q = q * z + splat(9.9735399708151817e-3F);
  q = q * z + splat(-6.6490374505519867e-2F);
  q = q * z + splat(3.9894229173660278e-1F);
  const V near = splat(0.5F) + x * q;
  return {absolute(x) < splat(1.5F) ? near : far, e * splat(0.39894228040143268F)};
}

FOVEA_INLINE V activate(int activation, V x) {
  if (activation == kRelu) return x < V{} ? V{} : x;
  if (activation == kGelu) {
    const V y = x * normal(x).cumulative;
    return x < splat(-1e30F) ? V{} : y;  // −∞ · 0
  }
  return x;
}

FOVEA_INLINE V activation_slope(int activation, V x) {
  if (activation == kRelu) return x > V{} ? splat(1.0F) : V{};
  if (activation == kGelu) {
    const Normal n = normal(x);
    const V product = x * n.density;
    return n.cumulative + (n.density == V{} ? V{} : product);
  }
  return splat(1.0F);
}

// ---- dropout

/// What each of the columns of one row is multiplied by, 0 or the inverse of the kept share: docs/contract.md, "Dropout
/// bits", with the row's position as i, the column as j, and the sequence in place of batch · num_q_heads + head.
void draw_row(const DropoutDraws& dropout, const std::int32_t* place, i64 first_column, i64 columns, float* factors) {
  const math::DropoutStream stream = math::dropout_stream(dropout.seed, dropout.offset, static_cast<u32>(place[0]));
  const i64 i = place[1];
  const u32 m = math::patch_of(i);
  const int word = i / 8 % 2 == 0 ? 0 : 1;
  const V scale = splat(65536.0F / static_cast<float>(dropout.keep_threshold));
  const VI threshold = splat(static_cast<std::int32_t>(dropout.keep_threshold));
  const DropoutKeys keys = dropout_keys(splat(stream.key));
  VU lanes{};
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = static_cast<u32>(lane);
  constexpr int kGroup = kWidth < 8 ? kWidth : 8;
  for (i64 patch = 0; patch < (columns + 15) / 16 * 8; patch += kWidth) {
    const VU n = lanes + static_cast<u32>(first_column / 2 + patch);
    const VU draws = dropout_words(splat(stream.a ^ m), splat(stream.b) ^ n, keys).words[word];
    float low[kWidth], high[kWidth];
    store(low, VI(draws & 0xffffU) < threshold ? scale : V{});
    store(high, VI(draws >> 16) < threshold ? scale : V{});
    for (int group = 0; group < kWidth; group += kGroup) {
      const i64 n = patch + group, j = n / 8 * 16 + n % 8;
      __builtin_memcpy(factors + j, low + group, kGroup * sizeof(float));
      __builtin_memcpy(factors + j + 8, high + group, kGroup * sizeof(float));
    }
  }
}

// ---- a tile of a product on its way out, and back

void finish(const FinishTile& t) {
  const bool dropout = t.dropout.keep_threshold < 65536;
  for (i64 r = 0; r < t.rows; ++r) {
    const char* in = t.in.data + r * t.in.stride;
    char* out = t.out.data + r * t.out.stride;
    char* before = t.before.data == nullptr ? nullptr : t.before.data + r * t.before.stride;
    const char* residual = t.residual.data == nullptr ? nullptr : t.residual.data + r * t.residual.stride;
    if (dropout) draw_row(t.dropout, t.places + 2 * r, t.first_column, t.columns, t.scratch);
    for (i64 c = 0; c < t.columns; c += kWidth) {
      V x = read(in, t.in.type, c, t.columns);
      if (t.bias != nullptr) x += read(t.bias, t.out.type, c, t.columns);
      if (before != nullptr) write(before, t.before.type, c, t.columns, x);
      x = activate(t.activation, x);
      if (dropout) x *= load(t.scratch + c);
      if (residual != nullptr) x += read(residual, t.residual.type, c, t.columns);
      write(out, t.out.type, c, t.columns, x);
    }
  }
}

void finish_gradient(const FinishTile& t) {
  const bool dropout = t.dropout.keep_threshold < 65536;
  for (i64 r = 0; r < t.rows; ++r) {
    const char* in = t.in.data + r * t.in.stride;
    const char* before = t.before.data == nullptr ? nullptr : t.before.data + r * t.before.stride;
    char* out = t.out.data + r * t.out.stride;
    if (dropout) draw_row(t.dropout, t.places + 2 * r, t.first_column, t.columns, t.scratch);
    for (i64 c = 0; c < t.columns; c += kWidth) {
      V x = read(in, t.in.type, c, t.columns);
      if (dropout) x *= load(t.scratch + c);
      if (before != nullptr) x *= activation_slope(t.activation, read(before, t.before.type, c, t.columns));
      write(out, t.out.type, c, t.columns, x);
    }
  }
}

// ---- norm

/// The sum of f(c) over the vectors of a row.
template <class Term>
FOVEA_INLINE float sum_of(i64 columns, const Term& term) {
  V sums[4] = {};
  i64 c = 0;
  for (; c + 4 * kWidth <= columns; c += 4 * kWidth) {
    FOVEA_UNROLL for (int k = 0; k < 4; ++k) sums[k] += term(c + k * kWidth);
  }
  for (; c < columns; c += kWidth) sums[0] += term(c);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// x, with 0 in the lanes that lie behind the row's end.
FOVEA_INLINE V within(V x, i64 at, i64 columns) {
  for (i64 i = columns - at; i < kWidth; ++i) x[i] = 0.0F;
  return x;
}

void norm(const NormTile& t) {
  const float share = 1.0F / static_cast<float>(t.columns);
  for (i64 r = 0; r < t.rows; ++r) {
    const char* x = t.x.data + r * t.x.stride;
    char* y = t.y.data + r * t.y.stride;
    const auto at = [&](i64 c) { return read(x, t.x.type, c, t.columns); };
    const float mean = sum_of(t.columns, at) * share;
    const float variance = share * sum_of(t.columns, [&](i64 c) {
                             const V d = within(at(c) - splat(mean), c, t.columns);
                             return d * d;
                           });
    const float inverse = 1.0F / __builtin_sqrtf(variance + t.eps);
    for (i64 c = 0; c < t.columns; c += kWidth) {
      V value = (at(c) - splat(mean)) * splat(inverse) * read(t.weight, t.x.type, c, t.columns);
      if (t.bias != nullptr) value += read(t.bias, t.x.type, c, t.columns);
      write(y, t.y.type, c, t.columns, value);
    }
    if (t.statistics != nullptr) {
      t.statistics[2 * r] = mean;
      t.statistics[2 * r + 1] = inverse;
    }
  }
}

void norm_gradient(const NormTile& t) {
  const float share = 1.0F / static_cast<float>(t.columns);
  for (i64 r = 0; r < t.rows; ++r) {
    const char* x = t.x.data + r * t.x.stride;
    const char* dy = t.y.data + r * t.y.stride;
    const char* plus = t.plus.data == nullptr ? nullptr : t.plus.data + r * t.plus.stride;
    char* dx = t.dx.data + r * t.dx.stride;
    const V mean = splat(t.statistics[2 * r]), inverse = splat(t.statistics[2 * r + 1]);
    const auto normed = [&](i64 c) { return within((read(x, t.x.type, c, t.columns) - mean) * inverse, c, t.columns); };
    const auto weighed = [&](i64 c) {
      return read(dy, t.y.type, c, t.columns) * read(t.weight, t.x.type, c, t.columns);
    };
    const V along = splat(share * sum_of(t.columns, [&](i64 c) { return weighed(c) * normed(c); }));
    const V level = splat(share * sum_of(t.columns, weighed));
    for (i64 c = 0; c < t.columns; c += kWidth) {
      const V n = normed(c), g = read(dy, t.y.type, c, t.columns);
      V value = (weighed(c) - level - n * along) * inverse;
      if (plus != nullptr) value += read(plus, t.plus.type, c, t.columns);
      write(dx, t.dx.type, c, t.columns, value);
      store(t.dweight + c, load(t.dweight + c) + n * g);  // room for a vector more than columns
      store(t.dbias + c, load(t.dbias + c) + g);
    }
  }
}

// ---- rotary embedding

void rotate(const RotateTile& t) {
  const i64 half = t.dim / 2, size = bytes(t.x.type);
  const i64 near = t.interleaved ? 2 : 1, far = t.interleaved ? 1 : half;
  const float sign = t.back ? -1.0F : 1.0F;
  for (i64 r = 0; r < t.rows; ++r) {
    const float* turn = t.table + t.places[2 * r + 1] * t.dim;
    for (i64 h = 0; h < t.heads; ++h) {
      char* head = t.x.data + r * t.x.stride + h * t.head_stride;
      for (i64 c = 0; c < half; ++c) {
        char* first = head + c * near * size;
        char* second = first + far * size;
        const float a = widen(first, t.x.type), b = widen(second, t.x.type);
        const float cosine = turn[2 * c], sine = sign * turn[2 * c + 1];
        narrow(first, t.x.type, a * cosine - b * sine);
        narrow(second, t.x.type, b * cosine + a * sine);
      }
    }
  }
}

// ---- losses

void squares(const LossTile& t) {
  for (i64 r = 0; r < t.rows; ++r) {
    const char *x = t.x.data + r * t.x.stride, *target = t.target.data + r * t.target.stride;
    char* dx = t.dx.data + r * t.dx.stride;
    const auto apart = [&](i64 c) { return read(x, t.x.type, c, t.columns) - read(target, t.x.type, c, t.columns); };
    t.losses[r] = t.share * sum_of(t.columns, [&](i64 c) {
                    const V d = apart(c);
                    return d * d;
                  });
    for (i64 c = 0; c < t.columns; c += kWidth) write(dx, t.x.type, c, t.columns, splat(2.0F * t.share) * apart(c));
  }
}

void entropies(const LossTile& t) {
  for (i64 r = 0; r < t.rows; ++r) {
    const char* x = t.x.data + r * t.x.stride;
    char* dx = t.dx.data + r * t.dx.stride;
    const i64 wanted = t.classes[r];
    if (wanted < 0 || wanted >= t.columns) {  // whatever stands in the row, NaN too
      t.losses[r] = 0.0F;
      for (i64 c = 0; c < t.columns; c += kWidth) write(dx, t.x.type, c, t.columns, V{});
      continue;
    }
    V most = splat(read(x, t.x.type, 0, t.columns)[0]);
    for (i64 c = 0; c < t.columns; c += kWidth) {
      V at = read(x, t.x.type, c, t.columns);
      for (i64 i = t.columns - c; i < kWidth; ++i) at[i] = most[i];
      most = at > most ? at : most;
    }
    float top = most[0];
    for (int i = 1; i < kWidth; ++i) top = most[i] > top ? most[i] : top;
    const auto weight = [&](i64 c) {
      return within(exp2((read(x, t.x.type, c, t.columns) - splat(top)) * splat(kLog2E)), c, t.columns);
    };
    const float total = sum_of(t.columns, weight), seen = widen(x + wanted * bytes(t.x.type), t.x.type);
    t.losses[r] = t.share * (__builtin_logf(total) + top - seen);
    for (i64 c = 0; c < t.columns; c += kWidth) {
      V gradient = weight(c) * splat(t.share / total);
      if (wanted >= c && wanted < c + kWidth) gradient[wanted - c] -= t.share;
      write(dx, t.x.type, c, t.columns, gradient);
    }
  }
}

// ---- sums and conversions

void add_rows(const Rows& x, i64 rows, i64 columns, float* sum, double* scratch) {
  constexpr i64 kBlock = 16;  // rows added up in fp32, blocks in double, so that the last of many rows still counts
  for (i64 c = 0; c < columns; ++c) scratch[c] = 0.0;
  for (i64 begin = 0; begin < rows; begin += kBlock) {
    const i64 end = math::smaller(begin + kBlock, rows);
    for (i64 c = 0; c < columns; c += kWidth) {
      V part{};
      for (i64 r = begin; r < end; ++r) part += read(x.data + r * x.stride, x.type, c, columns);
      for (i64 i = 0; i < math::smaller<i64>(kWidth, columns - c); ++i) scratch[c + i] += static_cast<double>(part[i]);
    }
  }
  for (i64 c = 0; c < columns; ++c) sum[c] = static_cast<float>(static_cast<double>(sum[c]) + scratch[c]);
}

void convert(const Rows& from, const Rows& to, i64 rows, i64 columns) {
  for (i64 r = 0; r < rows; ++r) {
    const char* source = from.data + r * from.stride;
    char* target = to.data + r * to.stride;
    for (i64 c = 0; c < columns; c += kWidth) {
      write(target, to.type, c, columns, read(source, from.type, c, columns));
    }
  }
}

}  // namespace

constinit const RowKernels row_kernels = {.finish = &finish,
                                          .finish_gradient = &finish_gradient,
                                          .norm = &norm,
                                          .norm_gradient = &norm_gradient,
                                          .rotate = &rotate,
                                          .squares = &squares,
                                          .entropies = &entropies,
                                          .add_rows = &add_rows,
                                          .convert = &convert};

}  // namespace fovea::nn::FOVEA_ISA
