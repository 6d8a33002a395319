#include "layer.h"

#include <fovea/error.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "arrays.h"
#include "cuda/driver.h"
#include "nn/cuda/cublas_lt.h"
#include "nn/cuda/kernels.h"
#include "nn/layout.h"

namespace fovea::python {
namespace {

using nn::slice;

constexpr std::int64_t kPieceBytes = 16;
constexpr std::int64_t kRowsOfBlock = cuda::kLayerThreads / cuda::kLanes;  // of move_rows

struct Machine {
  explicit Machine(int gpu) : products(gpu), kernels(gpu) {}
  nn::CublasLt products;
  nn::Kernels kernels;
};

/// The products and kernels of a GPU, or why it has none.
struct Found {
  std::unique_ptr<const Machine> machine;
  std::string why_not;
};

const Found& find_machine(int gpu) {
  static std::mutex mutex;
  static auto& all = *new std::map<int, Found>;  // the driver may be gone when the process ends
  const std::lock_guard lock(mutex);
  const auto [place, unknown] = all.try_emplace(gpu);
  if (unknown) {
    try {
      place->second.machine = std::make_unique<const Machine>(gpu);
    } catch (const Error& error) {
      place->second.why_not = error.what();
    }
  }
  return place->second;
}

/// Thrown where the layer has to be computed in another way.
struct AnotherWay {};

/// [rows, features] of evenly spaced rows.
Tensor rows_of(const Tensor& x) {
  const int last = x.rank - 1;
  if (last < 1 || x.strides[last] != 1) throw AnotherWay();
  Tensor rows = x;
  rows.rank = 2;
  rows.shape = {1, x.shape[last]};
  rows.strides = {x.strides[last - 1], 1};
  for (int i = 0; i < last; ++i) rows.shape[0] *= x.shape[i];
  for (int i = 0; i + 1 < last; ++i) {
    if (x.shape[i] != 1 && x.strides[i] != x.shape[i + 1] * x.strides[i + 1]) throw AnotherWay();
  }
  if (rows.shape[0] == 0 || rows.strides[0] < rows.shape[1]) throw AnotherWay();
  return rows;
}

/// One call: its tensors, the stream they are in, and what is made on the way.
class Layer {
 public:
  Layer(nb::handle query, const LayerCall& call)
      : framework_(Framework::of(query, "query")), like_(framework_.borrow(query, "query", false).view) {
    const bool half = like_.dtype == DType::kFloat16 || like_.dtype == DType::kBFloat16;
    if (like_.device.kind != DeviceKind::kCuda || !half) throw AnotherWay();
    machine_ = find_machine(like_.device.index).machine.get();
    if (machine_ == nullptr) throw AnotherWay();
    stream_ = framework_.stream(like_.device);
    if (!call.index.is_none()) index_ = framework_.borrow(call.index, "index", false).view;
  }

  [[nodiscard]] Tensor take(nb::handle array) const {
    if (array.is_none()) return {};
    const Tensor view = framework_.borrow(array, "a tensor of the layer", false).view;
    if (view.dtype != like_.dtype || view.device != like_.device) throw AnotherWay();
    return view;
  }
  [[nodiscard]] Made make(std::span<const std::int64_t> shape) const { return make(shape, like_.dtype); }
  /// x's rows with other features.
  [[nodiscard]] Made make_rows(const Tensor& x, std::int64_t features) const {
    std::array<std::int64_t, Tensor::kMaxRank> shape = x.shape;
    shape[x.rank - 1] = features;
    return make(std::span(shape).first(static_cast<std::size_t>(x.rank)));
  }

  /// y = x wᵀ + bias.
  [[nodiscard]] Made linear(const Tensor& x, const Tensor& w, const Tensor& bias) const {
    Made y = make_rows(x, w.shape[0]);
    multiply({.a = rows_of(x), .b = w, .d = rows_of(y.view), .transpose_b = true, .bias = bias});
    return y;
  }
  /// dx = dy w.
  [[nodiscard]] Made input_gradient(const Tensor& dy, const Tensor& w) const {
    Made dx = make_rows(dy, w.shape[1]);
    multiply({.a = rows_of(dy), .b = w, .d = rows_of(dx.view)});
    return dx;
  }
  /// dw = dyᵀ x, and dbias the sums of dy's rows.
  void weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& dw, const Tensor& dbias) const {
    multiply({.a = rows_of(dy), .b = rows_of(x), .d = dw, .transpose_a = true, .a_sums = dbias});
  }

