#pragma once

#include <fovea/plan.h>

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

namespace fovea::tools {

/// Lines of "name: value" that a page shows under its title, in this order.
using Facts = std::vector<std::pair<std::string, std::string>>;

/// The attention weights of one sequence, ready to be drawn.
struct AttentionPicture {
  std::string title;
  Facts facts;                         ///< who ran it, options, sizes; free text
  std::vector<std::string> tokens_q;   ///< one a row; empty: positions are shown
  std::vector<std::string> tokens_kv;  ///< one a column; empty: positions are shown
  std::vector<std::int64_t> heads;     ///< the query head that each map belongs to
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_kv = 0;
  std::int64_t block_q = 1;    ///< consecutive rows that one row of `weights` is the mean of
  std::int64_t block_kv = 1;   ///< consecutive keys that one column of `weights` is the sum of
  std::vector<float> weights;  ///< [heads, ceil(seqlen_q / block_q), ceil(seqlen_kv / block_kv)], each row sums to 1,
                               ///< less what a sink took
};

/// Throws Error(kInvalidArgument) where the call has no such sequence, or a head is none of its query heads.
void require_drawable(const Problem& problem, std::int64_t batch_index, const std::vector<std::int64_t>& heads);

/// Computes the weights of one sequence of the batch through the library itself, so every mask, bias and length means
/// what it means in the call (dropout is left out): v is replaced by indicator columns, one for each block of keys, so
/// that out is the weights.  `heads` empty: all.  Long sequences are averaged in blocks until the page stays below
/// about 12 MB.
[[nodiscard]] AttentionPicture make_attention_picture(const Problem& problem, const Inputs& inputs,
                                                      std::int64_t batch_index = 0,
                                                      std::vector<std::int64_t> heads = {});

/// One self-contained HTML page, no network: the map of one head large, all heads small to pick from, the text coloured
/// by what the token under the pointer attends to.  Throws Error(kDevice) where the file can't be written.
void write_attention_picture(const std::string& path, const AttentionPicture& picture);

/// One measured line of a benchmark.  Rows of the same problem and pass by different backends are drawn side by side.
struct BenchRow {
  std::string problem;        ///< the line, as `fovea bench` takes it
  std::string pass;           ///< "forward" or "backward"
  std::string backend;        ///< who ran it
  double seconds = 0.0;       ///< median of one execution
  double seconds_low = 0.0;   ///< first quartile
  double seconds_high = 0.0;  ///< third quartile
  int repeats = 0;
  double gflops = 0.0;          ///< 10⁹ floating-point operations a second, at the median
  double gbytes = 0.0;          ///< 10⁹ bytes a second of tensors read and written, at the median
  double ceiling_gflops = 0.0;  ///< multiply-add rate measured in the same run; 0: not measured
  std::size_t workspace_bytes = 0;
};

/// One self-contained HTML page: bars per problem, a sortable table, every line ready to be copied into `fovea bench`.
/// `machine`: processor, threads, instruction set, version, date.  Throws Error(kDevice) where the file can't be
/// written.
void write_bench_page(const std::string& path, const std::vector<BenchRow>& rows, const Facts& machine);

/// One self-contained HTML page of `fovea ladder`: time and memory over sequence length, a line a rung, and a table.
/// `run`: what --json writes.
void write_ladder_page(const std::string& path, const nlohmann::ordered_json& run, const Facts& machine);

}  // namespace fovea::tools
