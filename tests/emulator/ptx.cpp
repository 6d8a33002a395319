#include "tests/emulator/ptx.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace fovea::emulator {
namespace {

bool in_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%'; }

std::string trimmed(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return {};
  return std::string(text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1));
}

/// A virtual register while a program is read: where it first and last appears.
struct Virtual {
  int width = 0;
  int begin = -1, end = -1;  // instructions
  bool read_first = false;
  u32 place = 0;
};

class Reader {
 public:
  Reader(Program& program, std::string_view text) : program_(program), text_(text) {}

  void run() {
    skip();
    while (at_ < text_.size()) {
      outside();
      skip();
    }
    for (auto& [instruction, label] : branches_) program_.code[instruction].target = label_of(label);
    allocate();
  }

 private:
  struct Scope {
    std::map<std::string, int, std::less<>> registers;
    std::map<std::string, u32, std::less<>> labels;
    int parent;
  };
  struct Label {
    std::string name;
    int scope;
  };
  /// An operand before registers have places.
  struct Use {
    std::size_t instruction, operand;
    int variable;
  };

  void skip() {
    while (at_ < text_.size()) {
      if (std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
        ++at_;
      } else if (text_.substr(at_, 2) == "//") {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (text_.substr(at_, 2) == "/*") {
        at_ = text_.find("*/", at_) + 2;
      } else {
        return;
      }
    }
  }
  std::string until(std::string_view ends) {
    const std::size_t end = text_.find_first_of(ends, at_);
    std::string part = trimmed(text_.substr(at_, end - at_));
    at_ = end;
    return part;
  }
  [[nodiscard]] int line() {
    for (; counted_ < at_; ++counted_) line_ += text_[counted_] == '\n' ? 1 : 0;
    return line_;
  }

  /// A directive or variable between functions, or a function.
  void outside() {
    if (text_.substr(at_).starts_with(".version") || text_.substr(at_).starts_with(".target") ||
        text_.substr(at_).starts_with(".address_size")) {
      at_ = std::min(text_.find('\n', at_), text_.size());
      return;
    }
    const std::string head = until(";({=");
    if (head.find(".entry") != std::string::npos) {
      ++at_;
      params(until(")"));
      ++at_;
      const std::string rules = until("{");
      if (const std::size_t c = rules.find(".reqnctapercluster"); c != std::string::npos)
        program_.cluster = static_cast<u32>(std::atoi(rules.c_str() + c + 18));
      ++at_;
      body();
    } else if (text_[at_] == ';' || text_[at_] == '=') {
      std::string value;
      if (text_[at_] == '=') value = until(";");
      ++at_;
      variable(head, value);
    } else {
      throw std::runtime_error("PTX: what is '" + head + "'");
    }
  }

  void params(const std::string& list) {
    u32 at = 0;
    for (std::size_t begin = 0; begin < list.size();) {
      const std::size_t end = std::min(list.find(',', begin), list.size());
      const std::string one = trimmed(std::string_view(list).substr(begin, end - begin));
      begin = end + 1;
      if (one.empty()) continue;
      at = place_of(one, at, params_);
    }
    program_.param_bytes = at;
  }

  /// ".shared .align 8 .b8 name[16]": notes where it lies and returns where the next one may.
  u32 place_of(const std::string& declaration, u32 at, std::map<std::string, u32, std::less<>>& places) {
    u32 alignment = 1, bytes = 0;
    std::string name;
    for (std::size_t x = 0; x < declaration.size();) {
      const std::size_t end = std::min(declaration.find_first_of(" \t", x), declaration.size());
      const std::string word = declaration.substr(x, end - x);
      x = end + 1;
      if (word == ".align") {
        alignment = static_cast<u32>(std::atoi(declaration.c_str() + x));
        x = std::min(declaration.find_first_of(" \t", x), declaration.size()) + 1;
      } else if (word.size() > 2 && word[0] == '.' && std::isdigit(static_cast<unsigned char>(word.back())) != 0) {
        bytes = static_cast<u32>(std::atoi(word.c_str() + 2)) / 8;
      } else if (!word.empty() && word[0] != '.') {
        name = word;
      }
    }
    u32 count = 1;
    if (const std::size_t open = name.find('['); open != std::string::npos) {
      count = static_cast<u32>(std::atoi(name.c_str() + open + 1));
      name.resize(open);
    }
    at = (at + alignment - 1) / alignment * alignment;
    places[name] = at;
    return at + bytes * count;
  }

  void variable(const std::string& head, const std::string& value) {
    if (head.find(".shared") != std::string::npos) {
      if (head.find(".extern") != std::string::npos) {
        dynamic_shared_ = head;
        return;
      }
      shared_end_ = place_of(head, shared_end_, shared_);
    } else if (head.find(".global") != std::string::npos || head.find(".const") != std::string::npos) {
      constant(head, value);
    } else {
      throw std::runtime_error("PTX: a variable '" + head + "'");
    }
  }
  void constant(const std::string& head, const std::string& value) {
    const auto begin = static_cast<u32>(program_.globals.size());
    const u32 end = place_of(head, begin, globals_);
    program_.globals.resize(end);
    const std::size_t open = value.find('{');
    if (value.empty()) return;
    u32 at = globals_[last_name(head)];
    const bool bytes = head.find(".b8") != std::string::npos || head.find(".u8") != std::string::npos;
    const u32 width = bytes                                  ? 1
                      : head.find("64") != std::string::npos ? 8
                      : head.find("16") != std::string::npos ? 2
                                                             : 4;
    std::string list = open == std::string::npos ? value.substr(1) : value.substr(open + 1, value.find('}') - open - 1);
    for (std::size_t x = 0; x < list.size();) {
      const std::size_t next = std::min(list.find(',', x), list.size());
      const auto number = immediate(trimmed(std::string_view(list).substr(x, next - x)));
      if (!number) throw std::runtime_error("PTX: the value of '" + head + "'");
      if (at + width <= end) std::memcpy(program_.globals.data() + at, &*number, width);
      at += width;
      x = next + 1;
    }
  }
  static std::string last_name(const std::string& head) {
    std::string name = head.substr(head.find_last_of(" \t") + 1);
    return name.substr(0, name.find('['));
  }

  void body() {
    scopes_.push_back({{}, {}, -1});
    std::vector<int> open{0};
    for (skip(); !open.empty(); skip()) {
      scope_ = open.back();
      if (text_[at_] == '{') {
        scopes_.push_back({{}, {}, scope_});
        open.push_back(static_cast<int>(scopes_.size()) - 1);
        ++at_;
      } else if (text_[at_] == '}') {
        open.pop_back();
        ++at_;
      } else {
        statement();
      }
    }
    program_.static_shared_bytes = shared_end_ - kSharedBegin;
    program_.dynamic_shared = dynamic_shared_.empty() ? shared_end_ : place_of(dynamic_shared_, shared_end_, shared_);
  }

  void statement() {
    std::size_t end = at_;
    while (in_name(text_[end]) || text_[end] == '.') ++end;
    if (end > at_ && text_[end] == ':' && text_[end + 1] != ':') {
      scopes_[static_cast<std::size_t>(scope_)].labels[std::string(text_.substr(at_, end - at_))] =
          static_cast<u32>(program_.code.size());
      at_ = end + 1;
      return;
    }
    const int number = line();
    const std::string words = until(";");
    ++at_;
    if (words.empty()) return;
    if (words.starts_with(".reg")) return declare(words);
    if (words.starts_with(".pragma")) return;
    if (words.starts_with(".shared")) {
      if (dynamic_shared_placed_) throw std::runtime_error("PTX: '" + words + "' after its use");
      shared_end_ = place_of(words, shared_end_, shared_);
      return;
    }
    if (words.starts_with(".")) throw std::runtime_error("PTX: '" + words + "'");
    instruction(words, number);
  }

  void declare(const std::string& words) {
    const std::size_t type = words.find('.', 4), names = words.find_first_of(" \t", type);
    const std::string of = words.substr(type, names - type);
    const int width = of == ".pred"                        ? 1
                      : of.find("64") != std::string::npos ? 64
                      : of.find("16") != std::string::npos ? 16
                                                           : 32;
    auto& registers = scopes_[static_cast<std::size_t>(scope_)].registers;
    for (std::size_t x = names; x < words.size();) {
      const std::size_t next = std::min(words.find(',', x), words.size());
      const std::string name = trimmed(std::string_view(words).substr(x, next - x));
      x = next + 1;
      const std::size_t open = name.find('<');
      if (open == std::string::npos) {
        registers[name] = make(width);
        continue;
      }
      prefixes_[name.substr(0, open)] = width;
    }
  }
  int make(int width) {
    variables_.push_back({.width = width});
    return static_cast<int>(variables_.size()) - 1;
  }

  /// The register of that name, or −1.
  int variable_of(std::string_view name) {
    for (int s = scope_; s >= 0; s = scopes_[static_cast<std::size_t>(s)].parent) {
      const auto& registers = scopes_[static_cast<std::size_t>(s)].registers;
      if (const auto found = registers.find(name); found != registers.end()) return found->second;
    }
    if (name.empty() || name[0] != '%') return -1;
    std::size_t digits = name.size();
    while (digits > 1 && std::isdigit(static_cast<unsigned char>(name[digits - 1])) != 0) --digits;
    const auto prefix = prefixes_.find(name.substr(0, digits));
    if (prefix == prefixes_.end() || digits == name.size()) return -1;
    return scopes_.front().registers[std::string(name)] = make(prefix->second);
  }

  u32 label_of(const Label& label) const {
    for (int s = label.scope; s >= 0; s = scopes_[static_cast<std::size_t>(s)].parent) {
      const auto& labels = scopes_[static_cast<std::size_t>(s)].labels;
      if (const auto found = labels.find(label.name); found != labels.end()) return found->second;
    }
    throw std::runtime_error("PTX: no label " + label.name);
  }

  static std::optional<u64> immediate(const std::string& word) {
    if (word.empty()) return {};
    const bool negative = word[0] == '-';
    const std::string digits = word.substr(negative ? 1 : 0);
    if (digits.empty() || std::isdigit(static_cast<unsigned char>(digits[0])) == 0) return {};
    if (digits.starts_with("0f") || digits.starts_with("0F") || digits.starts_with("0d") || digits.starts_with("0D"))
      return std::strtoull(digits.c_str() + 2, nullptr, 16);
    const u64 number = std::strtoull(digits.c_str(), nullptr, 0);
    return negative ? u64{0} - number : number;
  }

  Operand constant_of(u64 number) {
    Operand operand{.kind = Operand::Kind::kConstant};
    const auto [found, fresh] = constants_.emplace(number, static_cast<u32>(program_.constants.size()));
    if (fresh) {
      Constant& constant = program_.constants.emplace_back();
      constant.words.fill(static_cast<u32>(number));
      constant.longs.fill(number);
    }
    operand.at = found->second;
    return operand;
  }

  void instruction(std::string words, int number) {
    Instruction made;
    made.line = number;
    const std::size_t index = program_.code.size();
    if (words[0] == '@') {
      const std::size_t space = words.find_first_of(" \t");
      made.guard_inverted = words[1] == '!';
      const std::string name = words.substr(made.guard_inverted ? 2 : 1, space - (made.guard_inverted ? 2 : 1));
      const int variable = variable_of(name);
      if (variable < 0) throw std::runtime_error("PTX: no predicate " + name);
      note(variable, index, true);
      made.guard = variable;
      guards_.push_back(index);
      words = trimmed(std::string_view(words).substr(space));
    }
    const std::size_t space = std::min(words.find_first_of(" \t"), words.size());
    const std::string name = words.substr(0, space);
    const std::string rest = trimmed(std::string_view(words).substr(space));
    if (name.starts_with("bra")) {
      branches_.emplace_back(index, Label{rest, scope_});
    } else {
      // What is written in part only, or added to, has been read.
      operands(made, rest, index, made.guard >= 0 || name.starts_with("wgmma"));
    }
    decode(name, made);
    program_.code.push_back(std::move(made));
  }

  void operands(Instruction& made, std::string_view rest, std::size_t index, bool adds) {
    bool open = false;
    const auto add_group = [&] {
      if (made.groups >= Instruction::kMostGroups) throw std::runtime_error("PTX: operands " + std::string(rest));
      made.begins[static_cast<std::size_t>(made.groups++)] = static_cast<std::uint16_t>(made.operands.size());
    };
    bool begins = true;  // a group
    for (std::size_t x = 0; x < rest.size();) {
      const char c = rest[x];
      if (c == '{') {
        if (!inside_address_) add_group();
        open = true, begins = false, ++x;
      } else if (c == '}') {
        open = false, ++x;
      } else if (c == '[') {
        add_group();
        inside_address_ = true, begins = false, ++x;
      } else if (c == ']') {
        inside_address_ = false, ++x;
      } else if (c == ',') {
        begins = !open && !inside_address_, ++x;
      } else if (c == '+') {
        ++x;
        const std::size_t end = std::min(rest.find_first_of("],", x), rest.size());
        const auto number = immediate(trimmed(rest.substr(x, end - x)));
        if (!number) throw std::runtime_error("PTX: an address of " + std::string(rest));
        made.operands.back().offset += static_cast<i64>(*number);
        x = end;
      } else if (c == '|') {
        begins = false, ++x;  // a|b is a group of two
      } else if (std::isspace(static_cast<unsigned char>(c)) != 0) {
        ++x;
      } else {
        bool inverted = false;
        if (c == '!') inverted = true, ++x;
        std::size_t end = x;
        if (rest[end] == '-') ++end;
        while (end < rest.size() && (in_name(rest[end]) || rest[end] == '.')) ++end;
        const std::string word(rest.substr(x, end - x));
        x = end;
        if (begins) add_group();
        begins = false;
        made.operands.push_back(operand(word, inverted));
        if (made.operands.back().kind == Operand::Kind::kRegister) {
          note(static_cast<int>(made.operands.back().at), index, made.groups > 1 || adds);
          uses_.push_back({index, made.operands.size() - 1, static_cast<int>(made.operands.back().at)});
        }
      }
    }
  }

  Operand operand(const std::string& word, bool inverted) {
    if (word == "_") return {};
    if (const int variable = variable_of(word); variable >= 0) {
      return {.kind = Operand::Kind::kRegister,
              .width = static_cast<std::uint8_t>(variables_[static_cast<std::size_t>(variable)].width),
              .inverted = inverted,
              .at = static_cast<u32>(variable)};
    }
    if (const auto number = immediate(word)) return constant_of(*number);
    if (const auto found = params_.find(word); found != params_.end()) {
      Operand param{.kind = Operand::Kind::kSpecial, .at = static_cast<u32>(special_register("param"))};
      param.offset = found->second;
      return param;
    }
    if (const auto found = shared_.find(word); found != shared_.end()) return constant_of(found->second);
    if (!dynamic_shared_.empty() && last_name(dynamic_shared_) == word) {
      dynamic_shared_placed_ = true;
      place_of(dynamic_shared_, shared_end_, shared_);
      return constant_of(shared_.at(word));
    }
    if (const auto found = globals_.find(word); found != globals_.end())
      return constant_of(reinterpret_cast<u64>(program_.globals.data() + found->second));
    if (const int special = special_register(word); special >= 0)
      return {.kind = Operand::Kind::kSpecial, .at = static_cast<u32>(special)};
    throw std::runtime_error("PTX: what is '" + word + "'");
  }

  void note(int variable, std::size_t index, bool read) {
    Virtual& v = variables_[static_cast<std::size_t>(variable)];
    if (v.begin < 0) v.begin = static_cast<int>(index), v.read_first = read;
    v.end = static_cast<int>(index);
  }

  /// Gives registers places in the file, which those that are never alive together share.
  void allocate() {
    std::vector<std::pair<int, int>> loops;
    for (const auto& [instruction, label] : branches_) {
      const auto target = static_cast<int>(program_.code[instruction].target);
      if (target <= static_cast<int>(instruction)) loops.emplace_back(target, static_cast<int>(instruction));
    }
    for (bool changed = true; changed;) {
      changed = false;
      for (Virtual& v : variables_) {
        for (const auto& [begin, end] : loops) {
          if (v.begin < 0) continue;
          if (v.begin < begin && v.end >= begin && v.end < end) v.end = end, changed = true;
          if (v.read_first && v.begin > begin && v.begin <= end) v.begin = begin, changed = true;
          if (v.read_first && v.begin == begin && v.end < end) v.end = end, changed = true;
          if (v.begin > begin && v.begin <= end && v.end > end) v.begin = begin, changed = true;  // taken back and on
        }
      }
    }
    std::vector<std::size_t> order;
    for (std::size_t v = 0; v < variables_.size(); ++v) {
      if (variables_[v].begin >= 0) order.push_back(v);
    }
    std::ranges::stable_sort(order, {}, [&](std::size_t v) { return variables_[v].begin; });
    std::map<int, std::vector<u32>> free;   // by width
    std::multimap<int, std::size_t> alive;  // by end
    for (const std::size_t v : order) {
      Virtual& mine = variables_[v];
      while (!alive.empty() && alive.begin()->first < mine.begin) {
        const Virtual& over = variables_[alive.begin()->second];
        free[kind(over.width)].push_back(over.place);
        alive.erase(alive.begin());
      }
      auto& places = free[kind(mine.width)];
      if (!places.empty()) {
        mine.place = places.back();
        places.pop_back();
      } else if (mine.width == 1) {
        mine.place = program_.predicates++;
      } else {
        mine.place = program_.file_bytes;
        program_.file_bytes += kLanes * static_cast<u32>(kind(mine.width)) / 8;
      }
      alive.emplace(mine.end, v);
    }
    for (const Use& use : uses_)
      program_.code[use.instruction].operands[use.operand].at =
          variables_[static_cast<std::size_t>(use.variable)].place;
    for (const std::size_t index : guards_) {
      Instruction& guarded = program_.code[index];
      guarded.guard = static_cast<int>(variables_[static_cast<std::size_t>(guarded.guard)].place);
    }
  }
  static int kind(int width) { return width == 16 ? 32 : width; }

  Program& program_;
  std::string_view text_;
  std::size_t at_ = 0, counted_ = 0;
  int line_ = 0;
  int scope_ = 0;
  bool inside_address_ = false;
  std::vector<Scope> scopes_;
  std::map<std::string, int, std::less<>> prefixes_;
  std::vector<Virtual> variables_;
  std::map<std::string, u32, std::less<>> params_, shared_, globals_;
  u32 shared_end_ = kSharedBegin;
  std::string dynamic_shared_;
  bool dynamic_shared_placed_ = false;
  std::map<u64, u32> constants_;
  std::vector<std::pair<std::size_t, Label>> branches_;
  std::vector<Use> uses_;
  std::vector<std::size_t> guards_;
};

}  // namespace

Program::Program(std::string_view ptx) {
  globals.reserve(1 << 20);  // addresses of what is in it are constants
  for (std::size_t at = 0; at < ptx.size();) {
    const std::size_t end = std::min(ptx.find('\n', at), ptx.size());
    lines.emplace_back(ptx.substr(at, end - at));
    at = end + 1;
  }
  Reader(*this, ptx).run();
}

std::string Program::text_of(const Instruction& i) const {
  const auto line = static_cast<std::size_t>(i.line);
  return "line " + std::to_string(line + 1) + ": " + (line < lines.size() ? trimmed(lines[line]) : "");
}

}  // namespace fovea::emulator
