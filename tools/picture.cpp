#include "picture.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string_view>

#include "cpu/elements.h"
#include "embedded.h"
#include "files/tensor_data.h"
#include "math/fn.h"
#include "problem/refuse.h"

namespace fovea::tools {
namespace {

using math::ceil_div;

constexpr std::int64_t kMaxSide = 512;        // cells of one map in one direction
constexpr std::int64_t kMaxCells = 1L << 22;  // of all maps together: 11 MB of base64
constexpr std::int64_t kNanCell = 65535;      // 0 is exactly 0, 1 to 65534 is the weight in steps of 1/65534

/// A view of `count` places of one dimension; a dimension of size 1 is broadcast and stays.
Tensor narrow(Tensor t, int dim, std::int64_t begin, std::int64_t count = 1) {
  if (!t.defined() || t.shape[dim] == 1) return t;
  if (t.data != nullptr) t.data = static_cast<std::byte*>(t.data) + begin * t.strides[dim] * size_bytes(t.dtype);
  t.shape[dim] = count;
  return t;
}

/// One sequence and one query head of a call, as a call of its own in fp32: what a picture draws.
struct SingleHead {
  Problem problem;
  Inputs inputs;
  std::vector<files::OwnedTensor> converted;

  SingleHead(const Problem& whole, const Inputs& of, std::int64_t sequence, std::int64_t head);

