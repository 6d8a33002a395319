#include <fovea/error.h>

#include "arrays.h"
#include "call.h"
#include "pass.h"
#include "plans.h"
#include "problem/refuse.h"
#include "problem/validate.h"

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

namespace fovea::python {
namespace {

constexpr std::array<int, 4> kInOrder{0, 1, 2, 3};
constexpr std::array<int, 4> kHeadsFirst{0, 2, 1, 3};  // [batch, heads, seqlen, dim], a token's heads side by side

/// One of `parts` that stand side by side in the last dimension of rows [..., features]: [..., heads, dim].
Tensor heads_of(const Tensor& rows, int part, int parts, const Projected& from) {
  Tensor t = rows;
  const int last = t.rank - 1;
  const std::int64_t size = t.shape[last] / parts;
  if (t.data != nullptr) t.data = static_cast<std::byte*>(t.data) + part * size * size_bytes(t.dtype);
  t.shape[last] = from.heads;
  t.strides[last] = t.shape[last + 1] = size / from.heads;
  t.strides[last + 1] = 1;
  ++t.rank;
  return t.rank == 4 && !from.batch_first ? t.transposed(0, 1) : t;
}

class Pass {
 public:
  Pass(Direction direction, nb::handle q, nb::handle k, nb::handle v, Extras extras, const CallRules& call_rules)
      : Pass(direction, q, extras, call_rules) {
    call_.in.q = take_tokens(q, "q");
    call_.in.k = take_tokens(k, "k");
    call_.in.v = take_tokens(v, "v");
    wait_for_others();
    if (heads_first() && call_.packed()) {
      throw nb::value_error("layout 'bhsd' belongs to padded tensors; packed ones are [total, heads, dim]");
    }
  }

  Pass(Direction direction, const Projected& from, Extras extras, const CallRules& call_rules)
      : Pass(direction, from.q, extras, call_rules) {
    std::tie(call_.in.q, call_.in.k, call_.in.v) =
        apart(take(from.q, "q"), from.kv.is_none() ? Tensor{} : take(from.kv, "k and v"), from);
  }

  /// q, k and v as they lie in projected rows.
  static std::tuple<Tensor, Tensor, Tensor> apart(const Tensor& q, const Tensor& kv, const Projected& from) {
    if (!kv.defined()) return {heads_of(q, 0, 3, from), heads_of(q, 1, 3, from), heads_of(q, 2, 3, from)};
    return {heads_of(q, 0, 1, from), heads_of(kv, 0, 2, from), heads_of(kv, 1, 2, from)};
  }

  void seed(nb::handle seed, nb::handle offset) {
    if (call_rules_.dropout.probability == 0.0F) return;
    call_.in.dropout_draws = {to_uint64(seed, "seed"), to_uint64(offset, "offset")};
  }

  Inputs& in() { return call_.in; }
  Outputs out{};

  /// [batch, seqlen, heads, dim] as the library wants it, in either layout.
  Tensor take_tokens(nb::handle array, const char* name, bool written = false) {
    return seen(take(array, name, written));
  }
  Tensor take(nb::handle array, const char* name, bool written = false) {
    const Tensor view = take_any(array, name, written);
    // To the library a tensor of no dimensions is one that is not there.
    if (!array.is_none() && !view.defined()) {
      throw nb::value_error((std::string(name) + " has no dimensions; give an array that has some").c_str());
    }
    return view;
  }
  Tensor take_any(nb::handle array, const char* name, bool written = false) {
    if (array.is_none()) return {};
    const Framework& framework = Framework::of(array, name);
    Borrowed borrowed = framework.borrow(array, name, written);
    if (&framework != &framework_ && borrowed.view.device.kind == DeviceKind::kCuda) {
      others_.emplace_back(&framework, array);
    }
    if (borrowed.capsule.is_valid()) capsules_.push_back(std::move(borrowed.capsule));
    return borrowed.view;
  }

  /// A new array with q's rows and heads, v's dim.
  Made make_out() {
    Tensor like = call_.in.q;
    like.shape[like.rank - 1] = call_.in.v.shape[std::max(0, call_.in.v.rank - 1)];
    return make_tokens(like);
  }
  Made make_tokens(const Tensor& like) {
    Tensor shape = seen(like);  // back to the caller's layout
    Made made =
        framework_.make({shape.shape.data(), static_cast<std::size_t>(shape.rank)},
                        std::span(heads_first() ? kHeadsFirst : kInOrder).first(shape.rank), like.dtype, device());
    made.view = seen(made.view);
    return made;
  }
  Made make_like(const Tensor& like) {
    return make({like.shape.data(), static_cast<std::size_t>(like.rank)}, like.dtype);
  }
  Made make_lse() {
    const Tensor& q = call_.in.q;
    if (q.rank == 3) return make(std::array{q.shape[1], q.shape[0]}, DType::kFloat32);
    return make(std::array{q.shape[0], q.shape[2], q.shape[1]}, DType::kFloat32);
  }

