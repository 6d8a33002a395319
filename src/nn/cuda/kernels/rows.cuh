#pragma once

#include "cuda/kernels/mma.cuh"
#include "math/philox.h"
#include "nn/cuda/params.h"

// What layers do to rows between products.  A warp has a row; the formulas are those of nn/cpu/rows.cpp.
namespace fovea::cuda {

/// Calls f(row) for the rows of this warp.
template <class F>
FOVEA_DEVICE void each_row(i64 rows, const F& f) {
  const i64 first = i64{blockIdx.x} * kRowsOfLayerBlock + warp_id() * kRowsOfWarp;
  for (i64 row = first; row < math::smaller(first + kRowsOfWarp, rows); ++row) f(row);
}

/// The sum over a warp's lanes, for all of them.
FOVEA_DEVICE float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

/// One row of LayerRows; reads and writes by column.
template <Type kType>
struct RowOf {
  char* data;
  FOVEA_DEVICE RowOf(const LayerRows& rows, i64 row)
      : data(rows.data == nullptr ? nullptr : rows.data + row * rows.stride) {}
  FOVEA_DEVICE bool given() const { return data != nullptr; }
  FOVEA_DEVICE float operator[](int column) const { return read<kType>(data + i64{column} * bytes_of(kType)); }
  FOVEA_DEVICE void put(int column, float x) const { write<kType>(data + i64{column} * bytes_of(kType), x); }
};

template <Type kType>
FOVEA_DEVICE float element(const char* data, int column) {
  return read<kType>(data + i64{column} * bytes_of(kType));
}

// ---- activation

/// Φ(x) of the standard normal distribution; digits of small results stay.
FOVEA_DEVICE float cumulative(float x) { return 0.5F * erfcf(-0.70710678118654752F * x); }

FOVEA_DEVICE float activate(int activation, float x) {
  if (activation == kRelu) return x < 0.0F ? 0.0F : x;
  if (activation == kGelu) return x < -1e30F ? 0.0F : x * cumulative(x);  // −∞ · 0
  return x;
}

FOVEA_DEVICE float activation_slope(int activation, float x) {
  if (activation == kRelu) return x > 0.0F ? 1.0F : 0.0F;
  if (activation == kGelu) {
    const float density = 0.39894228040143268F * expf(-0.5F * x * x);
    return cumulative(x) + (density == 0.0F ? 0.0F : x * density);
  }
  return 1.0F;
}

// ---- dropout

/// What columns of one row after the other are multiplied by: docs/contract.md, "Dropout bits", with the row's position
/// as i, the column as j, and the sequence in place of batch · num_q_heads + head.
class RowDropout {
 public:
  FOVEA_DEVICE explicit RowDropout(const FinishParams& p)
      : p_(p), scale_(65536.0F / static_cast<float>(p.keep_threshold)) {}

  FOVEA_DEVICE void begin(i64 row) {
    if (!drops()) return;
    const int sequence = p_.places[2 * row];
    if (sequence != sequence_) stream_ = math::dropout_stream(p_.seed, p_.offset, static_cast<u32>(sequence));
    sequence_ = sequence;
    position_ = p_.places[2 * row + 1];
  }

  /// Calls f(column, factor) for every column that this lane has: a patch of the draws has two of a row.
  template <class F>
  FOVEA_DEVICE void each_column(const F& f) const {
    const u32 m = math::patch_of(position_);
    const int word = position_ / 8 % 2;
    for (int patch = lane_id(); patch < (p_.columns + 15) / 16 * 8; patch += kWarp) {
      const int column = patch / 8 * 16 + patch % 8;
      float near = 1.0F, far = 1.0F;
      if (drops()) {
        const math::Draws draws = math::draws_of_patch(stream_, m, static_cast<u32>(patch));
        const u32 both = word == 0 ? draws.words[0] : draws.words[1];
        near = (both & 0xffffU) < p_.keep_threshold ? scale_ : 0.0F;
        far = both >> 16 < p_.keep_threshold ? scale_ : 0.0F;
      }
      if (column < p_.columns) f(column, near);
      if (column + 8 < p_.columns) f(column + 8, far);
    }
  }

 private:
  FOVEA_DEVICE bool drops() const { return p_.keep_threshold < 65536; }