 private:
  Tensor as_fp32(const Tensor& t);
  void take_rows(const Problem& whole, const Inputs& of, std::int64_t sequence);
};

Tensor SingleHead::as_fp32(const Tensor& t) {
  if (!t.defined() || t.dtype == DType::kFloat32) return t;
  converted.emplace_back(DType::kFloat32, std::span(t.shape).first(t.rank));
  cpu::store_all(converted.back().view(), cpu::load_all(t));
  return converted.back().view();
}

/// Rows of q, k, mask and bias of one sequence: a batch element, or a stretch of the packed rows.
void SingleHead::take_rows(const Problem& whole, const Inputs& of, std::int64_t sequence) {
  inputs.q = of.q, inputs.k = of.k, inputs.mask = of.mask, inputs.bias = of.bias;
  if (whole.packed()) {
    const auto unpack = [&](Tensor packed, const Tensor& cu_seqlens, std::int64_t& seqlen) {
      const auto* starts = static_cast<const std::int32_t*>(cu_seqlens.data) + sequence;
      seqlen = starts[1] - starts[0];
      Tensor t = Tensor::contiguous(packed.data, packed.dtype, {1, packed.shape[0], packed.shape[1], packed.shape[2]});
      std::copy_n(packed.strides.begin(), 3, t.strides.begin() + 1);
      return narrow(t, 1, starts[0], seqlen);
    };
    inputs.q = unpack(of.q, of.cu_seqlens_q, problem.seqlen_q);
    inputs.k = unpack(of.k, of.cu_seqlens_kv, problem.seqlen_kv);
    for (Tensor* t : {&inputs.mask, &inputs.bias}) {
      *t = narrow(narrow(*t, 2, 0, problem.seqlen_q), 3, 0, problem.seqlen_kv);
    }
    problem.packed_q = problem.packed_kv = {};
    problem.total_q = problem.total_kv = 0;
  }
  for (Tensor* t : {&inputs.q, &inputs.k, &inputs.mask, &inputs.bias}) *t = narrow(*t, 0, sequence);
}

SingleHead::SingleHead(const Problem& whole, const Inputs& of, std::int64_t sequence, std::int64_t head)
    : problem(whole) {
  problem.direction = Direction::kForward;
  problem.dtype = problem.bias_dtype = DType::kFloat32;
  problem.batch = problem.num_q_heads = problem.num_kv_heads = 1;
  problem.dropout = {};
  problem.layout = Layout::kBshd;
  for (std::optional<Extent>* extent : {&problem.mask, &problem.bias}) {
    if (*extent) (*extent)->batch = (*extent)->heads = false;
  }
  for (Lengths* lengths : {&problem.q_lengths, &problem.kv_lengths}) {
    if (!lengths->values.empty()) lengths->values = {lengths->values[sequence]};
  }
  take_rows(whole, of, sequence);
  inputs.q = as_fp32(narrow(inputs.q, 2, head));
  inputs.k = as_fp32(narrow(inputs.k, 2, head / (whole.num_q_heads / whole.num_kv_heads)));
  inputs.mask = narrow(inputs.mask, 1, head);
  inputs.bias = as_fp32(narrow(inputs.bias, 1, head));
  inputs.sink = narrow(of.sink, 0, head);
  inputs.alibi_slopes = narrow(of.alibi_slopes, of.alibi_slopes.rank - 1, head);
  if (of.alibi_slopes.rank == 2) inputs.alibi_slopes = narrow(inputs.alibi_slopes, 0, sequence);
  inputs.q_lengths = narrow(of.q_lengths, 0, sequence);
  inputs.kv_lengths = narrow(of.kv_lengths, 0, sequence);
}

/// The weights of one head, rows and keys averaged in blocks: `out` of a call whose v says which block a key is in.
void append_weights(const SingleHead& head, const AttentionPicture& picture, std::vector<float>& weights) {
  const std::int64_t columns = ceil_div(picture.seqlen_kv, picture.block_kv);
  Problem problem = head.problem;
  problem.head_dim_v = columns;
  const files::OwnedTensor v(DType::kFloat32, std::array{std::int64_t{1}, picture.seqlen_kv, std::int64_t{1}, columns});
  const files::OwnedTensor out(DType::kFloat32,
                               std::array{std::int64_t{1}, picture.seqlen_q, std::int64_t{1}, columns});
  for (std::int64_t j = 0; j < picture.seqlen_kv; ++j) {
    static_cast<float*>(v.view().data)[j * columns + j / picture.block_kv] = 1.0F;
  }
  Inputs inputs = head.inputs;
  inputs.v = v.view();
  plan_forward(problem).execute(inputs, {.out = out.view()});

  const auto* p = static_cast<const float*>(out.view().data);
  for (std::int64_t begin = 0; begin < picture.seqlen_q; begin += picture.block_q) {
    const std::int64_t end = std::min(begin + picture.block_q, picture.seqlen_q);
    for (std::int64_t c = 0; c < columns; ++c) {
      double sum = 0.0;
      for (std::int64_t i = begin; i < end; ++i) sum += p[i * columns + c];
      weights.push_back(static_cast<float>(sum / static_cast<double>(end - begin)));
    }
  }
}

/// Two bytes a weight, low byte first, as base64.
std::string pack(const std::vector<float>& weights) {
  std::vector<std::uint8_t> bytes;
  bytes.reserve(2 * weights.size() + 2);
  for (const float weight : weights) {
    std::int64_t cell = kNanCell;
    if (!std::isnan(weight)) cell = std::lround(std::clamp(weight, 0.0F, 1.0F) * (kNanCell - 1));
    if (weight > 0.0F) cell = std::max(cell, std::int64_t{1});  // 0 is kept for what the mask hides
    bytes.push_back(static_cast<std::uint8_t>(cell));
    bytes.push_back(static_cast<std::uint8_t>(cell >> 8));
  }
  static constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve(ceil_div(static_cast<std::int64_t>(bytes.size()), 3) * 4);
  const std::size_t size = bytes.size();
  bytes.resize(size + (3 - size % 3) % 3);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const unsigned group = bytes[i] << 16 | bytes[i + 1] << 8 | bytes[i + 2];
    for (const int shift : {18, 12, 6, 0}) text.push_back(kDigits[group >> shift & 63]);
  }
  for (std::size_t i = size; i < bytes.size(); ++i) text[text.size() - (bytes.size() - i)] = '=';
  return text;
}

/// Fills the template; what came from outside can't end the script element that holds it.
void write_page(const std::string& path, std::string_view page, const nlohmann::ordered_json& data) {
  std::string text = data.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  for (std::size_t at = text.find('<'); at != std::string::npos; at = text.find('<', at))
    text.replace(at, 1, "\\u003c");
  files::write_atomically(path, [&](std::ostream& stream) {
    for (std::size_t mark = page.find('@'); mark != std::string_view::npos; mark = page.find('@')) {
      stream << page.substr(0, mark);
      page.remove_prefix(mark);
      const auto fill = [&](std::string_view name, std::string_view content) {
        if (!page.starts_with(name)) return false;
        stream << content;
        page.remove_prefix(name.size());
        return true;
      };
      if (fill("@STYLE@", pages::page_css) || fill("@SCRIPT@", pages::page_js) || fill("@DATA@", text)) continue;
      stream << page.front();
      page.remove_prefix(1);
    }
    stream << page;
  });
}

}  // namespace

