#include "rules.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace fovea::python {
namespace {

[[noreturn]] void refuse(const char* name, nb::handle value, const char* rule) {
  std::string text = nb::repr(value).c_str();
  std::replace(text.begin(), text.end(), '\n', ' ');
  const std::string sentence = std::string(name) + " (" + text + ") must be " + rule;
  throw nb::value_error(sentence.c_str());
}

float to_float(nb::handle value, const char* name) {
  double number = 0.0;
  if (PyBool_Check(value.ptr()) != 0 || !nb::try_cast(value, number)) refuse(name, value, "a number");
  const float rounded = static_cast<float>(number);
  if (std::isfinite(number) && (!std::isfinite(rounded) || (rounded == 0.0F && number != 0.0))) {
    refuse(name, value, "0 or of a size that fp32 holds, 1e-45 to 3.4e38");
  }
  return rounded;
}

bool to_bool(nb::handle value, const char* name) {
  bool truth = false;
  if (!nb::try_cast(value, truth)) refuse(name, value, "True or False");
  return truth;
}

std::string to_word(nb::handle value, const char* name, const char* rule) {
  Py_ssize_t length = 0;  // a NUL does not end it
  const char* const word = PyUnicode_Check(value.ptr()) ? PyUnicode_AsUTF8AndSize(value.ptr(), &length) : nullptr;
  if (word != nullptr) return {word, static_cast<std::size_t>(length)};
  PyErr_Clear();
  refuse(name, value, rule);
}

/// The value as an integer; floats and bools are refused.
template <typename T>
T to_integer(nb::handle value, const char* name, const char* rule) {
  T number = 0;
  if (PyBool_Check(value.ptr()) != 0 || PyIndex_Check(value.ptr()) == 0) refuse(name, value, rule);
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  if (!index.is_valid()) nb::raise_python_error();
  if (!nb::try_cast(index, number)) refuse(name, value, rule);
  return number;
}

}  // namespace

std::int64_t to_int64(nb::handle value, const char* name) {
  return to_integer<std::int64_t>(value, name, "a whole number of 64 bits");
}

std::uint64_t to_uint64(nb::handle value, const char* name) {
  return to_integer<std::uint64_t>(value, name, "a whole number from 0 to 2^64 - 1");
}

CallRules::CallRules(nb::handle scale, nb::handle corner, nb::handle left, nb::handle right, nb::handle cap,
                     nb::handle dropout_p, nb::handle same_bits, nb::handle layout, nb::handle backend_name,
                     nb::handle strictly) {
  if (!scale.is_none()) softmax_scale = to_float(scale, "softmax_scale");
  if (!corner.is_none()) {
    constexpr const char* kCorners = "'top_left', 'bottom_right' or None";
    const std::string word = to_word(corner, "causal", kCorners);
    if (word != "top_left" && word != "bottom_right") refuse("causal", corner, kCorners);
    causal = word == "top_left" ? Causal::kTopLeft : Causal::kBottomRight;
  }
  if (!left.is_none()) window_left = to_int64(left, "window_left");
  if (!right.is_none()) window_right = to_int64(right, "window_right");
  softcap = to_float(cap, "softcap");
  dropout.probability = to_float(dropout_p, "dropout_p");
  deterministic = to_bool(same_bits, "deterministic");
  constexpr const char* kLayouts = "'bshd' or 'bhsd'";
  const std::string order = to_word(layout, "layout", kLayouts);
  if (order != "bshd" && order != "bhsd") refuse("layout", layout, kLayouts);
  heads_first = order == "bhsd";
  if (!backend_name.is_none()) backend = to_word(backend_name, "backend", "a backend's name or None");
  strict = to_bool(strictly, "strict");
}

}  // namespace fovea::python