  const FinishParams& p_;
  float scale_;
  math::DropoutStream stream_{};
  int sequence_ = -1, position_ = 0;
};

// ---- a product on its way out, and back

template <LayerSpec S>
FOVEA_DEVICE void finish(const FinishParams& p) {
  RowDropout dropout(p);
  each_row(p.rows, [&](i64 row) {
    const RowOf<S.type> in(p.in, row), out(p.out, row), before(p.before, row), residual(p.residual, row);
    dropout.begin(row);
    dropout.each_column([&](int column, float factor) {
      float x = in[column];
      if (p.bias != nullptr) x += element<S.type>(p.bias, column);
      if (before.given()) before.put(column, x);
      x = activate(p.activation, x) * factor;
      if (residual.given()) x += residual[column];
      out.put(column, x);
    });
  });
}

template <LayerSpec S>
FOVEA_DEVICE void finish_gradient(const FinishParams& p) {
  RowDropout dropout(p);
  each_row(p.rows, [&](i64 row) {
    const RowOf<S.type> in(p.in, row), out(p.out, row), before(p.before, row);
    dropout.begin(row);
    dropout.each_column([&](int column, float factor) {
      float x = in[column] * factor;
      if (before.given()) x *= activation_slope(p.activation, before[column]);
      out.put(column, x);
    });
  });
}

// ---- norm

template <LayerSpec S>
FOVEA_DEVICE void norm(const NormParams& p) {
  const float share = 1.0F / static_cast<float>(p.columns);
  each_row(p.rows, [&](i64 row) {
    const RowOf<S.type> x(p.x, row), y(p.y, row);
    float sum = 0.0F, squares = 0.0F;
    for (int c = lane_id(); c < p.columns; c += kWarp) sum += x[c];
    const float mean = warp_sum(sum) * share;
    for (int c = lane_id(); c < p.columns; c += kWarp) squares += (x[c] - mean) * (x[c] - mean);
    const float inverse = 1.0F / sqrtf(warp_sum(squares) * share + p.eps);
    for (int c = lane_id(); c < p.columns; c += kWarp) {
      float value = (x[c] - mean) * inverse * element<S.type>(p.weight, c);
      if (p.bias != nullptr) value += element<S.type>(p.bias, c);
      y.put(c, value);
    }
    if (p.statistics != nullptr && lane_id() == 0) {
      p.statistics[2 * row] = mean;
      p.statistics[2 * row + 1] = inverse;
    }
  });
}

template <LayerSpec S>
FOVEA_DEVICE void norm_gradient(const NormParams& p) {
  const float share = 1.0F / static_cast<float>(p.columns);
  each_row(p.rows, [&](i64 row) {
    const RowOf<S.type> x(p.x, row), dy(p.y, row), plus(p.plus, row), dx(p.dx, row);
    const float mean = p.statistics[2 * row], inverse = p.statistics[2 * row + 1];
    const auto normed = [&](int c) { return (x[c] - mean) * inverse; };
    const auto weighed = [&](int c) { return dy[c] * element<S.type>(p.weight, c); };
    float along = 0.0F, level = 0.0F;
    for (int c = lane_id(); c < p.columns; c += kWarp) {
      along += weighed(c) * normed(c);
      level += weighed(c);
    }
    along = warp_sum(along) * share;
    level = warp_sum(level) * share;
    for (int c = lane_id(); c < p.columns; c += kWarp) {
      float value = (weighed(c) - level - normed(c) * along) * inverse;
      if (plus.given()) value += plus[c];
      dx.put(c, value);
    }
  });
}

// ---- sums over rows

/// A block has 32 columns and a part of the rows.  Sixteen rows are added up in fp32, those sums in double and in one
/// order, so that the last of many rows still counts and the bits are the same in every run.
template <LayerSpec S>
FOVEA_DEVICE void column_sums(const ColumnSumParams& p) {
  constexpr int kWarps = kLayerThreads / kWarp, kAtOnce = 16;
  __shared__ double sums[2][kWarps][kColumnsOfSum];
  const int column = static_cast<int>(blockIdx.x) * kColumnsOfSum + lane_id();
  const i64 first = blockIdx.y * p.rows_of_part, end = math::smaller(first + p.rows_of_part, p.rows);
  double total = 0.0, normed_total = 0.0;
  if (column < p.columns) {
    for (i64 begin = first + warp_id() * kAtOnce; begin < end; begin += kWarps * kAtOnce) {
      float sum = 0.0F, normed_sum = 0.0F;
      for (i64 row = begin; row < math::smaller(begin + kAtOnce, end); ++row) {
        const float x = RowOf<S.type>(p.x, row)[column];
        sum += x;
        if (p.statistics == nullptr) continue;
        const float mean = p.statistics[2 * row], inverse = p.statistics[2 * row + 1];
        normed_sum += (RowOf<S.type>(p.norm_x, row)[column] - mean) * inverse * x;
      }
      total += static_cast<double>(sum);
      normed_total += static_cast<double>(normed_sum);
    }
  }
  sums[0][warp_id()][lane_id()] = total;
  sums[1][warp_id()][lane_id()] = normed_total;
  __syncthreads();
  const int kinds = p.statistics == nullptr ? 1 : 2, kind = warp_id();
  if (kind >= kinds || column >= p.columns) return;
  double all = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) all += sums[kind][warp][lane_id()];
  p.parts[(i64{blockIdx.y} * kinds + kind) * p.columns + column] = all;
}

