#include <fovea/fovea.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "arrays.h"
#include "layer.h"
#include "pass.h"
#include "xla.h"

// fovea._core: the C++ side of the Python package.  What users call is in python/fovea and documented there.
namespace fovea::python {
namespace {

/// A report in words, which can be pickled: a problem whose lengths are open has no line that reads back as it.
struct Told {
  std::string text, problem, device, backend;
  std::vector<std::pair<std::string, std::string>> details;
  std::size_t workspace_bytes = 0;
  std::vector<std::pair<std::string, std::vector<std::string>>> reasons;

  explicit Told(const Report& r)
      : text(to_string(r)),
        problem(to_string(r.problem)),
        device(name(r.device)),
        backend(r.backend),
        details(r.details),
        workspace_bytes(r.workspace_bytes) {
    for (const Verdict& verdict : r.verdicts) reasons.emplace_back(verdict.backend, verdict.reasons);
  }

  using State =
      std::tuple<std::string, std::string, std::string, std::string, decltype(details), std::size_t, decltype(reasons)>;
  explicit Told(State state)
      : text(std::get<0>(state)),
        problem(std::get<1>(state)),
        device(std::get<2>(state)),
        backend(std::get<3>(state)),
        details(std::get<4>(state)),
        workspace_bytes(std::get<5>(state)),
        reasons(std::get<6>(state)) {}
  [[nodiscard]] State state() const { return {text, problem, device, backend, details, workspace_bytes, reasons}; }
};

void bind_report(nb::module_& module) {
  nb::class_<Told>(module, "Report", "Who runs a call, how, and why the others do not; str() prints it.")
      .def_ro("problem", &Told::problem, "The problem as one line of text.")
      .def_ro("device", &Told::device, "'cpu', 'cuda:0'.")
      .def_ro("backend", &Told::backend, "Who runs it; '' where nobody does.")
      .def_ro("details", &Told::details, "Pairs: instruction set, tiles, threads, ...")
      .def_ro("workspace_bytes", &Told::workspace_bytes)
      .def_prop_ro(
          "reasons",
          [](const Told& told) {
            nb::dict reasons;
            for (const auto& [backend, why] : told.reasons) reasons[nb::str(backend.c_str())] = why;
            return reasons;
          },
          "For every backend asked, in order of preference, why it would not run the call; [] if it would.")
      .def("__str__", [](const Told& told) { return told.text; })
      .def("__repr__",
           [](const Told& told) {
             return "<fovea.Report: " + told.problem + " on " + told.device + ": " +
                    (told.backend.empty() ? "nobody" : told.backend) + ">";
           })
      .def("__getstate__", &Told::state)
      .def("__setstate__", [](Told& told, Told::State state) { new (&told) Told(std::move(state)); });
}

}  // namespace
}  // namespace fovea::python

// NOLINTNEXTLINE(misc-use-anonymous-namespace): what the macro makes is static
NB_MODULE(_core, module) {
  using namespace fovea::python;
  namespace nb = nanobind;
  nb::set_leak_warnings(false);  // caches hold rules until the process ends
  const auto any = [](const char* name) { return nb::arg(name).none(); };
  module.attr("__version__") = FOVEA_VERSION;
  nb::class_<CallRules>(module, "Rules", "The options of a call that are not tensors, checked once.")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle,
                    nb::handle, nb::handle>(),
           any("softmax_scale"), any("causal"), any("window_left"), any("window_right"), any("softcap"),
           any("dropout_p"), any("deterministic"), any("layout"), any("backend"), any("strict"));
  bind_report(module);
  module.def("forward", &forward, any("q"), any("k"), any("v"), any("extras"), nb::arg("rules"), any("seed"),
             any("offset"), nb::arg("want_lse"), any("out"));
  nb::class_<Outline>(module, "Outline", "An array without data, by what DLPack would say of it.")
      .def(
          "__init__",
          [](Outline* self, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, int type_code,
             int type_bits, int device_type, int device_index) {
            new (self) Outline{std::move(shape), std::move(strides), type_code, type_bits, device_type, device_index};
          },
          nb::arg("shape"), nb::arg("strides"), nb::arg("type_code"), nb::arg("type_bits"), nb::arg("device_type"),
          nb::arg("device_index"));
  module.def("check", &check, any("q"), any("k"), any("v"), any("extras"), nb::arg("rules"), any("out"));
  module.def("regular", &regular, any("q"), any("k"), any("v"));
  module.def("forward_regular", &forward_regular, any("q"), any("k"), any("v"), nb::arg("rules"));
  module.def("backward", &backward, any("dout"), any("dlse"), any("q"), any("k"), any("v"), any("out"), any("lse"),
             any("extras"), nb::arg("rules"), any("seed"), any("offset"), nb::arg("wanted"));
  module.def("forward_projected", &forward_projected, any("q"), any("kv"), nb::arg("heads"), nb::arg("batch_first"),
             any("extras"), nb::arg("rules"), any("seed"), any("offset"));
  module.def("backward_projected", &backward_projected, any("dout"), any("q"), any("kv"), any("out"), any("lse"),
             nb::arg("heads"), nb::arg("batch_first"), any("extras"), nb::arg("rules"), any("seed"), any("offset"));
  using nb::handle;
  module.def(
      "forward_layer",
      [](handle query, handle key, handle in_weight, handle in_bias, handle out_weight, handle out_bias,
         std::int64_t heads, bool batch_first, handle extras, const CallRules& rules, handle seed, handle offset,
         handle index) {
        return forward_layer(query, key, in_weight, in_bias, out_weight, out_bias,
                             {heads, batch_first, extras, rules, seed, offset, index});
      },
      any("query"), any("key"), any("in_weight"), any("in_bias"), any("out_weight"), any("out_bias"), nb::arg("heads"),
      nb::arg("batch_first"), any("extras"), nb::arg("rules"), any("seed"), any("offset"), any("index"));
  module.def(
      "backward_layer",
      [](handle dy, handle query, handle key, handle in_weight, handle out_weight, handle q, handle kv, handle out,
         handle lse, std::int64_t heads, bool batch_first, handle extras, const CallRules& rules, handle seed,
         handle offset, handle index, int wanted) {
        return backward_layer(dy, query, key, in_weight, out_weight, q, kv, out, lse,
                              {heads, batch_first, extras, rules, seed, offset, index}, wanted);
      },
      any("dy"), any("query"), any("key"), any("in_weight"), any("out_weight"), any("q"), any("kv"), any("out"),
      any("lse"), nb::arg("heads"), nb::arg("batch_first"), any("extras"), nb::arg("rules"), any("seed"), any("offset"),
      any("index"), nb::arg("wanted"));
  module.def("why_no_layer", &why_no_layer, nb::arg("gpu"));
  module.def("pack", &pack, any("ignore"));
  // Named as JAX wants the capsules of functions that XLA calls.
  module.def("xla_handlers", [] {
    constexpr const char* kName = "xla._CUSTOM_CALL_TARGET";
    return nb::make_tuple(nb::capsule(xla_handler_cpu(), kName), nb::capsule(xla_handler_cuda(), kName));
  });
  module.def(
      "explain",
      [](bool backward, handle q, handle k, handle v, handle extras, const CallRules& rules) {
        return Told(explain(backward, q, k, v, extras, rules));
      },
      nb::arg("backward"), any("q"), any("k"), any("v"), any("extras"), nb::arg("rules"));
}
