#include <fovea/problem.h>

#include "problem/refuse.h"

#include <concepts>
#include <utility>

namespace fovea {
namespace {

struct Row;
using Value = std::optional<std::string>;  // the value that is printed; none: the token is left out

/// One word of the line: `name`, `name=value`, or a size such as `d128`.
struct Token {
  std::string_view text;
  std::string_view value;
  const Row* row = nullptr;
};

/// One row per token: how it is read, and how it is printed.  A new token is a new row.
struct Row {
  std::string_view name;
  std::string_view field;    // what validate's sentences call it
  std::string_view example;  // how it is written
  void (*read)(Problem& problem, const Token& token);
  Value (*print)(const Problem& problem);

  [[nodiscard]] bool is_size() const { return example.size() > name.size() && example[name.size()] != '='; }
};

template <typename T>
struct Word {
  T value;
  std::string_view name;
};
constexpr Word<Direction> kDirections[] = {
    {Direction::kForward, "fwd"}, {Direction::kBackward, "bwd"}, {Direction::kForwardBackward, "fwd+bwd"}};
constexpr Word<DType> kDTypes[] = {{DType::kFloat32, "fp32"}, {DType::kFloat16, "fp16"}, {DType::kBFloat16, "bf16"}};
constexpr Word<Causal> kCorners[] = {{Causal::kTopLeft, "top_left"}, {Causal::kBottomRight, "bottom_right"}};
constexpr Word<Layout> kLayouts[] = {
    {Layout::kBshd, "bshd"}, {Layout::kBhsd, "bhsd"}, {Layout::kQkvPacked, "qkv_packed"}};

template <typename T, std::size_t N>
const Word<T>* find(const Word<T> (&words)[N], std::string_view name) {
  const auto found = std::find_if(words, words + N, [&](const Word<T>& word) { return word.name == name; });
  return found == words + N ? nullptr : found;
}

template <typename T, std::size_t N>
std::string word_of(const Word<T> (&words)[N], T value) {
  const auto found = std::find_if(words, words + N, [&](const Word<T>& word) { return word.value == value; });
  return found == words + N ? "?" : std::string(found->name);
}

template <typename T, std::size_t N>
std::string list(const Word<T> (&words)[N]) {
  std::string text;
  for (std::size_t i = 0; i < N; ++i) text.append(i == 0 ? "" : i + 1 == N ? " or " : ", ").append(words[i].name);
  return text;
}

/// The Levenshtein distance.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = std::exchange(row[j], std::min({changed, row[j] + 1, row[j - 1] + 1}));
    }
  }
  return row[b.size()];
}

/// "; did you mean 'causal'?" where a known word is near.
template <typename Words>
std::string suggestion(const Words& words, std::string_view name) {
  constexpr std::size_t kNear = 2;
  std::string_view best;
  std::size_t least = std::min(kNear + 1, name.size());
  if (name.size() > 32) return {};
  for (const auto& word : words) {
    if (const std::size_t d = distance(name, word.name); d < least) {
      least = d;
      best = word.name;
    }
  }
  return best.empty() ? "" : "; did you mean " + quote(best) + "?";
}

[[noreturn]] void refuse_form(const Token& token) {
  refuse("token ", quote(token.text), " is not understood; it is written like ", quote(token.row->example));
}

template <typename T>
T number(const Token& token, std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range)
    refuse("token ", quote(token.text), ": ", quote(text), " is out of range; give ",
           std::is_floating_point_v<T> ? "0, or 1e-45 to 3.4e38 in size" : "a whole number of 64 bits");
  if (error != std::errc{} || end != text.data() + text.size()) refuse_form(token);
  return value;
}

template <typename T, std::size_t N>
T word(const Token& token, const Word<T> (&words)[N], std::string_view text) {
  if (const Word<T>* found = find(words, text)) return found->value;
  refuse("token ", quote(token.text), " must name one of ", list(words), suggestion(words, text));
}