template <LayerSpec S>
FOVEA_DEVICE void add_up(const AddUpParams& p) {
  const int column = static_cast<int>(blockIdx.x * kLayerThreads + threadIdx.x);
  if (column >= p.columns) return;
  double all = static_cast<double>(p.sum[column]);
  for (i64 part = 0; part < p.count; ++part) all += p.parts[part * p.stride + column];
  p.sum[column] = static_cast<float>(all);
}

// ---- rotary embedding

/// A thread turns one pair of every head of a row.
template <LayerSpec S>
FOVEA_DEVICE void rotate(const RotateParams& p) {
  const int half = p.dim / 2;
  const i64 index = i64{blockIdx.x} * kLayerThreads + threadIdx.x, row = index / half;
  const int c = static_cast<int>(index % half);
  if (row >= p.rows) return;
  const double angle = static_cast<double>(p.places[2 * row + 1]) *
                       pow(static_cast<double>(p.base), -2.0 * static_cast<double>(c) / static_cast<double>(p.dim));
  const float cosine = static_cast<float>(cos(angle)), sine = static_cast<float>(sin(angle)) * (p.back ? -1.0F : 1.0F);
  const int first = p.interleaved ? 2 * c : c, second = p.interleaved ? 2 * c + 1 : c + half;
  for (int head = 0; head < p.heads; ++head) {
    const RowOf<S.type> x({p.x.data + head * p.head_stride, p.x.stride}, row);
    const float a = x[first], b = x[second];
    x.put(first, a * cosine - b * sine);
    x.put(second, b * cosine + a * sine);
  }
}

// ---- losses

template <LayerSpec S>
FOVEA_DEVICE void squares(const LossParams& p) {
  each_row(p.rows, [&](i64 row) {
    const RowOf<S.type> x(p.x, row), target(p.target, row), dx(p.dx, row);
    float sum = 0.0F;
    for (int c = lane_id(); c < p.columns; c += kWarp) {
      const float apart = x[c] - target[c];
      sum += apart * apart;
      dx.put(c, 2.0F * p.share * apart);
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) p.losses[row] = p.share * sum;
  });
}

template <LayerSpec S>
FOVEA_DEVICE void entropies(const LossParams& p) {
  each_row(p.rows, [&](i64 row) {
    const RowOf<S.type> x(p.x, row), dx(p.dx, row);
    const int wanted = p.classes[row];
    if (wanted < 0 || wanted >= p.columns) {  // whatever stands in the row, NaN too
      if (lane_id() == 0) p.losses[row] = 0.0F;
      for (int c = lane_id(); c < p.columns; c += kWarp) dx.put(c, 0.0F);
      return;
    }
    float most = -infinity(), total = 0.0F;
    for (int c = lane_id(); c < p.columns; c += kWarp) most = fmaxf(most, x[c]);
    for (int step = kWarp / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    for (int c = lane_id(); c < p.columns; c += kWarp) total += expf(x[c] - most);
    total = warp_sum(total);
    const float seen = x[wanted];
    if (lane_id() == 0) p.losses[row] = p.share * (logf(total) + most - seen);
    __syncwarp();  // dx may be x
    for (int c = lane_id(); c < p.columns; c += kWarp) {
      dx.put(c, p.share * (expf(x[c] - most) / total - (c == wanted ? 1.0F : 0.0F)));
    }
  });
}

// ---- the optimiser

template <LayerSpec S>
FOVEA_DEVICE void adamw(const AdamWParams& p) {
  const i64 i = i64{blockIdx.x} * kLayerThreads + threadIdx.x;
  if (i >= p.count) return;
  const float g = p.gradient[i];
  const float mean = p.beta1 * p.mean[i] + (1.0F - p.beta1) * g;
  const float variance = p.beta2 * p.variance[i] + (1.0F - p.beta2) * g * g;
  p.mean[i] = mean;
  p.variance[i] = variance;
  float w = p.master[i];
  if constexpr (S.type != Type::kFloat32) {
    const float value = read<S.type>(p.value + i * bytes_of(S.type));
    alignas(2) char rounded[2];
    write<S.type>(rounded, w);
    if (read<S.type>(rounded) != value) w = value;
  }
  w = w * p.decay - p.rate * mean / (sqrtf(variance) / p.spread + p.eps);
  p.master[i] = w;
  if constexpr (S.type != Type::kFloat32) write<S.type>(p.value + i * bytes_of(S.type), w);
}

}  // namespace fovea::cuda
