#include <fovea/c.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "attention_call.h"
#include "error_rule.h"
#include "random_problem.h"
#include "workload.h"

// What `fovea check` holds backends against, for results that come from elsewhere: the hostile tensors of a problem,
// and the error rule; backward passes are of their own forward's out.  A C interface, for tests that speak through
// ctypes (tests/python/judge.py).

using namespace fovea;
using namespace fovea::tools;

namespace {

struct Judge {
  Judge(const Problem& problem, std::uint64_t seed)
      : work(problem, seed, Data::kHostile),
        peers(work.operands(), work.exact(), true),
        line(to_string(work.problem())) {}
  Workload work;
  Peers peers;
  std::string line;
};

template <typename Set, std::size_t N>
const Tensor* find(const Named<Set> (&names)[N], const Set& set, const char* name) {
  for (const auto& each : names) {
    if (std::strcmp(each.name, name) == 0) return &(set.*each.tensor);
  }
  return nullptr;
}

std::string last_error;

}  // namespace

extern "C" {

/// The problem of a line, or a random one where the line is empty.  Null: judge_error() says why.
FOVEA_API void* judge_open(const char* line, std::uint64_t seed) {
  try {
    return std::make_unique<Judge>(*line == '\0' ? random_problem(seed) : parse_problem(line), seed).release();
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

FOVEA_API void judge_close(void* handle) { const std::unique_ptr<Judge> owned(static_cast<Judge*>(handle)); }

FOVEA_API const char* judge_error() { return last_error.c_str(); }

FOVEA_API const char* judge_line(const void* handle) { return static_cast<const Judge*>(handle)->line.c_str(); }

/// The view of an input, or of an output in which the problem wants a result; false where there is none.
FOVEA_API bool judge_tensor(const void* handle, const char* name, fovea_tensor* view) {
  const Workload& work = static_cast<const Judge*>(handle)->work;
  const Tensor* t = find(kInputNames, work.inputs(), name);
  if (t == nullptr) t = find(kOutputNames, work.outputs(), name);
  if (t == nullptr || !t->defined()) return false;
  *view = {.data = t->data,
           .dtype = static_cast<std::int32_t>(t->dtype),
           .rank = t->rank,
           .device = {},
           .shape = {},
           .strides = {}};
  std::copy_n(t->shape.begin(), t->rank, view->shape);
  std::copy_n(t->strides.begin(), t->rank, view->strides);
  return true;
}

/// How many times the error of its peers a result has; above 2, judge_error() tells where.
FOVEA_API double judge_result(const void* handle, const char* name, const fovea_tensor* result) {
  const auto& [work, peers, line] = *static_cast<const Judge*>(handle);
  for (const ResultKind& kind : result_kinds()) {
    if (std::strcmp(kind.name, name) != 0) continue;
    Tensor t = work.outputs().*kind.tensor;
    t.data = result->data;
    t.dtype = static_cast<DType>(result->dtype);
    std::copy_n(result->strides, t.rank, t.strides.begin());
    const Figure figure = judge(kind, peers, t);
    last_error = figure.failure;
    return figure.ratio;
  }
  last_error = std::string("there is no result '") + name + "'";
  return HUGE_VAL;
}

}  // extern "C"