/// Removes the text up to the separator, and the separator, and returns the text.
std::string_view next(std::string_view& text, char separator) {
  const std::size_t end = std::min(text.find(separator), text.size());
  const std::string_view head = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return head;
}

std::vector<std::int64_t> numbers(const Token& token, std::string_view text, char separator) {
  if (text.empty() || text.back() == separator) refuse_form(token);
  std::vector<std::int64_t> values;
  while (!text.empty()) values.push_back(number<std::int64_t>(token, next(text, separator)));
  return values;
}

template <typename T>
void read(T& target, const Token& token) {
  target = number<T>(token, token.value);
}
template <typename T, std::size_t N>
void read(T& target, const Token& token, const Word<T> (&words)[N]) {
  target = word(token, words, token.value);
}
void read(bool& target, const Token& token) {  // a flag; `=` and nothing after it has been refused
  if (!token.value.empty()) refuse_form(token);
  target = true;
}

/// The value if the token is to be printed.
Value when(bool said, std::string value) { return said ? Value(std::move(value)) : Value(); }
Value when(bool said, float value) { return when(said, shortest(value)); }
Value when(bool said, std::integral auto value) { return when(said, std::to_string(value)); }
Value when(bool said) { return when(said, std::string()); }

Extent read_extent(const Token& token, std::string_view text) {
  if (text.size() != 4) refuse_form(token);
  const auto own = [&](std::size_t i, char letter) {
    if (text[i] != letter && text[i] != '1') refuse_form(token);
    return text[i] == letter;
  };
  return {own(0, 'b'), own(1, 'h'), own(2, 'q'), own(3, 'k')};
}
std::string print_extent(const Extent& e) {
  return {e.batch ? 'b' : '1', e.heads ? 'h' : '1', e.queries ? 'q' : '1', e.keys ? 'k' : '1'};
}

void read_window(Problem& p, const Token& t) {
  std::string_view text = t.value;
  const auto side = [&](std::string_view s) {
    return s == "-" ? std::nullopt : std::optional(number<std::int64_t>(t, s));
  };
  if (std::count(text.begin(), text.end(), ',') != 1) refuse_form(t);
  p.window_left = side(next(text, ','));
  p.window_right = side(text);
}
Value print_window(const Problem& p) {
  const auto side = [](const std::optional<std::int64_t>& s) { return s ? std::to_string(*s) : "-"; };
  return when(p.window_left || p.window_right, side(p.window_left) + "," + side(p.window_right));
}

void read_bias(Problem& p, const Token& t) {
  std::string_view text = t.value;
  const bool named = text.find(':') != std::string_view::npos;
  p.bias = read_extent(t, next(text, ':'));
  p.bias_dtype = named ? word(t, kDTypes, text) : p.dtype;
}
Value print_bias(const Problem& p) {
  const std::string dtype = p.bias_dtype == p.dtype ? "" : std::string(":") + name(p.bias_dtype);
  return when(p.bias.has_value(), print_extent(p.bias.value_or(Extent{})) + dtype);
}

void read_alibi(Problem& p, const Token& t) {
  if (!t.value.empty() && t.value != "b") refuse_form(t);
  p.alibi = t.value.empty() ? Alibi::kPerHead : Alibi::kPerBatchAndHead;
}

constexpr std::string_view kRandom = "random";  // lengths that are known only when the plan runs

void read(Lengths& lengths, const Token& t) {
  lengths = {true, t.value == kRandom ? std::vector<std::int64_t>{} : numbers(t, t.value, ',')};
}
Value when(const Lengths& lengths) {
  return when(lengths.present, lengths.values.empty() ? std::string(kRandom) : join(lengths.values, ","));
}