void require_drawable(const Problem& problem, std::int64_t batch_index, const std::vector<std::int64_t>& heads) {
  if (batch_index < 0 || batch_index >= problem.batch) {
    refuse("the picture's sequence (", batch_index, ") must be one of the batch: 0 to ", problem.batch - 1);
  }
  for (const std::int64_t head : heads) {
    if (head >= 0 && head < problem.num_q_heads) continue;
    refuse("the picture's head (", head, ") must be a query head: 0 to ", problem.num_q_heads - 1);
  }
}

AttentionPicture make_attention_picture(const Problem& problem, const Inputs& inputs, std::int64_t batch_index,
                                        std::vector<std::int64_t> heads) {
  require_drawable(problem, batch_index, heads);
  if (heads.empty()) {
    for (std::int64_t h = 0; h < problem.num_q_heads; ++h) heads.push_back(h);
  }
  AttentionPicture picture;
  for (const std::int64_t head : heads) {
    const SingleHead single(problem, inputs, batch_index, head);
    if (picture.weights.empty()) {
      picture.seqlen_q = single.problem.seqlen_q;
      picture.seqlen_kv = single.problem.seqlen_kv;
      std::int64_t side = kMaxSide;
      const auto cells = [&](std::int64_t seqlen) { return std::min(seqlen, side); };
      const auto count = static_cast<std::int64_t>(heads.size());
      while (side > 1 && count * cells(picture.seqlen_q) * cells(picture.seqlen_kv) > kMaxCells) side /= 2;
      picture.block_q = std::max(std::int64_t{1}, ceil_div(picture.seqlen_q, side));
      picture.block_kv = std::max(std::int64_t{1}, ceil_div(picture.seqlen_kv, side));
    }
    if (picture.seqlen_q > 0 && picture.seqlen_kv > 0) append_weights(single, picture, picture.weights);
  }
  picture.title = "Attention weights";
  picture.facts.emplace_back("problem", to_string(problem));
  if (problem.batch > 1) {
    picture.facts.emplace_back("sequence", std::to_string(batch_index) + " of " + std::to_string(problem.batch));
  }
  if (problem.dropout.probability > 0.0F) picture.facts.emplace_back("dropout", "left out of the picture");
  picture.heads = std::move(heads);
  return picture;
}

void write_attention_picture(const std::string& path, const AttentionPicture& picture) {
  const auto check = [](const char* name, std::size_t found, std::int64_t wanted) {
    if (found != 0 && static_cast<std::int64_t>(found) != wanted) {
      refuse(name, " holds ", found, " entries, but the picture needs ", wanted);
    }
  };
  check("tokens_q", picture.tokens_q.size(), picture.seqlen_q);
  check("tokens_kv", picture.tokens_kv.size(), picture.seqlen_kv);
  const std::int64_t rows = ceil_div(picture.seqlen_q, picture.block_q);
  const std::int64_t columns = ceil_div(picture.seqlen_kv, picture.block_kv);
  check("weights", picture.weights.size(), static_cast<std::int64_t>(picture.heads.size()) * rows * columns);

  nlohmann::ordered_json data;
  data["title"] = picture.title;
  data["facts"] = picture.facts;
  data["heads"] = picture.heads;
  data["seqlen_q"] = picture.seqlen_q;
  data["seqlen_kv"] = picture.seqlen_kv;
  data["block_q"] = picture.block_q;
  data["block_kv"] = picture.block_kv;
  data["tokens_q"] = picture.tokens_q;
  data["tokens_kv"] = picture.tokens_kv;
  data["weights"] = pack(picture.weights);
  write_page(path, pages::attention_html, data);
}

void write_bench_page(const std::string& path, const std::vector<BenchRow>& rows, const Facts& machine) {
  nlohmann::ordered_json data;
  data["machine"] = machine;
  data["rows"] = nlohmann::ordered_json::array();
  for (const BenchRow& row : rows) {
    data["rows"].push_back({{"problem", row.problem},
                            {"pass", row.pass},
                            {"backend", row.backend},
                            {"seconds", row.seconds},
                            {"seconds_low", row.seconds_low},
                            {"seconds_high", row.seconds_high},
                            {"repeats", row.repeats},
                            {"gflops", row.gflops},
                            {"gbytes", row.gbytes},
                            {"ceiling_gflops", row.ceiling_gflops},
                            {"workspace_bytes", row.workspace_bytes}});
  }
  write_page(path, pages::bench_html, data);
}

void write_ladder_page(const std::string& path, const nlohmann::ordered_json& run, const Facts& machine) {
  nlohmann::ordered_json data = run;
  data["machine"] = machine;
  write_page(path, pages::ladder_html, data);
}

}  // namespace fovea::tools
