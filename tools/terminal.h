#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace fovea::tools {

enum class Ink : std::uint8_t { kPlain, kStrong, kDim, kAccent, kGood, kBad };

/// How to write to a stream: colours where it is a terminal and NO_COLOR is unset or empty (https://no-color.org),
/// plain text in a pipe.
class Terminal {
 public:
  explicit Terminal(std::FILE* stream);

  [[nodiscard]] bool interactive() const { return interactive_; }
  [[nodiscard]] int width() const { return width_; }  ///< columns; 80 where unknown
  [[nodiscard]] std::string paint(Ink ink, std::string_view text) const;
  void write(std::string_view text) const;
  void line(std::string_view text = {}) const;

 private:
  std::FILE* stream_;
  bool interactive_;
  bool colour_;
  int width_;
};

/// Columns that a text takes on a screen (UTF-8, every character one column wide).
[[nodiscard]] std::size_t columns_of(std::string_view text);

/// A text from outside with its control characters escaped: it can neither steer a terminal nor end a line.
[[nodiscard]] std::string printable(std::string_view text);

/// The text filled with spaces up to `columns`, on the right or, for numbers, on the left.
[[nodiscard]] std::string pad_right(std::string_view text, std::size_t columns);
[[nodiscard]] std::string pad_left(std::string_view text, std::size_t columns);

/// Aligned columns under dim headings.  The first column is text, the others follow `numbers`.
class Table {
 public:
  struct Column {
    std::string heading;
    bool number = false;    // to the right
    std::size_t least = 0;  // columns it takes at least, so that several tables line up
  };
  struct Cell {
    std::string text;
    Ink ink = Ink::kPlain;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  void add(std::vector<Cell> cells) { rows_.push_back(std::move(cells)); }
  [[nodiscard]] std::string text(const Terminal& terminal, std::string_view indent = "  ") const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

/// "label   content" with dim labels in one column; lines that follow of the same label leave it out.
[[nodiscard]] std::string labelled(const Terminal& terminal, std::string_view label, std::string_view content);

/// A bar on stderr that wipes itself away; silent unless stderr is a terminal.
class ProgressBar {
 public:
  ProgressBar();
  ~ProgressBar() { clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void show(double fraction, std::string_view label);
  void clear();

 private:
  Terminal terminal_;
  bool visible_ = false;
  double last_shown_ = 0.0;  // seconds of a steady clock
};

[[nodiscard]] std::string bytes_text(double bytes);  ///< "1.5 MiB"
/// "1 problem", "2 problems".
[[nodiscard]] std::string count_text(std::size_t count, std::string_view one, std::string_view more);
[[nodiscard]] std::string seconds_text(double seconds);  ///< "12.3 ms", three significant digits
[[nodiscard]] std::string number_text(double value);     ///< three significant digits, without exponent

}  // namespace fovea::tools