/// Packed sequences: their lengths `700+1300`, or `random:2000` where only the total is known now.
void read_packed(Problem& p, Lengths& packed, std::int64_t& seqlen, std::int64_t& total, const Token& t) {
  std::string_view text = t.value;
  packed.present = true;
  if (text == kRandom)
    refuse("token ", quote(t.text), " lacks the total; it is written like ",
           quote(std::string(t.row->name) + "=random:2096"));
  if (text.starts_with("random:")) {
    text.remove_prefix(kRandom.size() + 1);
    total = number<std::int64_t>(t, text);
    return;
  }
  packed.values = numbers(t, text, '+');
  p.batch = std::ssize(packed.values);
  seqlen = longest(packed.values);
  total = saturating_sum(packed.values);
}
void read_packed_q(Problem& p, const Token& t) { read_packed(p, p.packed_q, p.seqlen_q, p.total_q, t); }
void read_packed_kv(Problem& p, const Token& t) { read_packed(p, p.packed_kv, p.seqlen_kv, p.total_kv, t); }

Value when(bool said, const Lengths& packed, std::int64_t total) {
  return when(said, packed.values.empty() ? "random:" + std::to_string(total) : join(packed.values, "+"));
}
bool alike(const Problem& p) { return p.packed_q == p.packed_kv && p.total_q == p.total_kv; }
bool known(const Lengths& packed) { return !packed.values.empty(); }

using P = Problem;
using T = Token;

/// Every token but the first two, in canonical order.
constexpr Row kRows[] = {
    {"b", "batch", "b2", [](P& p, const T& t) { read(p.batch, t); },
     [](const P& p) { return when(!known(p.packed_q) && !known(p.packed_kv), p.batch); }},
    {"hq", "num_q_heads", "hq16", [](P& p, const T& t) { read(p.num_q_heads, t); },
     [](const P& p) { return when(true, p.num_q_heads); }},
    {"hkv", "num_kv_heads", "hkv4", [](P& p, const T& t) { read(p.num_kv_heads, t); },
     [](const P& p) { return when(true, p.num_kv_heads); }},
    {"sq", "seqlen_q", "sq1024", [](P& p, const T& t) { read(p.seqlen_q, t); },
     [](const P& p) { return when(!known(p.packed_q), p.seqlen_q); }},
    {"skv", "seqlen_kv", "skv1024", [](P& p, const T& t) { read(p.seqlen_kv, t); },
     [](const P& p) { return when(!known(p.packed_kv), p.seqlen_kv); }},
    {"d", "head_dim", "d128", [](P& p, const T& t) { read(p.head_dim, t); },
     [](const P& p) { return when(true, p.head_dim); }},
    {"dv", "head_dim_v", "dv64", [](P& p, const T& t) { read(p.head_dim_v, t); },
     [](const P& p) { return when(p.head_dim_v != p.head_dim, p.head_dim_v); }},
    {"packed", "packed", "packed=700+1300+96", [](P& p, const T& t) { read_packed_q(p, t), read_packed_kv(p, t); },
     [](const P& p) { return when(p.packed() && alike(p), p.packed_q, p.total_q); }},
    {"packed_q", "packed_q", "packed_q=700+1300+96", read_packed_q,
     [](const P& p) { return when(p.packed() && !alike(p), p.packed_q, p.total_q); }},
    {"packed_kv", "packed_kv", "packed_kv=700+1300+96", read_packed_kv,
     [](const P& p) { return when(p.packed() && !alike(p), p.packed_kv, p.total_kv); }},
    {"qlen", "q_lengths", "qlen=1000,700", [](P& p, const T& t) { read(p.q_lengths, t); },
     [](const P& p) { return when(p.q_lengths); }},
    {"kvlen", "kv_lengths", "kvlen=1000,700", [](P& p, const T& t) { read(p.kv_lengths, t); },
     [](const P& p) { return when(p.kv_lengths); }},
    {"causal", "causal", "causal=bottom_right", [](P& p, const T& t) { read(p.causal, t, kCorners); },
     [](const P& p) { return when(p.causal != Causal::kNone, word_of(kCorners, p.causal)); }},
    {"window", "window", "window=256,-", read_window, print_window},
    {"mask", "mask", "mask=b11k", [](P& p, const T& t) { p.mask = read_extent(t, t.value); },
     [](const P& p) { return when(p.mask.has_value(), print_extent(p.mask.value_or(Extent{}))); }},
    {"bias", "bias", "bias=1hqk:fp32", read_bias, print_bias},
    {"alibi", "alibi", "alibi=b", read_alibi,
     [](const P& p) { return when(p.alibi != Alibi::kNone, p.alibi == Alibi::kPerHead ? "" : "b"); }},
    {"sink", "sink", "sink", [](P& p, const T& t) { read(p.sink, t); }, [](const P& p) { return when(p.sink); }},
    {"softcap", "softcap", "softcap=30", [](P& p, const T& t) { read(p.softcap, t); },
     [](const P& p) { return when(p.softcap != 0, p.softcap); }},
    {"scale", "softmax_scale", "scale=0.125", [](P& p, const T& t) { read(p.softmax_scale.emplace(), t); },
     [](const P& p) { return when(p.softmax_scale.has_value(), p.softmax_scale.value_or(0)); }},
    {"dropout", "dropout", "dropout=0.1", [](P& p, const T& t) { read(p.dropout.probability, t); },
     [](const P& p) { return when(p.dropout.probability != 0, p.dropout.probability); }},
    {"seed", "seed", "seed=7", [](P& p, const T& t) { read(p.dropout.seed, t); },
     [](const P& p) { return when(p.dropout.seed != 0, p.dropout.seed); }},
    {"offset", "offset", "offset=0", [](P& p, const T& t) { read(p.dropout.offset, t); },
     [](const P& p) { return when(p.dropout.offset != 0, p.dropout.offset); }},
    {"layout", "layout", "layout=bhsd", [](P& p, const T& t) { read(p.layout, t, kLayouts); },
     [](const P& p) { return when(p.layout != Layout::kBshd, word_of(kLayouts, p.layout)); }},
    {"deterministic", "deterministic", "deterministic", [](P& p, const T& t) { read(p.deterministic, t); },
     [](const P& p) { return when(p.deterministic); }},
};