  [[nodiscard]] Problem problem() const { return problem_of(call_, call_rules_); }
  [[nodiscard]] const Device& device() const { return call_.in.q.device; }

  /// Checks the call as well: results may be made after this, not before.
  [[nodiscard]] std::shared_ptr<const Plan> plan() const {
    if (auto known = last_plan(call_, call_rules_, call_rules_)) return known;
    const nb::gil_scoped_release others_may_run;
    return plan_of(call_, call_rules_, call_rules_);
  }

  /// Whether there is anything to refuse in what `run` would read and write.
  void check(const Problem& posed) const { validate_forward(posed, device(), call_.in, out); }

  /// The arrays are outlines: they get an address, and lie where lengths and ends are out of reach.
  void check_outlines() {
    Inputs& in = call_.in;
    const Device device = in.q.device;
    for (const auto& [name, tensor] : {std::pair{"k", &in.k},
                                       {"v", &in.v},
                                       {"mask", &in.mask},
                                       {"bias", &in.bias},
                                       {"alibi_slopes", &in.alibi_slopes},
                                       {"sink", &in.sink},
                                       {"q_lengths", &in.q_lengths},
                                       {"kv_lengths", &in.kv_lengths},
                                       {"cu_seqlens_q", &in.cu_seqlens_q},
                                       {"cu_seqlens_kv", &in.cu_seqlens_kv},
                                       {"q", &in.q}}) {
      if (!tensor->defined()) continue;
      check_device(name, tensor->device, "the plan is for", device);
      tensor->data = anywhere();
      tensor->device = {DeviceKind::kCuda, device.index, 0};
    }
    if (call_.packed() && device.kind == DeviceKind::kCpu) {
      if (call_.max_seqlen_q == 0 || call_.max_seqlen_kv == 0) in.mask = in.bias = {};  // as long as the longest is
      for (const auto& [longest, rows] : {std::pair{&call_.max_seqlen_q, &in.q}, {&call_.max_seqlen_kv, &in.k}}) {
        if (*longest == 0) *longest = rows->shape[0];
      }
    }
    const Problem posed = problem();  // whose sentences come first
    pretend_out();
    check(posed);
  }

  /// An out as `make_out` gives it, without making one.
  void pretend_out() {
    out.out = call_.in.q;
    out.out.data = anywhere();
    out.out.shape[out.out.rank - 1] = call_.in.v.shape[std::max(0, call_.in.v.rank - 1)];
    std::int64_t stride = 1;
    for (int axis = out.out.rank - 1; axis >= 0; --axis) {
      out.out.strides[axis] = stride;
      stride *= std::max<std::int64_t>(out.out.shape[axis], 1);
    }
  }

  void run(const Plan& plan) {
    if (device().kind == DeviceKind::kCpu) {
      const nb::gil_scoped_release others_may_run;
      plan.execute(call_.in, out, CpuWorkspace(plan.workspace_bytes()).data());
      return;
    }
    // The framework's allocator orders the workspace's reuse after this stream's work, and serves a capture as well.
    Made workspace;
    if (plan.workspace_bytes() > 0) {
      workspace = make(std::array{static_cast<std::int64_t>((plan.workspace_bytes() + 3) / 4)}, DType::kInt32);
    }
    void* stream = framework_.stream(device());
    const nb::gil_scoped_release others_may_run;
    plan.execute(call_.in, out, workspace.view.data, stream);
  }

 private:
  /// Where nobody looks, aligned to any element.
  static void* anywhere() {
    alignas(8) static std::byte place[8];
    return place;
  }

  Pass(Direction direction, nb::handle first, Extras extras, const CallRules& call_rules)
      : framework_(Framework::of(first, "q")), call_rules_(call_rules) {
    call_.direction = direction;
    if (!extras.is_none()) take_extras(nb::cast<nb::tuple>(extras));
  }

