#include "attention_call.h"

#include <fmt/format.h>
#include <fovea/attention.h>

#include <algorithm>
#include <cstring>
#include <sstream>

#include "files/safetensors.h"
#include "npy.h"
#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea::tools {
namespace {

bool is_gradient(const char* name) { return name[0] == 'd'; }

/// Takes a loaded tensor into the call under its name.
void keep(AttentionCall& call, Tensor Inputs::*member, files::OwnedTensor tensor) {
  call.inputs.*member = tensor.view();
  call.storage.push_back(std::move(tensor));
}

void load_file(AttentionCall& call, const CallSource& source) {
  const files::SafetensorsFile file = files::SafetensorsFile::open(source.file);
  call.metadata = file.metadata();
  std::vector<std::string> read;
  for (const auto& [name, member] : kInputNames) {
    if (!file.entries().contains(name) || (is_gradient(name) && !source.gradients)) continue;
    keep(call, member, file.load(name));
    read.emplace_back(name);
  }
  for (const auto& [name, entry] : file.entries()) {
    if (std::ranges::find(read, name) == read.end()) call.unused.push_back(name);
  }
}

void load_arrays(AttentionCall& call, const CallSource& source) {
  for (const auto& [name, member] : kInputNames) {
    const auto path = source.arrays.find(name);
    if (path == source.arrays.end()) continue;
    if (is_gradient(name) && !source.gradients) {
      call.unused.emplace_back(name);
    } else {
      keep(call, member, read_npy(path->second));
    }
  }
}

/// Lengths that --options name, as the tensor that a call takes.
void keep_lengths(AttentionCall& call, Tensor Inputs::*member, const char* token, const Lengths& lengths) {
  if (!lengths.present) return;
  if ((call.inputs.*member).defined())
    refuse(fmt::format("--options name {}, but there is a tensor of lengths already", token));
  if (lengths.values.empty()) refuse(fmt::format("--options name {}=random; give the lengths themselves", token));
  const std::int64_t count = std::ssize(lengths.values);
  files::OwnedTensor tensor(DType::kInt32, std::span(&count, 1));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t value = lengths.values[static_cast<std::size_t>(i)];
    const auto narrow = static_cast<std::int32_t>(value);
    if (narrow != value) refuse(fmt::format("--options name {} of {}, which int32 can't hold", token, value));
    static_cast<std::int32_t*>(tensor.view().data)[i] = narrow;
  }
  keep(call, member, std::move(tensor));
}

/// What --options say, in the terms of a call.  Sizes and tensors are not theirs to say.
AttentionOptions read_options(const std::string& text, AttentionCall& call) {
  Problem said;
  files::in_context("--options", [&] { parse_options(text, said); });
  keep_lengths(call, &Inputs::q_lengths, "qlen", said.q_lengths);
  keep_lengths(call, &Inputs::kv_lengths, "kvlen", said.kv_lengths);
  call.problem.layout = said.layout;
  AttentionOptions options;
  static_cast<Rules&>(options) = static_cast<const Rules&>(said);

  std::istringstream words(text);
  for (std::string word; words >> word;) {
    Problem rest;
    parse_options(word, rest);
    rest.q_lengths = rest.kv_lengths = {};
    rest.layout = Layout::kBshd;
    static_cast<Rules&>(rest) = {};
    if (rest == Problem{}) continue;
    refuse(fmt::format(
        "--options: token {} says what the tensors say, as packed, mask, bias, alibi and sink do; leave it out",
        files::in_quotes(word)));
  }
  if (said.layout == Layout::kQkvPacked) refuse("--options name layout=qkv_packed; give q, k and v as three tensors");
  return options;
}

AttentionOptions with_tensors(AttentionOptions options, const Inputs& in) {
  options.mask = in.mask;
  options.bias = in.bias;
  options.alibi_slopes = in.alibi_slopes;
  options.sink = in.sink;
  options.q_lengths = in.q_lengths;
  options.kv_lengths = in.kv_lengths;
  options.cu_seqlens_q = in.cu_seqlens_q;
  options.cu_seqlens_kv = in.cu_seqlens_kv;
  return options;
}

/// [batch, heads, seqlen, dim] seen as [batch, seqlen, heads, dim], and back.
Tensor exchange_heads(const Tensor& tensor) { return tensor.rank == 4 ? tensor.transposed(1, 2) : tensor; }

template <typename Set, std::size_t N>
NamedTensors as_files_hold(Layout layout, const Set& set, const Named<Set> (&names)[N]) {
  NamedTensors tensors;
  for (const auto& [name, member] : names) {
    const Tensor& tensor = set.*member;
    const std::string_view of = name;
    const bool of_scores = of == "mask" || of.ends_with("bias");
    if (tensor.defined())
      tensors.emplace_back(name, layout == Layout::kBhsd && !of_scores ? exchange_heads(tensor) : tensor);
  }
  return tensors;
}