  [[nodiscard]] bool packs() const { return index_.defined(); }
  /// Padded [batch, seqlen, features] to rows, and back with zeros.
  [[nodiscard]] Made packed(const Tensor& x) const {
    const std::int64_t all = x.shape[0] * x.shape[1], rows = index_.shape[0] - x.shape[0] - 1 - all;
    Made to = make(std::array{rows, x.shape[2]});
    move(x, to.view, x.shape[0] + 1, rows);
    return to;
  }
  [[nodiscard]] Made padded(const Tensor& rows, const Tensor& shape) const {
    Made to = make(std::span(shape.shape).first(3));
    const std::int64_t all = shape.shape[0] * shape.shape[1];
    move(rows, to.view, index_.shape[0] - all, all);
    return to;
  }

 private:
  [[nodiscard]] Made make(std::span<const std::int64_t> shape, DType dtype) const {
    constexpr std::array<int, 4> kInOrder{0, 1, 2, 3};
    return framework_.make(shape, std::span(kInOrder).first(shape.size()), dtype, like_.device);
  }

  void multiply(const nn::MatrixProduct& product) const {
    Made workspace;
    const auto allocate = [&](std::size_t bytes) {
      workspace = make(std::array{static_cast<std::int64_t>((bytes + 3) / 4)}, DType::kInt32);
      return workspace.view.data;
    };
    if (!machine_->products.multiply(product, {.stream = stream_, .workspace = allocate})) throw AnotherWay();
  }

  void move(const Tensor& from, const Tensor& to, std::int64_t first, std::int64_t rows) const {
    const std::int64_t features = to.shape[to.rank - 1], bytes = features * size_bytes(to.dtype);
    const Tensor from_rows = rows_of(from);
    if (bytes % kPieceBytes != 0 || from_rows.strides[0] != features ||
        reinterpret_cast<std::uintptr_t>(from.data) % kPieceBytes != 0) {
      throw AnotherWay();
    }
    const cuda::MoveRowsParams p{.from = static_cast<const char*>(from.data),
                                 .to = static_cast<char*>(to.data),
                                 .index = static_cast<const int*>(index_.data) + first,
                                 .rows = rows,
                                 .pieces = bytes / kPieceBytes};
    machine_->kernels.launch(nn::KernelName::kMoveRows, DType::kFloat32, (rows + kRowsOfBlock - 1) / kRowsOfBlock, p, 1,
                             stream_);
  }

  const Framework& framework_;
  Tensor like_{}, index_{};
  const Machine* machine_ = nullptr;
  void* stream_ = nullptr;
};

/// [columns] or [columns, features], one behind the other.
Tensor dense(const Tensor& weight) {
  std::int64_t stride = 1;
  for (int i = weight.rank - 1; i >= 0; --i) {
    if (weight.strides[i] != stride) throw AnotherWay();
    stride *= weight.shape[i];
  }
  return weight;
}

template <class Work>
nb::object or_none(const Work& work) {
  try {
    return work();
  } catch (const AnotherWay&) {
    return nb::none();
  }
}

}  // namespace

nb::object forward_layer(nb::handle query, nb::handle key, nb::handle in_weight, nb::handle in_bias,
                         nb::handle out_weight, nb::handle out_bias, const LayerCall& call) {
  return or_none([&]() -> nb::object {
    const Layer layer(query, call);
    const Tensor in = dense(layer.take(in_weight)), wo = dense(layer.take(out_weight));
    const Tensor bias = dense(layer.take(in_bias)), bo = dense(layer.take(out_bias));
    const Tensor padded = layer.take(query);
    const Made packed = layer.packs() ? layer.packed(padded) : Made{nb::borrow(query), padded};
    const std::int64_t size = wo.shape[1];
    Made q, kv{nb::none(), {}};
    if (key.is_none()) {
      q = layer.linear(packed.view, in, bias);
    } else {
      q = layer.linear(packed.view, slice(in, 0, 0, size), slice(bias, 0, 0, size));
      kv = layer.linear(layer.take(key), slice(in, 0, size, 2 * size), slice(bias, 0, size, 2 * size));
    }
    const nb::tuple attended = forward_projected(q.object, kv.object, call.heads, call.batch_first, call.extras,
                                                 call.rules, call.seed, call.offset);
    Made y = layer.linear(layer.take(attended[0]), wo, bo);
    if (layer.packs()) y = layer.padded(y.view, padded);
    return nb::make_tuple(y.object, packed.object, q.object, kv.object, attended[0], attended[1]);
  });
}

