#pragma once

#include "cuda/spec.h"
#include "math/fn.h"

// What the layers' kernels are called with.  Host and device compile this text.
namespace fovea::cuda {

using math::i64;
using math::u32;
using math::u64;

/// The one thing that the layers' kernels are compiled for.
struct LayerSpec {
  Type type = Type::kFloat32;  // of the rows; of no account to kernels that read it from their views
};
template <class F>
FOVEA_FN constexpr void each_field(const LayerSpec& s, F&& f) {
  f("type", s.type);
}

inline constexpr int kLanes = 32, kLayerThreads = 256;  // of every warp and block
inline constexpr int kRowsOfWarp = 4;                   // of kernels that give a row to a warp
inline constexpr int kRowsOfLayerBlock = kLayerThreads / kLanes * kRowsOfWarp;
inline constexpr int kColumnsOfSum = 32;  // of a block that sums columns
inline constexpr int kRowsOfSum = 128;    // of such a block, at least, and its multiple: 16 for each warp

inline constexpr int kRelu = 1, kGelu = 2;  // of nn::Activation

/// Rows of the spec's type.  Null: not given.
struct LayerRows {
  char* data;
  i64 stride;  // bytes
};

/// A product on its way out, or its gradient on the way back (in is dy).
struct FinishParams {
  LayerRows in, out, before, residual;
  const char* bias;
  const int* places;  // [rows, 2], sequence and position
  i64 rows;
  int columns;
  int activation;      // nn::Activation
  u32 keep_threshold;  // of 65536; 65536: no dropout
  u64 seed, offset;
};

struct NormParams {
  LayerRows x, y, plus, dx;  // backward: y is dy
  const char *weight, *bias;
  float* statistics;  // [rows, 2], may be null forward
  i64 rows;
  int columns;
  float eps;
};

/// Sums of x's columns over kRowsOfSum · blocks rows at a time: parts [parts, columns].  With `statistics`, x are the
/// gradients dy of a norm, and the sums of dy · normed(norm_x) stand behind those of dy: parts [parts, 2, columns].
struct ColumnSumParams {
  LayerRows x, norm_x;
  const float* statistics;
  double* parts;
  i64 rows, rows_of_part;
  int columns;
};

/// sum[c] += the parts' sums of column c, parts `stride` numbers apart.
struct AddUpParams {
  const double* parts;
  float* sum;
  i64 stride, count;
  int columns;
};

struct RotateParams {
  LayerRows x;
  const int* places;
  i64 rows, head_stride;  // bytes
  int heads, dim;
  float base;
  bool interleaved, back;
};

/// A loss and its gradient: of the distance to `target`, or of the softmax's share of `classes`.
struct LossParams {
  LayerRows x, target, dx;
  const int* classes;
  float* losses;
  i64 rows;
  int columns;
  float share;
};

/// Elements of up to four dimensions, of any fovea::DType.
struct LayerView {
  char* data;
  i64 strides[4];  // elements
  int dtype;
};

enum class Pointwise : int { kCopy, kNot, kHide, kWeightOfZero, kAdd, kDiagonal, kMean };

/// to = op(a, b), element by element of to's shape.
struct PointwiseParams {
  LayerView to, a, b;
  i64 shape[4];
  i64 count;
  Pointwise op;
  i64 terms, term_stride;  // kMean: of how many, how far apart; kDiagonal: its first row in term_stride
};

struct PlaceParams {
  const int* ends;  // cu_seqlens, may be null
  int* places;
  i64 rows, batch;
  bool interleaved;
};

/// Words that travel with the launch itself: nothing waits for them.
inline constexpr int kWordsOfLaunch = 512;
struct PutParams {
  int* to;
  int count;
  int words[kWordsOfLaunch];
};

/// Row r of `to` = row index[r] of `from`, or zeros where that is negative.  Rows lie one behind the other.
struct MoveRowsParams {
  const char* from;
  char* to;
  const int* index;
  i64 rows, pieces;  // of 16 bytes, of a row
};

struct LengthsParams {
  const unsigned char* ignore;
  int* lengths;
  i64 batch_stride, key_stride;
  int batch, keys;
};

struct AdamWParams {
  const float* gradient;
  float *mean, *variance, *master;
  char* value;  // of the spec's type; rounded from master where that is another
  i64 count;
  float beta1, beta2, rate, spread, decay, eps;
};

}  // namespace fovea::cuda
