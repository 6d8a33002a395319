#include "nn/cpu/ops.h"

#include <fovea/error.h>
#include <fovea/plan.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "cpu/elements.h"
#include "cpu/threads.h"
#include "dispatch/views.h"
#include "nn/cpu/product.h"
#include "nn/cpu/rows.h"

namespace fovea::nn {
namespace {

using math::ceil_div;

static_assert(kRelu == static_cast<int>(Activation::kRelu) && kGelu == static_cast<int>(Activation::kGelu));

// ---- which kernels, which tiles

constexpr i64 kTileRows = 192, kTileColumns = 512;  // of a product: 384 KiB of fp32, within a core's L2
constexpr i64 kWeightRows = 64;                     // of a weight's gradient: enough tiles to share out
constexpr i64 kRowsAtOnce = 64;                     // of everything else
constexpr i64 kRowsOfASum = 16;                     // of a norm's gradient, added up in fp32
constexpr i64 kSlack = 32;                          // floats behind a row of scratch

std::atomic<std::size_t> held_bytes = 0, most_bytes = 0;  // of memory that was allocated

/// Of the instruction set that attention has chosen, FOVEA_CPU_ISA and all.
RowKernels chosen_kernels() {
  const std::string backend = explain(parse_problem("fwd fp32 b1 hq1 sq1 d1")).backend;
#ifdef __x86_64__
  if (backend.starts_with("cpu_avx512") || backend == "cpu_amx") return avx512::row_kernels;
  if (backend == "cpu_avx2") return avx2::row_kernels;
#endif
  return portable::row_kernels;
}

bool is_floating(DType dtype) { return dtype != DType::kBool && dtype != DType::kInt32; }

Element element(DType dtype) {
  if (dtype == DType::kFloat16) return Element::kFloat16;
  return dtype == DType::kBFloat16 ? Element::kBFloat16 : Element::kFloat32;
}

char* at(const Tensor& t, i64 row, i64 column) {
  return static_cast<char*>(t.data) + (row * t.strides[0] + column) * size_bytes(t.dtype);
}

Rows rows_at(const Tensor& t, i64 row, i64 column) {
  if (!t.defined()) return {};
  return {at(t, row, column), t.strides[0] * size_bytes(t.dtype), element(t.dtype)};
}

DropoutDraws draws(const Dropout& dropout) {
  return {dispatch::keep_threshold(dropout.probability), dropout.seed, dropout.offset};
}

/// task(first, count, worker) for [0, total) in steps.
template <class Task>
void in_steps(i64 total, i64 step, int workers, const Task& task) {
  struct Context {
    i64 total, step;
    const Task& task;
  } context{total, step, task};
  cpu::run_tasks(
      ceil_div(total, step), workers,
      [](void* c, i64 index, int worker) {
        const auto& [total, step, task] = *static_cast<Context*>(c);
        task(index * step, std::min(step, total - index * step), worker);
      },
      &context);
}

/// task(row, rows, column, columns, worker) for the tiles of a matrix, row by row.
template <class Task>
void in_tiles(i64 rows, i64 columns, i64 tile_rows, i64 tile_columns, int workers, const Task& task) {
  const i64 across = ceil_div(columns, tile_columns);
  in_steps(ceil_div(rows, tile_rows) * across, 1, workers, [&](i64 tile, i64, int worker) {
    const i64 row = tile / across * tile_rows, column = tile % across * tile_columns;
    task(row, std::min(tile_rows, rows - row), column, std::min(tile_columns, columns - column), worker);
  });
}

/// Aligned memory, one piece for each worker.
class Scratch {
 public:
  Scratch(int workers, std::size_t bytes) : bytes_((bytes + 63) / 64 * 64) {
    if (bytes_ == 0) return;
    memory_.reset(static_cast<std::byte*>(::operator new(bytes_* static_cast<std::size_t>(workers), kAlignment)));
  }
  [[nodiscard]] std::byte* of(int worker) const { return memory_.get() + bytes_ * static_cast<std::size_t>(worker); }
  [[nodiscard]] float* floats_of(int worker) const { return reinterpret_cast<float*>(of(worker)); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Delete> memory_;
};

std::size_t floats(i64 count) { return static_cast<std::size_t>(count) * sizeof(float); }

/// The products of the tiles of one matrix: all are of one size but the last of each direction.
class TileProducts {
 public:
  TileProducts(DType type, ProductShape shape, i64 tile_rows, i64 tile_columns)
      : rows_(shape.m), columns_(shape.n), tile_rows_(tile_rows), tile_columns_(tile_columns) {
    for (const bool last_row : {false, true}) {
      for (const bool last_column : {false, true}) {
        shape.m = extent(rows_, tile_rows, last_row);
        shape.n = extent(columns_, tile_columns, last_column);
        products_.emplace_back(type, shape);
        scratch_ = std::max(scratch_, products_.back().scratch_bytes());
      }
    }
  }
  [[nodiscard]] const Product& of(i64 rows, i64 columns) const {
    const bool last_row = rows != tile_rows_, last_column = columns != tile_columns_;
    return products_[static_cast<std::size_t>(last_row) * 2 + static_cast<std::size_t>(last_column)];
  }
  [[nodiscard]] std::size_t scratch_bytes() const { return scratch_; }