/// The next word of the line; empty at its end.
std::string_view next_word(std::string_view& line) {
  constexpr std::string_view kBlank = " \t\r\n\v\f";
  line.remove_prefix(std::min(line.find_first_not_of(kBlank), line.size()));
  const std::string_view text = line.substr(0, line.find_first_of(kBlank));
  line.remove_prefix(text.size());
  return text;
}

/// The tokens that a line has said.
class Line {
 public:
  void read(std::string_view text, Problem& problem) {
    while (true) {
      const std::string_view word = next_word(text);
      if (word.empty()) return;
      const Token token = recognise(word);
      std::string_view& said = said_[static_cast<std::size_t>(token.row - kRows)];
      if (!said.empty()) refuse("token ", quote(word), " comes after ", quote(said), "; say it once");
      said = word;
      token.row->read(problem, token);
    }
  }

  [[nodiscard]] std::string_view said(std::string_view name) const {
    for (std::size_t i = 0; i < std::size(kRows); ++i) {
      if (kRows[i].name == name) return said_[i];
    }
    return {};
  }

  void require(std::string_view name) const {
    if (!said(name).empty()) return;
    const Row* row = std::find_if(std::begin(kRows), std::end(kRows), [&](const Row& r) { return r.name == name; });
    refuse("token '", name, "' is missing: the line must say ", row->field, ", as in ", quote(row->example));
  }

  void forbid(std::string_view name, std::string_view because_of) const {
    if (said(name).empty()) return;
    refuse("token ", quote(said(name)), " contradicts ", quote(said(because_of)), "; leave one of them out");
  }

  /// Throws an error of `validate` again, with the token that its sentence is about.
  [[noreturn]] void blame(const Error& error) const {
    const std::string_view sentence = error.what();
    std::size_t blamed = std::size(kRows);
    for (std::size_t i = 0; i < std::size(kRows); ++i) {  // the longest: head_dim_v starts with head_dim
      const bool starts = !said_[i].empty() && sentence.starts_with(kRows[i].field);
      if (starts && (blamed == std::size(kRows) || kRows[i].field.size() > kRows[blamed].field.size())) blamed = i;
    }
    if (blamed == std::size(kRows)) throw Error(error);
    refuse("token ", quote(said_[blamed]), ": ", sentence);
  }