  void take_extras(const nb::tuple& extras) {
    call_.in.mask = take_entries(extras[0], "mask");
    call_.in.bias = take_entries(extras[1], "bias");
    call_.in.alibi_slopes = take(extras[2], "alibi_slopes");
    call_.in.sink = take(extras[3], "sink");
    call_.in.q_lengths = take(extras[4], "q_lengths");
    call_.in.kv_lengths = take(extras[5], "kv_lengths");
    call_.in.cu_seqlens_q = take(extras[6], "cu_seqlens_q");
    call_.in.cu_seqlens_kv = take(extras[7], "cu_seqlens_kv");
    if (!nb::handle(extras[8]).is_none()) call_.max_seqlen_q = to_int64(extras[8], "max_seqlen_q");
    if (!nb::handle(extras[9]).is_none()) call_.max_seqlen_kv = to_int64(extras[9], "max_seqlen_kv");
  }
  Tensor take_entries(nb::handle array, const char* name) {
    return array.is_none() ? Tensor{} : padded(take_any(array, name));
  }

  /// What other frameworks have queued on their arrays, in their streams, comes before what is queued in ours.
  void wait_for_others() {
    if (device().kind != DeviceKind::kCuda) return;
    for (const auto& [framework, array] : others_) {
      void* stream = framework_.stream(device());
      if (framework->stream(device()) == stream) continue;
      // By DLPack's protocol, in which the default stream is number 1.
      const nb::int_ number(stream == nullptr ? 1 : reinterpret_cast<std::uintptr_t>(stream));
      capsules_.push_back(array.attr("__dlpack__")(nb::arg("stream") = number));
    }
  }

  [[nodiscard]] bool heads_first() const { return call_rules_.heads_first; }
  [[nodiscard]] Tensor seen(const Tensor& t) const { return heads_first() && t.rank == 4 ? t.transposed(1, 2) : t; }
  Made make(std::span<const std::int64_t> shape, DType dtype) {
    return framework_.make(shape, std::span(kInOrder).first(shape.size()), dtype, device());
  }

  const Framework& framework_;
  const CallRules& call_rules_;
  Call call_;
  std::vector<nb::object> capsules_;
  std::vector<std::pair<const Framework*, nb::handle>> others_;  // on a GPU, with their arrays
};

/// `heads`: which dimension they are.
bool are_regular(const Tensor& q, const Tensor& k, const Tensor& v, int heads) {
  const auto rows = [](const Tensor& t) {
    return t.rank == 4 && t.strides[3] == 1 && std::find(t.shape.begin(), t.shape.end(), 0) == t.shape.end();
  };
  const auto alike = [&](const Tensor& a, const Tensor& b) {
    return a.shape[0] == b.shape[0] && a.shape[heads] == b.shape[heads];
  };
  return rows(q) && rows(k) && rows(v) && alike(q, k) && alike(k, v);
}

/// The library's refusals are Python's ValueError; its other failures are RuntimeError by themselves.
template <typename Work>
auto translated(const Work& work) {
  try {
    return work();
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInvalidArgument) throw nb::value_error(error.what());
    throw;
  }
}

}  // namespace

nb::object forward(nb::handle q, nb::handle k, nb::handle v, Extras extras, const CallRules& rules, nb::handle seed,
                   nb::handle offset, bool want_lse, nb::handle out) {
  return translated([&]() -> nb::object {
    Pass pass(Direction::kForward, q, k, v, extras, rules);
    pass.seed(seed, offset);
    const auto plan = pass.plan();
    Made made, lse;
    if (out.is_none()) {
      made = pass.make_out();
    } else {
      made = {nb::borrow(out), pass.take_tokens(out, "out", true)};
    }
    pass.out.out = made.view;
    if (want_lse) {
      lse = pass.make_lse();
      pass.out.lse = lse.view;
    }
    pass.run(*plan);
    if (!want_lse) return std::move(made.object);
    return nb::make_tuple(std::move(made.object), std::move(lse.object));
  });
}

void check(nb::handle q, nb::handle k, nb::handle v, Extras extras, const CallRules& rules, nb::handle out) {
  translated([&] {
    Pass pass(Direction::kForward, q, k, v, extras, rules);
    if (nb::isinstance<Outline>(q)) {
      pass.check_outlines();
      return;
    }
    const auto plan = pass.plan();
    if (out.is_none()) {
      pass.pretend_out();
    } else {
      pass.out.out = pass.take_tokens(out, "out", true);
    }
    pass.check(plan->problem());
  });
}

bool regular(nb::handle q, nb::handle k, nb::handle v) {
  const auto shape_of = [](nb::handle array) -> Tensor {
    try {
      return Framework::of(array, "an array").borrow(array, "an array", false).view;
    } catch (const nb::builtin_exception&) {
      return {};  // whoever looks closer will say why
    }
  };
  return are_regular(shape_of(q), shape_of(k), shape_of(v), 1);
}