 private:
  static i64 extent(i64 total, i64 tile, bool last) { return last ? total % tile : std::min(total, tile); }

  i64 rows_, columns_, tile_rows_, tile_columns_;
  std::size_t scratch_ = 0;
  std::vector<Product> products_;
};

// ---- the operations

class CpuOps final : public Ops {
 public:
  [[nodiscard]] std::shared_ptr<std::byte> allocate(std::size_t bytes) const override {
    constexpr std::align_val_t kAlignment{64};
    auto* memory = static_cast<std::byte*>(::operator new(bytes + 1, kAlignment, std::nothrow));
    if (memory == nullptr) {
      throw Error(ErrorCode::kOutOfMemory, "a tensor of " + std::to_string(bytes) +
                                               " bytes could not be allocated; free memory or use a smaller batch");
    }
    const std::size_t held = held_bytes += bytes;  // before the owner, who takes it back where it cannot be made, too
    std::shared_ptr<std::byte> owner(memory, [bytes](std::byte* p) {
      ::operator delete(p, kAlignment);
      held_bytes -= bytes;
    });
    for (std::size_t most = most_bytes; held > most && !most_bytes.compare_exchange_weak(most, held);) {
    }
    return owner;
  }
  void clear(void* memory, std::size_t bytes) const override { std::memset(memory, 0, bytes); }

  [[nodiscard]] std::size_t peak_bytes(bool forget) const override {
    return forget ? most_bytes.exchange(held_bytes) : most_bytes.load();
  }

  void linear(const Tensor& x, const Tensor& w, const Finish& finish, const Tensor& places, const Tensor& y,
              const Tensor& before) const override {
    multiply(x, w, true, finish, places, y, before);
  }

  void linear_input_gradient(const Tensor& dy, const Tensor& w, const Tensor& plus, const Tensor& dx) const override {
    multiply(dy, w, false, {.residual = plus}, {}, dx, {});
  }

  void linear_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& dbias) const override {
    if (dy.shape[0] == 0) return;
    const Operand a = operand(dy), b = operand(x);
    const i64 rows = dw.shape[0], columns = dw.shape[1], tile = std::min(kWeightRows, rows);
    const TileProducts products(a.view.dtype,
                                {.transpose_a = true,
                                 .m = rows,
                                 .n = columns,
                                 .k = x.shape[0],
                                 .lda = a.view.strides[0],
                                 .ldb = b.view.strides[0],
                                 .ldc = dw.strides[0],
                                 .accumulate = true},
                                tile, std::min(kTileColumns, columns));
    const int workers = cpu::worker_count(0);
    const Scratch scratch(workers, std::max(products.scratch_bytes(), sizeof(double) * kWeightRows));
    in_tiles(rows, columns, tile, std::min(kTileColumns, columns), workers,
             [&](i64 row, i64 m, i64 column, i64 n, int worker) {
               products.of(m, n).run(at(a.view, 0, row), at(b.view, 0, column),
                                     reinterpret_cast<float*>(at(dw, row, column)), scratch.of(worker));
               if (column != 0 || !dbias.defined()) return;
               kernels_.add_rows(rows_at(dy, 0, row), dy.shape[0], m, static_cast<float*>(dbias.data) + row,
                                 reinterpret_cast<double*>(scratch.of(worker)));
             });
  }