 private:
  static Token recognise(std::string_view text) {
    const std::size_t equals = text.find('=');
    const bool assigned = equals != std::string_view::npos;
    const std::size_t digits = text.find_first_of("-+.0123456789");
    const std::string_view name = text.substr(0, std::min(equals, digits));
    for (const Row& row : kRows) {
      if (row.name != name) continue;
      const Token token{text, text.substr(std::min(name.size() + (assigned ? 1 : 0), text.size())), &row};
      const bool malformed = row.is_size() ? assigned || token.value.empty() : assigned == token.value.empty();
      if (malformed) refuse_form(token);
      return token;
    }
    if (find(kDirections, text) != nullptr || find(kDTypes, text) != nullptr) {
      refuse("token ", quote(text), " is out of place; direction and dtype come first, once each");
    }
    refuse("unknown token ", quote(text), suggestion(kRows, name));
  }

  std::array<std::string_view, std::size(kRows)> said_{};
};

/// Checks that every size is given once, and fills in the defaults.
void complete(const Line& line, Problem& p) {
  const auto has = [&](std::string_view name) { return !line.said(name).empty(); };
  if (has("packed")) {
    line.forbid("packed_q", "packed");
    line.forbid("packed_kv", "packed");
  } else if (has("packed_q") || has("packed_kv")) {
    line.require("packed_q");
    line.require("packed_kv");
  }
  const std::string_view q = has("packed") ? "packed" : "packed_q", kv = has("packed") ? "packed" : "packed_kv";
  if (known(p.packed_q)) line.forbid("b", q), line.forbid("sq", q);
  if (known(p.packed_kv)) line.forbid("b", kv), line.forbid("skv", kv);
  if (!known(p.packed_q) && !known(p.packed_kv)) line.require("b");
  if (!known(p.packed_q)) line.require("sq");
  line.require("hq");
  line.require("d");
  if (!has("hkv")) p.num_kv_heads = p.num_q_heads;
  if (!has("skv") && !known(p.packed_kv)) p.seqlen_kv = p.seqlen_q;
  if (!has("dv")) p.head_dim_v = p.head_dim;
}

template <typename T, std::size_t N>
T leading(std::string_view text, const Word<T> (&words)[N], std::string_view place) {
  if (const Word<T>* found = find(words, text)) return found->value;
  refuse("the ", place, " token must be ", list(words), ", not ", quote(text), suggestion(words, text));
}

}  // namespace

Problem parse_problem(std::string_view text) {
  Problem problem;
  problem.direction = leading(next_word(text), kDirections, "first");
  problem.dtype = leading(next_word(text), kDTypes, "second");
  Line line;
  line.read(text, problem);
  complete(line, problem);
  try {
    validate(problem);
  } catch (const Error& error) {
    line.blame(error);
  }
  return problem;
}

void parse_options(std::string_view options, Problem& problem) {
  Problem result = problem;
  Line line;
  line.read(options, result);
  for (const Row& row : kRows) {
    const bool of_tensors = row.is_size() || row.name.starts_with("packed");
    if (of_tensors && !line.said(row.name).empty()) {
      refuse("token ", quote(line.said(row.name)), " is not an option; sizes come from the tensors");
    }
  }
  problem = std::move(result);
}

std::string to_string(const Problem& problem) {
  std::string line = word_of(kDirections, problem.direction) + " " + name(problem.dtype);
  for (const Row& row : kRows) {
    const Value value = row.print(problem);
    if (!value) continue;
    line.append(" ").append(row.name).append(row.is_size() || value->empty() ? "" : "=").append(*value);
  }
  return line;
}

}  // namespace fovea