void make_outputs(AttentionCall& call) {
  const Problem& p = call.problem;
  const Inputs& in = call.inputs;
  const bool heads_first = p.layout == Layout::kBhsd;
  const auto make = [&](Tensor Outputs::*member, DType dtype, const Tensor& shape, bool rows_of_heads) {
    const Tensor wanted = rows_of_heads && heads_first ? exchange_heads(shape) : shape;
    files::OwnedTensor tensor(dtype, std::span(wanted.shape).first(wanted.rank));
    call.outputs.*member = rows_of_heads && heads_first ? exchange_heads(tensor.view()) : tensor.view();
    call.storage.push_back(std::move(tensor));
  };
  Tensor out = in.q;
  out.shape[out.rank - 1] = p.head_dim_v;
  make(&Outputs::out, p.dtype, out, true);
  const Tensor lse = p.packed() ? Tensor::contiguous(nullptr, DType::kFloat32, {p.num_q_heads, p.total_q})
                                : Tensor::contiguous(nullptr, DType::kFloat32, {p.batch, p.num_q_heads, p.seqlen_q});
  make(&Outputs::lse, DType::kFloat32, lse, false);
  if (!p.backward()) return;
  make(&Outputs::dq, p.dtype, in.q, true);
  make(&Outputs::dk, p.dtype, in.k, true);
  make(&Outputs::dv, p.dtype, in.v, true);
  if (in.bias.defined()) make(&Outputs::dbias, in.bias.dtype, in.bias, false);
  if (in.alibi_slopes.defined()) make(&Outputs::dalibi_slopes, DType::kFloat32, in.alibi_slopes, false);
  if (in.sink.defined()) make(&Outputs::dsink, DType::kFloat32, in.sink, false);
  call.inputs.out = call.outputs.out;
  call.inputs.lse = call.outputs.lse;
}

AttentionCall from_tensors(const CallSource& source) {
  AttentionCall call;
  const std::string name = source.file.empty() ? "the arrays" : source.file;
  if (source.file.empty()) {
    load_arrays(call, source);
  } else {
    load_file(call, source);
  }
  const AttentionOptions options = read_options(source.options, call);
  files::in_context(name, [&] {
    Inputs& in = call.inputs;
    for (const Named<Inputs> needed : {kInputNames[0], kInputNames[1], kInputNames[2]}) {
      if (!(in.*needed.tensor).defined())
        refuse(fmt::format("there is no tensor '{}'; q, k and v are needed", needed.name));
    }
    if (source.gradients && !in.dout.defined()) refuse("there is no tensor 'dout', which --grad needs (shape of out)");
    const Layout layout = call.problem.layout;
    if (layout == Layout::kBhsd) {
      if (in.cu_seqlens_q.defined() || in.cu_seqlens_kv.defined())
        refuse("layout=bhsd belongs to padded tensors; packed ones are [total, heads, dim], so leave it out");
      for (Tensor* tensor : {&in.q, &in.k, &in.v, &in.dout}) *tensor = exchange_heads(*tensor);
    }
    call.problem = describe(source.gradients ? Direction::kForwardBackward : Direction::kForward, in.q, in.k, in.v,
                            with_tensors(options, in));
    call.problem.layout = layout;
    make_outputs(call);
    validate_forward(call.problem, {}, in, call.outputs);
    if (source.gradients) validate_backward(call.problem, {}, in, call.outputs);
  });
  return call;
}

AttentionCall from_problem(const CallSource& source) {
  AttentionCall call;
  Problem problem = parse_problem(source.problem);
  const bool gradients = source.gradients || problem.backward();
  problem.direction = gradients ? Direction::kForwardBackward : Direction::kForward;
  call.workload = std::make_unique<Workload>(problem, source.seed);
  call.problem = call.workload->problem();
  call.inputs = call.workload->inputs();
  call.outputs = call.workload->outputs();
  return call;
}

}  // namespace

AttentionCall AttentionCall::prepare(const CallSource& source) {
  return source.problem.empty() ? from_tensors(source) : from_problem(source);
}

NamedTensors AttentionCall::given() const { return as_files_hold(problem.layout, inputs, kInputNames); }
NamedTensors AttentionCall::results() const { return as_files_hold(problem.layout, outputs, kOutputNames); }

std::vector<Allocation> AttentionCall::allocations() const {
  std::vector<Allocation> all;
  if (workload != nullptr) all = workload->allocations();
  for (const files::OwnedTensor& tensor : storage) {
    const auto lies_here = [&](const Named<Outputs>& output) {
      return (outputs.*output.tensor).data == tensor.view().data;
    };
    all.push_back({tensor.bytes().data(), tensor.bytes().size(), std::ranges::any_of(kOutputNames, lies_here)});
  }
  return all;
}

}  // namespace fovea::tools