  void finish_gradient(const Tensor& dy, const Finish& finish, const Tensor& places, const Tensor& before,
                       const Tensor& dz) const override {
    const int workers = cpu::worker_count(0);
    const i64 columns = dy.shape[1];
    const Scratch scratch(workers, floats(columns + kSlack));
    in_steps(dy.shape[0], kRowsAtOnce, workers, [&](i64 row, i64 rows, int worker) {
      FinishTile t{.rows = rows, .columns = columns};
      t.in = rows_at(dy, row, 0);
      t.out = rows_at(dz, row, 0);
      if (finish.activation != Activation::kNone) t.before = rows_at(before, row, 0);
      describe(t, finish, places, row, scratch.floats_of(worker));
      kernels_.finish_gradient(t);
    });
  }

  void norm(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& y,
            const Tensor& statistics) const override {
    in_steps(x.shape[0], kRowsAtOnce, cpu::worker_count(0), [&](i64 row, i64 rows, int) {
      NormTile t{.rows = rows, .columns = x.shape[1]};
      t.x = rows_at(x, row, 0);
      t.y = rows_at(y, row, 0);
      t.weight = static_cast<const char*>(weight.data);
      t.bias = static_cast<const char*>(bias.data);
      t.eps = eps;
      if (statistics.defined()) t.statistics = reinterpret_cast<float*>(at(statistics, row, 0));
      kernels_.norm(t);
    });
  }

  void norm_gradient(const Tensor& x, const Tensor& weight, const Tensor& statistics, const Tensor& dy,
                     const Tensor& plus, const Tensor& dx, const Tensor& dweight, const Tensor& dbias) const override {
    // Each tile of rows sums by itself in fp32; the tiles are added in double and in order, whoever computed them.
    const i64 columns = x.shape[1], tiles = ceil_div(x.shape[0], kRowsOfASum), room = columns + kSlack;
    std::vector<float> sums(static_cast<std::size_t>(2 * tiles * room));
    const int workers = cpu::worker_count(0);
    in_steps(x.shape[0], kRowsOfASum, workers, [&](i64 row, i64 rows, int) {
      NormTile t{.rows = rows, .columns = columns};
      t.x = rows_at(x, row, 0);
      t.y = rows_at(dy, row, 0);
      t.dx = rows_at(dx, row, 0);
      t.plus = rows_at(plus, row, 0);
      t.weight = static_cast<const char*>(weight.data);
      t.statistics = reinterpret_cast<float*>(at(statistics, row, 0));
      t.dweight = sums.data() + row / kRowsOfASum * 2 * room;
      t.dbias = t.dweight + room;
      kernels_.norm_gradient(t);
    });
    const auto add_up = [&](const Tensor& to, i64 c, i64 offset) {
      if (!to.defined()) return;
      auto total = static_cast<double>(static_cast<float*>(to.data)[c]);
      for (i64 tile = 0; tile < tiles; ++tile) total += static_cast<double>(sums[2 * tile * room + offset + c]);
      static_cast<float*>(to.data)[c] = static_cast<float>(total);
    };
    in_steps(columns, kRowsAtOnce, workers, [&](i64 first, i64 count, int) {
      for (i64 c = first; c < first + count; ++c) {
        add_up(dweight, c, 0);
        add_up(dbias, c, room);
      }
    });
  }

  void rotate(const Tensor& x, const Rotary& rotary, const Tensor& places, bool back) const override {
    const i64 rows = x.shape[0], dim = rotary.dim;
    const auto* place = static_cast<const std::int32_t*>(places.data);
    i64 positions = 0;
    for (i64 r = 0; r < rows; ++r) positions = std::max<i64>(positions, place[2 * r + 1] + 1);
    std::vector<float> table(static_cast<std::size_t>(positions * dim));
    const int workers = cpu::worker_count(0);
    in_steps(positions, kRowsAtOnce, workers, [&](i64 first, i64 count, int) {
      for (i64 p = first; p < first + count; ++p) {
        for (i64 c = 0; c < dim / 2; ++c) {
          const double angle =
              static_cast<double>(p) *
              std::pow(static_cast<double>(rotary.base), -2.0 * static_cast<double>(c) / static_cast<double>(dim));
          table[p * dim + 2 * c] = static_cast<float>(std::cos(angle));
          table[p * dim + 2 * c + 1] = static_cast<float>(std::sin(angle));
        }
      }
    });
    in_steps(rows, kRowsAtOnce, workers, [&](i64 row, i64 count, int) {
      kernels_.rotate({.rows = count,
                       .heads = x.shape[1],
                       .dim = dim,
                       .head_stride = x.strides[1] * size_bytes(x.dtype),
                       .x = rows_at(x, row, 0),
                       .table = table.data(),
                       .places = place + 2 * row,
                       .interleaved = rotary.interleaved,
                       .back = back});
    });
  }