nb::object backward_layer(nb::handle dy, nb::handle query, nb::handle key, nb::handle in_weight, nb::handle out_weight,
                          nb::handle q, nb::handle kv, nb::handle out, nb::handle lse, const LayerCall& call,
                          int wanted) {
  return or_none([&]() -> nb::object {
    const Layer layer(dy, call);
    const Tensor in = dense(layer.take(in_weight)), wo = dense(layer.take(out_weight));
    const Tensor given = layer.take(dy), attended = layer.take(out);
    const Made packed = layer.packs() ? layer.packed(given) : Made{nb::borrow(dy), given};
    const std::int64_t size = wo.shape[1];
    const auto make_if = [&](bool wants, std::initializer_list<std::int64_t> shape) {
      return wants ? layer.make(std::span(shape.begin(), shape.size())) : Made{nb::none(), {}};
    };
    const bool in_bias = (wanted & kInBias) != 0, out_bias = (wanted & kOutBias) != 0;
    Made dquery{nb::none(), {}}, dkey{nb::none(), {}};
    const Made din = make_if((wanted & (kInWeight | kInBias)) != 0, {3 * size, size});
    const Made din_bias = make_if(in_bias, {3 * size});
    const Made dwo = make_if((wanted & (kOutWeight | kOutBias)) != 0, {size, size});
    const Made dbo = make_if(out_bias, {size});
    if (dwo.view.defined()) layer.weight_gradient(packed.view, attended, dwo.view, dbo.view);
    if ((wanted & (kQuery | kKey | kInWeight | kInBias)) != 0) {
      const Made dout = layer.input_gradient(packed.view, wo);
      const nb::tuple projected = backward_projected(dout.object, q, kv, out, lse, call.heads, call.batch_first,
                                                     call.extras, call.rules, call.seed, call.offset);
      const Tensor dq = layer.take(projected[0]), dkv = layer.take(projected[1]);
      const std::int64_t of_q = dkv.defined() ? size : 3 * size;
      if (din.view.defined()) {
        layer.weight_gradient(dq, layer.take(query), slice(din.view, 0, 0, of_q), slice(din_bias.view, 0, 0, of_q));
        if (dkv.defined()) {
          layer.weight_gradient(dkv, layer.take(key), slice(din.view, 0, size, 2 * size),
                                slice(din_bias.view, 0, size, 2 * size));
        }
      }
      if ((wanted & kQuery) != 0) {
        dquery = layer.input_gradient(dq, slice(in, 0, 0, of_q));
        if (layer.packs()) dquery = layer.padded(dquery.view, given);
      }
      if ((wanted & kKey) != 0) dkey = layer.input_gradient(dkv, slice(in, 0, size, 2 * size));
    }
    return nb::make_tuple(dquery.object, dkey.object, din.object, din_bias.object, dwo.object, dbo.object);
  });
}

std::string why_no_layer(int gpu) { return find_machine(gpu).why_not; }

nb::tuple pack(nb::handle ignore) {
  const auto wait_for = [](const Device& device, void* stream) {
    const cuda::Event event(device.index);
    event.record(stream);
    event.synchronize();
  };
  const Framework& framework = Framework::of(ignore, "key_padding_mask");
  const Tensor mask = dense(framework.borrow(ignore, "key_padding_mask", false).view);
  const std::int64_t batch = mask.shape[0], seqlen = mask.shape[1];
  const bool on_gpu = mask.device.kind == DeviceKind::kCuda;
  void* stream = framework.stream(mask.device);
  std::vector<char> host(static_cast<std::size_t>(on_gpu ? batch * seqlen : 0));
  if (on_gpu) {
    cuda::copy_async(mask.device.index, host.data(), mask.data, host.size(), stream);
    wait_for(mask.device, stream);
  }
  const char* hidden = on_gpu ? host.data() : static_cast<const char*>(mask.data);
  std::vector<std::int32_t> index{0}, places, rows(static_cast<std::size_t>(batch * seqlen), -1);
  places.reserve(rows.size());
  std::int64_t shortest = batch == 0 ? 0 : seqlen, longest = 0;
  for (std::int64_t b = 0, place = 0; b < batch; ++b) {
    for (const std::int64_t end = place + seqlen; place < end; ++place) {
      if (hidden[place] != 0) continue;
      rows[place] = static_cast<std::int32_t>(places.size());
      places.push_back(static_cast<std::int32_t>(place));
    }
    const auto length = static_cast<std::int64_t>(places.size()) - index.back();
    shortest = std::min(shortest, length);
    longest = std::max(longest, length);
    index.push_back(static_cast<std::int32_t>(places.size()));
  }
  index.insert(index.end(), places.begin(), places.end());
  index.insert(index.end(), rows.begin(), rows.end());
  constexpr int kInOrder[] = {0};
  const Made made =
      framework.make(std::array{static_cast<std::int64_t>(index.size())}, kInOrder, DType::kInt32, mask.device);
  const std::size_t bytes = index.size() * sizeof index[0];
  if (on_gpu) {
    cuda::copy_async(mask.device.index, made.view.data, index.data(), bytes, stream);
    wait_for(mask.device, stream);  // before the host's copy goes
  } else {
    std::memcpy(made.view.data, index.data(), bytes);
  }
  return nb::make_tuple(made.object, places.size(), shortest, longest);
}

}  // namespace fovea::python