nb::object forward_regular(nb::handle q, nb::handle k, nb::handle v, const CallRules& rules) {
  return translated([&]() -> nb::object {
    try {
      Pass pass(Direction::kForward, q, k, v, nb::none(), rules);
      if (!are_regular(pass.in().q, pass.in().k, pass.in().v, 2)) return nb::none();
      const auto plan = pass.plan();
      Made made = pass.make_out();
      pass.out.out = made.view;
      pass.run(*plan);
      return std::move(made.object);
    } catch (const nb::builtin_exception&) {
      return nb::none();
    }
  });
}

nb::tuple backward(nb::handle dout, nb::handle dlse, nb::handle q, nb::handle k, nb::handle v, nb::handle out,
                   nb::handle lse, Extras extras, const CallRules& rules, nb::handle seed, nb::handle offset,
                   int wanted) {
  return translated([&] {
    Pass pass(Direction::kBackward, q, k, v, extras, rules);
    pass.seed(seed, offset);
    const auto plan = pass.plan();
    Inputs& in = pass.in();
    in.out = pass.take_tokens(out, "out");
    in.dout = pass.take_tokens(dout, "dout");
    in.lse = pass.take(lse, "lse");
    in.dlse = pass.take(dlse, "dlse");
    const Made dq = pass.make_tokens(in.q), dk = pass.make_tokens(in.k), dv = pass.make_tokens(in.v);
    pass.out.dq = dq.view;
    pass.out.dk = dk.view;
    pass.out.dv = dv.view;
    const auto optional = [&](Wanted bit, const Tensor& given, int extra, Tensor& written) -> nb::object {
      if ((wanted & bit) == 0 || !given.defined()) return nb::none();
      // In the shape that the caller gave, which may have fewer dimensions than the library sees.
      Made made = pass.make_like(pass.take_any(nb::cast<nb::tuple>(extras)[extra], "an input with a gradient"));
      written = bit == kBias ? padded(made.view) : made.view;
      return std::move(made.object);
    };
    const nb::object dbias = optional(kBias, in.bias, 1, pass.out.dbias);
    const nb::object dslopes = optional(kSlopes, in.alibi_slopes, 2, pass.out.dalibi_slopes);
    const nb::object dsink = optional(kSink, in.sink, 3, pass.out.dsink);
    pass.run(*plan);
    return nb::make_tuple(dq.object, dk.object, dv.object, dbias, dslopes, dsink);
  });
}

nb::tuple forward_projected(nb::handle q, nb::handle kv, std::int64_t heads, bool batch_first, Extras extras,
                            const CallRules& rules, nb::handle seed, nb::handle offset) {
  return translated([&] {
    const Projected from{q, kv, heads, batch_first};
    Pass pass(Direction::kForward, from, extras, rules);
    pass.seed(seed, offset);
    const auto plan = pass.plan();
    Tensor like = pass.take(q, "q");
    if (kv.is_none()) like.shape[like.rank - 1] /= 3;
    Made out = pass.make_like(like), lse = pass.make_lse();
    pass.out.out = heads_of(out.view, 0, 1, from);
    pass.out.lse = lse.view;
    pass.run(*plan);
    return nb::make_tuple(std::move(out.object), std::move(lse.object));
  });
}

nb::tuple backward_projected(nb::handle dout, nb::handle q, nb::handle kv, nb::handle out, nb::handle lse,
                             std::int64_t heads, bool batch_first, Extras extras, const CallRules& rules,
                             nb::handle seed, nb::handle offset) {
  return translated([&] {
    const Projected from{q, kv, heads, batch_first};
    Pass pass(Direction::kBackward, from, extras, rules);
    pass.seed(seed, offset);
    const auto plan = pass.plan();
    Inputs& in = pass.in();
    in.out = heads_of(pass.take(out, "out"), 0, 1, from);
    in.dout = heads_of(pass.take(dout, "dout"), 0, 1, from);
    in.lse = pass.take(lse, "lse");
    const Made dq = pass.make_like(pass.take(q, "q"));
    const Made dkv = kv.is_none() ? Made{nb::none(), {}} : pass.make_like(pass.take(kv, "k and v"));
    std::tie(pass.out.dq, pass.out.dk, pass.out.dv) = Pass::apart(dq.view, dkv.view, from);
    pass.run(*plan);
    return nb::make_tuple(dq.object, dkv.object);
  });
}

Report explain(bool backward, nb::handle q, nb::handle k, nb::handle v, Extras extras, const CallRules& rules) {
  return translated([&] {
    const Pass pass(backward ? Direction::kBackward : Direction::kForward, q, k, v, extras, rules);
    const Problem problem = pass.problem();
    const nb::gil_scoped_release others_may_run;  // kernels may have to be compiled
    return fovea::explain(problem, pass.device(), rules);
  });
}

}  // namespace fovea::python