  void copy(const Tensor& from, const Tensor& to) const override {
    const bool floating = is_floating(from.dtype) && is_floating(to.dtype);
    if (floating && from.rank == 2 && from.strides[1] == 1 && to.strides[1] == 1) {
      in_steps(from.shape[0], kRowsAtOnce, cpu::worker_count(0), [&](i64 row, i64 rows, int) {
        kernels_.convert(rows_at(from, row, 0), rows_at(to, row, 0), rows, from.shape[1]);
      });
      return;
    }
    pointwise(from, to, [](double x) { return x; });
  }

  void place_rows(const Tensor& cu_seqlens, i64 batch, bool interleaved, const Tensor& places) const override {
    auto* place = static_cast<std::int32_t*>(places.data);
    const i64 rows = places.shape[0];
    for (i64 r = 0, sequence = 0; r < rows; ++r) {
      i64 position = 0;
      if (cu_seqlens.defined()) {
        const auto* ends = static_cast<const std::int32_t*>(cu_seqlens.data);
        while (ends[(sequence + 1) * cu_seqlens.strides[0]] <= r) ++sequence;
        position = r - ends[sequence * cu_seqlens.strides[0]];
      } else {
        sequence = interleaved ? r % batch : r / (rows / batch);
        position = interleaved ? r / batch : r % (rows / batch);
      }
      place[2 * r] = static_cast<std::int32_t>(sequence);
      place[2 * r + 1] = static_cast<std::int32_t>(position);
    }
  }

  void keep_of(const Tensor& ignore, const Tensor& keep) const override {
    pointwise(ignore, keep, [](double x) { return x == 0.0 ? 1.0 : 0.0; });
  }
  void bias_of(const Tensor& ignore, const Tensor& bias) const override {
    pointwise(ignore, bias, [](double x) { return x == 0.0 ? 0.0 : -std::numeric_limits<double>::infinity(); });
  }

  [[nodiscard]] bool lengths_of(const Tensor& ignore, const Tensor& lengths) const override {
    bool whole = true;
    for (i64 b = 0; b < ignore.shape[0]; ++b) {
      const auto ignored = [&](i64 j) {
        return cpu::load(ignore, b * ignore.strides[0] + j * ignore.strides[1]) != 0.0;
      };
      i64 length = ignore.shape[1];
      while (length > 0 && ignored(length - 1)) --length;
      for (i64 j = 0; j < length; ++j) whole = whole && !ignored(j);
      static_cast<std::int32_t*>(lengths.data)[b] = static_cast<std::int32_t>(length);
    }
    return whole;
  }

  void add(const Tensor& a, const Tensor& b, const Tensor& sum) const override {
    std::vector<double> total = cpu::load_all(a);
    const std::vector<double> other = cpu::load_all(b);
    for (std::size_t i = 0; i < total.size(); ++i) total[i] += other[i];
    cpu::store_all(sum, total);
  }

  void mean_of_heads(const Tensor& x, const Tensor& mean) const override {
    const i64 heads = x.shape[2], columns = x.shape[3];
    std::vector<float> sum(static_cast<std::size_t>(columns));
    for (i64 b = 0; b < x.shape[0]; ++b) {
      for (i64 i = 0; i < x.shape[1]; ++i) {
        std::fill(sum.begin(), sum.end(), 0.0F);
        for (i64 h = 0; h < heads; ++h) {
          const i64 head = b * x.strides[0] + i * x.strides[1] + h * x.strides[2];
          for (i64 c = 0; c < columns; ++c) sum[c] += static_cast<float>(cpu::load(x, head + c));
        }
        const i64 row = b * mean.strides[0] + i * mean.strides[1];
        for (i64 c = 0; c < columns; ++c) cpu::store(mean, row + c, sum[c] / static_cast<float>(heads));
      }
    }
  }

  void weight_of_zero(const Tensor& lse, const Tensor& weight) const override {
    pointwise(lse, weight, [](double x) { return std::isinf(x) ? 1.0 : std::exp(-x); });
  }

