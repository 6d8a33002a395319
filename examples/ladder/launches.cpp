#include "launches.h"

#include <type_traits>

#include "dispatch/views.h"

namespace fovea::ladder {
namespace {

std::int64_t blocks_of(std::int64_t size, std::int64_t block) { return (size + block - 1) / block; }

std::int64_t heads_of(const Problem& problem) { return problem.batch * problem.num_q_heads; }

std::vector<Launch> formula(const Problem& problem, Direction pass) {
  const std::int64_t queries = blocks_of(problem.seqlen_q, kProductTile),
                     dims = blocks_of(problem.head_dim, kProductTile);
  const std::int64_t keys = blocks_of(problem.seqlen_kv, kProductTile), heads = heads_of(problem);
  const auto product = [&](const char* function, std::int64_t tiles) {
    return Launch{function, heads * tiles, kFormulaThreads, kFormulaShared};
  };
  const auto by_row = [&](const char* function) {
    return Launch{function, heads * problem.seqlen_q, kFormulaThreads, kFormulaRowShared};
  };
  const Launch scores = product("product<kSpec, Product::kScores>", queries * keys);
  if (pass == Direction::kForward)
    return {scores, by_row("softmax<kSpec>"), product("product<kSpec, Product::kOut>", queries * dims)};
  return {scores,
          by_row("weights_again<kSpec>"),
          product("product<kSpec, Product::kDv>", keys * dims),
          product("product<kSpec, Product::kWeightGradients>", queries * keys),
          by_row("softmax_gradient<kSpec>"),
          product("product<kSpec, Product::kDq>", queries * dims),
          product("product<kSpec, Product::kDk>", keys * dims)};
}

Launch forward(int rung, const Problem& problem) {
  const int dim = static_cast<int>(problem.head_dim);
  const std::int64_t heads = heads_of(problem), queries = problem.seqlen_q;
  if (rung == 1) return {"sliced_forward<kSpec>", queries == 0 ? 0 : heads, kSlicedThreads, sliced_shared(dim)};
  if (rung == 2)
    return {"sequence_forward<kSpec>", heads * blocks_of(queries, kSequenceRows), kSlicedThreads, sliced_shared(dim)};
  return {"split_forward<kSpec>", heads * blocks_of(queries, kSplitRows), kSplitThreads, split_shared(dim)};
}

Launch backward(int rung, const Problem& problem) {
  const int dim = static_cast<int>(problem.head_dim);
  const std::int64_t heads = heads_of(problem), keys = problem.seqlen_kv;
  if (rung == 1) return {"sliced_backward<kSpec>", keys == 0 ? 0 : heads, kSlicedThreads, sliced_shared_backward(dim)};
  if (rung == 2) {
    return {"sequence_backward<kSpec>", heads * blocks_of(keys, sliced_keys_backward(dim)), kSlicedThreads,
            sliced_shared_backward(dim)};
  }
  return {"split_backward<kSpec>", heads * blocks_of(keys, kSplitKeysBackward), kSplitThreadsBackward,
          split_shared_backward(dim)};
}

}  // namespace

std::vector<Launch> launches(int rung, const Problem& problem, Direction pass) {
  if (rung == 0) return formula(problem, pass);
  if (pass == Direction::kForward) return {forward(rung, problem)};
  const std::int64_t around =
      heads_of(problem) * blocks_of(problem.seqlen_q, around_rows(static_cast<int>(problem.head_dim)));
  return {{"prepare_backward<kSpec>", around, kAroundThreads, 0},
          backward(rung, problem),
          {"finish_dq<kSpec>", around, kAroundThreads, 0}};
}

Params describe_params(const Problem& problem) {
  Params p{};
  p.heads = static_cast<int>(problem.num_q_heads);
  p.seqlen_q = static_cast<int>(problem.seqlen_q);
  p.seqlen_kv = static_cast<int>(problem.seqlen_kv);
  const int corners[] = {p.seqlen_kv, 0, p.seqlen_kv - p.seqlen_q};
  p.diagonal = corners[static_cast<int>(problem.causal)];
  p.scale = problem.scale();
  p.pitch = blocks_of(problem.seqlen_kv, kProductTile) * kProductTile;
  return p;
}

std::size_t lay_out(Params& p, int rung, const Problem& problem, Direction pass, std::byte* base) {
  std::size_t used = 0;
  const auto place = [&](auto*& pointer, std::int64_t bytes) {
    if (base != nullptr) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += static_cast<std::size_t>(blocks_of(bytes, 128) * 128);
  };
  const std::int64_t rows = heads_of(problem) * problem.seqlen_q, row_bytes = problem.head_dim * 4;
  if (rung == 0) {
    place(p.scores, rows * p.pitch * 4);
    place(p.weights, rows * p.pitch * size_bytes(problem.dtype));
  } else if (pass == Direction::kBackward) {
    place(p.dq_sum, rows * row_bytes);
    place(p.delta, rows * 4);
  } else if (rung < 3) {
    place(p.o, rows * row_bytes);
    place(p.maxima, rows * 4);
    place(p.sums, rows * 4);
  }
  return used;
}

void attach(Params& p, Direction pass, const Inputs& inputs, const Outputs& outputs) {
  using dispatch::row_view, dispatch::stat_view;
  const bool backward = pass == Direction::kBackward;
  p.q = row_view(inputs.q);
  p.k = row_view(inputs.k);
  p.v = row_view(inputs.v);
  p.out = row_view(backward ? inputs.out : outputs.out);
  p.lse = stat_view(backward ? inputs.lse : outputs.lse);
  p.dlse = stat_view(inputs.dlse);
  p.dout = row_view(inputs.dout);
  p.dq = row_view(outputs.dq);
  p.dk = row_view(outputs.dk);
  p.dv = row_view(outputs.dv);
}

}  // namespace fovea::ladder
