#pragma once

#include <fovea/options.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fovea {

enum class Direction : std::uint8_t { kForward, kBackward, kForwardBackward };
enum class Layout : std::uint8_t { kBshd, kBhsd, kQkvPacked };
enum class Alibi : std::uint8_t { kNone, kPerHead, kPerBatchAndHead };

/// Which of [batch, num_q_heads, seqlen_q, seqlen_kv] a mask or bias has; the others are broadcast, of size 1.
struct Extent {
  bool batch = false;
  bool heads = false;
  bool queries = false;
  bool keys = false;
  friend bool operator==(const Extent&, const Extent&) = default;
};

/// Sequence lengths: absent, known now (`values`, one a sequence), or known only when the plan runs (`values` empty).
struct Lengths {
  bool present = false;
  std::vector<std::int64_t> values;
  friend bool operator==(const Lengths&, const Lengths&) = default;
};

/// What a call asks for, as one value that is validated, hashed, printed and parsed: sizes and rules, but no pointers
/// and no strides.  As text it is one line (docs/contract.md, "A problem is one line"):
///
///     fwd bf16 b2 hq16 hkv4 sq4096 skv4096 d128 causal=bottom_right
struct Problem : Rules {
  Direction direction = Direction::kForward;
  DType dtype = DType::kFloat32;
  std::int64_t batch = 1;        ///< packed: the number of sequences
  std::int64_t num_q_heads = 1;  ///< a multiple of num_kv_heads
  std::int64_t num_kv_heads = 1;
  std::int64_t seqlen_q = 0;  ///< packed: the longest sequence
  std::int64_t seqlen_kv = 0;
  std::int64_t head_dim = 0;    ///< of q and k, 1 to 512
  std::int64_t head_dim_v = 0;  ///< of v and out, 1 to 512

  std::optional<Extent> mask;
  std::optional<Extent> bias;
  DType bias_dtype = DType::kFloat32;  ///< meaningful where there is a bias
  Alibi alibi = Alibi::kNone;
  bool sink = false;
  Lengths q_lengths;
  Lengths kv_lengths;
  Lengths packed_q;               ///< present: THD, q is [total_q, num_q_heads, head_dim]
  Lengths packed_kv;              ///< present exactly where packed_q is
  std::int64_t total_q = 0;       ///< packed: rows of q; otherwise 0
  std::int64_t total_kv = 0;      ///< packed: rows of k and v; otherwise 0
  Layout layout = Layout::kBshd;  ///< how test and benchmark data lie in memory; a plan takes any strides

  friend bool operator==(const Problem&, const Problem&) = default;

  [[nodiscard]] bool packed() const noexcept { return packed_q.present; }
  [[nodiscard]] bool forward() const noexcept { return direction != Direction::kBackward; }
  [[nodiscard]] bool backward() const noexcept { return direction != Direction::kForward; }
  [[nodiscard]] FOVEA_API float scale() const noexcept;  ///< softmax_scale, or 1 / sqrt(head_dim)
};

/// Reads a problem line.  Throws Error(kInvalidArgument) with one sentence that names the token.  The result is
/// validated.
[[nodiscard]] FOVEA_API Problem parse_problem(std::string_view line);

/// Reads option tokens (`causal=top_left dropout=0.1`) on top of a problem, without validating the result.  Throws
/// Error(kInvalidArgument) that names the token; the problem stays as it was then.
FOVEA_API void parse_options(std::string_view options, Problem& problem);

/// The canonical line; `parse_problem(to_string(p)) == p` for every valid p.
[[nodiscard]] FOVEA_API std::string to_string(const Problem& problem);

/// Throws Error(kInvalidArgument) for the first rule of the contract that the problem breaks.
FOVEA_API void validate(const Problem& problem);

/// Equal problems have equal hashes; stable within one version of the library.
[[nodiscard]] FOVEA_API std::uint64_t hash(const Problem& problem);

/// The problem that these tensors and options pose; validated, and Error(kInvalidArgument) as above.  q is [batch,
/// seqlen_q, num_q_heads, head_dim], or [total_q, num_q_heads, head_dim] where options.cu_seqlens_q is given; k and v
/// likewise.  Only shapes and dtypes are read, and on the CPU the values of lengths, which become part of the problem.
[[nodiscard]] FOVEA_API Problem describe(Direction direction, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const AttentionOptions& options);

/// Floating-point operations as the papers count them: 2·(d + dv) for each query–key pair forward, 2.5 times that
/// backward.  Pairs are all, half of them where causal, exactly those inside a window.
[[nodiscard]] FOVEA_API double flops(const Problem& problem) noexcept;

}  // namespace fovea