  void diagonal(const Tensor& x, i64 first) const override {
    for (i64 r = 0; r < x.shape[0]; ++r)
      std::memset(at(x, r, 0), 0, static_cast<std::size_t>(x.shape[1] * size_bytes(x.dtype)));
    for (i64 c = 0; c < std::min(x.shape[1], x.shape[0] - first); ++c)
      cpu::store(x, (first + c) * x.strides[0] + c, 1.0);
  }

  void add_rows(const Tensor& x, const Tensor& sum) const override {
    std::vector<double> scratch(static_cast<std::size_t>(x.shape[1]));
    kernels_.add_rows(rows_at(x, 0, 0), x.shape[0], x.shape[1], static_cast<float*>(sum.data), scratch.data());
  }

  void squares(const Tensor& x, const Tensor& target, float share, const Tensor& losses,
               const Tensor& dx) const override {
    in_loss_tiles(x, share, losses, dx, [&](LossTile& t, i64 row) {
      t.target = rows_at(target, row, 0);
      kernels_.squares(t);
    });
  }

  void entropies(const Tensor& x, const Tensor& classes, float share, const Tensor& losses,
                 const Tensor& dx) const override {
    in_loss_tiles(x, share, losses, dx, [&](LossTile& t, i64 row) {
      t.classes = static_cast<const std::int32_t*>(classes.data) + row;
      kernels_.entropies(t);
    });
  }

  void adamw(const AdamWStep& s) const override {
    const AdamWRates rates = rates_of(s);
    const auto* g = static_cast<const float*>(s.gradient.data);
    auto* mean = static_cast<float*>(s.mean.data);
    auto* variance = static_cast<float*>(s.variance.data);
    const Tensor& kept = s.master.defined() ? s.master : s.value;
    auto* w = static_cast<float*>(kept.data);
    const auto* stored = static_cast<const std::uint16_t*>(s.value.data);  // where there is a master
    constexpr i64 kAtOnce = 1 << 14;
    in_steps(cpu::element_count(s.value), kAtOnce, cpu::worker_count(0), [&](i64 first, i64 count, int) {
      const Rows from{reinterpret_cast<char*>(w + first), 0, Element::kFloat32};
      const auto round_to = [&](void* to) {
        kernels_.convert(from, {static_cast<char*>(to), 0, element(s.value.dtype)}, 1, count);
      };
      if (s.master.defined()) {
        std::array<std::uint16_t, kAtOnce> rounded;
        round_to(rounded.data());
        for (i64 i = first; i < first + count; ++i) {
          if (rounded[i - first] != stored[i]) w[i] = static_cast<float>(cpu::load(s.value, i));
        }
      }
      for (i64 i = first; i < first + count; ++i) {
        mean[i] = s.beta1 * mean[i] + (1.0F - s.beta1) * g[i];
        variance[i] = s.beta2 * variance[i] + (1.0F - s.beta2) * g[i] * g[i];
        w[i] = w[i] * rates.decay - rates.rate * mean[i] / (std::sqrt(variance[i]) / rates.spread + s.eps);
      }
      if (s.master.defined()) round_to(static_cast<char*>(s.value.data) + first * size_bytes(s.value.dtype));
    });
  }

 private:
  /// run(tile, row) for tiles of rows.
  template <class Run>
  static void in_loss_tiles(const Tensor& x, float share, const Tensor& losses, const Tensor& dx, const Run& run) {
    in_steps(x.shape[0], kRowsAtOnce, cpu::worker_count(0), [&](i64 row, i64 rows, int) {
      LossTile t{.rows = rows, .columns = x.shape[1]};
      t.x = rows_at(x, row, 0);
      t.dx = rows_at(dx, row, 0);
      t.share = share;
      t.losses = static_cast<float*>(losses.data) + row;
      run(t, row);
    });
  }

  /// A matrix as products take it: itself, or widened to fp32.
  struct Operand {
    Array widened;
    Tensor view;
  };
  [[nodiscard]] Operand operand(const Tensor& x) const {
    if (x.dtype == DType::kFloat32 || (x.dtype == DType::kBFloat16 && multiplies_bf16())) return {{}, x};
    Operand o;
    o.widened = Array::unset(DType::kFloat32, {x.shape[0], x.shape[1]});
    o.view = o.widened.view();
    copy(x, o.view);
    return o;
  }

