#pragma once

#include "cpu/flash/call.h"

// What is done to rows between products, compiled once for each instruction set.  Plain values and pointers only, for
// the reason that cpu/flash/call.h gives.
namespace fovea::nn {

using cpu::Element;
using math::i64;
using math::u32;
using math::u64;

inline constexpr int kRelu = 1, kGelu = 2;  // of nn::Activation

/// Rows of one dtype; the stride in bytes.  Null: not given.
struct Rows {
  char* data = nullptr;
  i64 stride = 0;
  Element type = Element::kFloat32;
};

struct DropoutDraws {
  u32 keep_threshold = 65536;  // of 65536; 65536: no dropout
  u64 seed = 0, offset = 0;
};

/// One tile of a product on its way out, or of its gradient on the way back (in is dy): [rows, columns] that begin at
/// column `first_column`, a multiple of 16.  All pointers are to the tile's first element; places to its first row's.
struct FinishTile {
  i64 rows = 0, columns = 0, first_column = 0;
  Rows in{}, out{}, before{}, residual{};
  const char* bias = nullptr;  // of in's columns, out's type
  int activation = 0;          // none, kRelu or kGelu
  DropoutDraws dropout{};
  const std::int32_t* places = nullptr;
  float* scratch = nullptr;  // columns + 32
};

/// A tile of a norm, forward or backward.
struct NormTile {
  i64 rows = 0, columns = 0;
  Rows x{}, y{}, plus{};  // backward: y is dy
  Rows dx{};
  const char* weight = nullptr;  // x's type
  const char* bias = nullptr;
  float eps = 0.0F;
  float* statistics = nullptr;  // [rows, 2], may be null forward
  float* dweight = nullptr;     // backward, sums of this tile alone: columns + 16, like dbias
  float* dbias = nullptr;
};

struct RotateTile {
  i64 rows = 0, heads = 0, dim = 0;
  i64 head_stride = 0;  // bytes
  Rows x{};
  const float* table = nullptr;  // of position p: dim cosines and sines, interleaved, from table + p · dim
  const std::int32_t* places = nullptr;
  bool interleaved = false, back = false;
};

/// A tile of a loss and its gradient: of the distance to `target`, or of the softmax's share of `classes`.
struct LossTile {
  i64 rows = 0, columns = 0;
  Rows x{}, target{}, dx{};
  const std::int32_t* classes = nullptr;
  float share = 0.0F;
  float* losses = nullptr;
};

struct RowKernels {
  void (*finish)(const FinishTile&);
  void (*finish_gradient)(const FinishTile&);
  void (*norm)(const NormTile&);
  void (*norm_gradient)(const NormTile&);
  void (*rotate)(const RotateTile&);
  void (*squares)(const LossTile&);
  void (*entropies)(const LossTile&);
  void (*add_rows)(const Rows& x, i64 rows, i64 columns, float* sum, double* scratch);  // scratch: columns
  void (*convert)(const Rows& from, const Rows& to, i64 rows, i64 columns);
};

#define FOVEA_DECLARE_ROWS(isa)        \
  namespace isa {                      \
  extern const RowKernels row_kernels; \
  }
FOVEA_DECLARE_ROWS(portable)
#ifdef __x86_64__
FOVEA_DECLARE_ROWS(avx2)
FOVEA_DECLARE_ROWS(avx512)
#endif
#undef FOVEA_DECLARE_ROWS

}  // namespace fovea::nn