  static void describe(FinishTile& t, const Finish& finish, const Tensor& places, i64 row, float* scratch) {
    t.activation = static_cast<int>(finish.activation);
    t.dropout = draws(finish.dropout);
    if (places.defined()) t.places = static_cast<const std::int32_t*>(places.data) + 2 * row;
    t.scratch = scratch;
  }

  /// y = finish(x · w) or finish(x · wᵀ).
  void multiply(const Tensor& x, const Tensor& w, bool transpose, const Finish& finish, const Tensor& places,
                const Tensor& y, const Tensor& before) const {
    const Operand a = operand(x), b = operand(w);
    if (y.shape[0] == 0) return;
    const i64 tile_rows = std::min(kTileRows, y.shape[0]), tile_columns = std::min(kTileColumns, y.shape[1]);
    const bool in_place = y.dtype == DType::kFloat32;
    const TileProducts products(a.view.dtype,
                                {.transpose_b = transpose,
                                 .m = y.shape[0],
                                 .n = y.shape[1],
                                 .k = x.shape[1],
                                 .lda = a.view.strides[0],
                                 .ldb = b.view.strides[0],
                                 .ldc = in_place ? y.strides[0] : tile_columns},
                                tile_rows, tile_columns);
    const int workers = cpu::worker_count(0);
    const Scratch own(workers, products.scratch_bytes()), row(workers, floats(tile_columns + kSlack));
    const Scratch result(workers, in_place ? 0 : floats(tile_rows * tile_columns));
    const bool finished = in_place && !finish.bias.defined() && !finish.changes_gradient() &&
                          !finish.residual.defined() && !before.defined();
    in_tiles(y.shape[0], y.shape[1], tile_rows, tile_columns, workers,
             [&](i64 r, i64 rows, i64 c, i64 columns, int worker) {
               float* to = in_place ? reinterpret_cast<float*>(at(y, r, c)) : result.floats_of(worker);
               const void* right = transpose ? at(b.view, c, 0) : at(b.view, 0, c);
               products.of(rows, columns).run(at(a.view, r, 0), right, to, own.of(worker));
               if (finished) return;
               FinishTile t{.rows = rows, .columns = columns, .first_column = c};
               t.in = {reinterpret_cast<char*>(to), (in_place ? y.strides[0] : tile_columns) * i64{sizeof(float)}};
               t.out = rows_at(y, r, c);
               t.before = rows_at(before, r, c);
               t.residual = rows_at(finish.residual, r, c);
               if (finish.bias.defined())
                 t.bias = static_cast<const char*>(finish.bias.data) + c * size_bytes(finish.bias.dtype);
               describe(t, finish, places, r, row.floats_of(worker));
               kernels_.finish(t);
             });
  }

  /// to = f(from), element by element of up to four dimensions.
  template <class Function>
  static void pointwise(const Tensor& from, const Tensor& to, const Function& f) {
    const auto padded = [](const Tensor& t) {
      Tensor four = t;
      four.shape = {1, 1, 1, 1};
      four.strides = {};
      std::copy_n(t.shape.begin(), t.rank, four.shape.begin() + Tensor::kMaxRank - t.rank);
      std::copy_n(t.strides.begin(), t.rank, four.strides.begin() + Tensor::kMaxRank - t.rank);
      return four;
    };
    const Tensor a = padded(from), b = padded(to);
    in_steps(b.shape[0] * b.shape[1] * b.shape[2], kRowsAtOnce, cpu::worker_count(0), [&](i64 first, i64 count, int) {
      for (i64 row = first; row < first + count; ++row) {
        const i64 i = row / b.shape[2] / b.shape[1], j = row / b.shape[2] % b.shape[1], k = row % b.shape[2];
        const i64 source = i * a.strides[0] + j * a.strides[1] + k * a.strides[2];
        const i64 target = i * b.strides[0] + j * b.strides[1] + k * b.strides[2];
        for (i64 l = 0; l < b.shape[3]; ++l) {
          cpu::store(b, target + l * b.strides[3], f(cpu::load(a, source + l * a.strides[3])));
        }
      }
    });
  }

  RowKernels kernels_ = chosen_kernels();
};

}  // namespace

std::unique_ptr<const Ops> make_cpu_ops() { return std::make_unique<CpuOps>(); }

}  // namespace fovea::nn
