#include "terminal.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>

namespace fovea::tools {
namespace {

constexpr std::size_t kLabelColumns = 12;

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view() : std::string_view(value);
}

const char* code_of(Ink ink) {
  switch (ink) {
    case Ink::kPlain:
      return "";
    case Ink::kStrong:
      return "\x1b[1m";
    case Ink::kDim:
      return "\x1b[2m";
    case Ink::kAccent:
      return "\x1b[36m";
    case Ink::kGood:
      return "\x1b[32m";
    case Ink::kBad:
      return "\x1b[31m";
  }
  return "";
}

/// The number in three significant digits, or all digits before the point where there are more.
std::string digits(double value) {
  if (!std::isfinite(value)) return fmt::format("{}", value);
  const double size = std::abs(value);
  return fmt::format("{:.{}f}", value, size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

}  // namespace

Terminal::Terminal(std::FILE* stream)
    : stream_(stream),
      interactive_(::isatty(::fileno(stream)) != 0 && variable("TERM") != "dumb"),
      colour_(interactive_ && variable("NO_COLOR").empty()),
      width_(80) {
  winsize size{};
  if (interactive_ && ::ioctl(::fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 0) width_ = size.ws_col;
}

std::string Terminal::paint(Ink ink, std::string_view text) const {
  if (!colour_ || ink == Ink::kPlain || text.empty()) return std::string(text);
  return fmt::format("{}{}\x1b[0m", code_of(ink), text);
}

void Terminal::write(std::string_view text) const {
  std::fwrite(text.data(), 1, text.size(), stream_);
  std::fflush(stream_);
}

void Terminal::line(std::string_view text) const { write(std::string(text) + '\n'); }

std::size_t columns_of(std::string_view text) {
  // UTF-8 continuation bytes take no column.
  return static_cast<std::size_t>(std::ranges::count_if(text, [](char c) { return (c & 0xc0) != 0x80; }));
}

std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", c);
    } else {
      out += c;
    }
  }
  return out;
}

std::string pad_right(std::string_view text, std::size_t columns) {
  const std::size_t taken = columns_of(text);
  return std::string(text) + std::string(columns > taken ? columns - taken : 0, ' ');
}

std::string pad_left(std::string_view text, std::size_t columns) {
  const std::size_t taken = columns_of(text);
  return std::string(columns > taken ? columns - taken : 0, ' ') + std::string(text);
}

std::string Table::text(const Terminal& terminal, std::string_view indent) const {
  std::vector<std::size_t> widths;
  widths.reserve(columns_.size());
  for (const Column& column : columns_) widths.push_back(std::max(column.least, columns_of(column.heading)));
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], columns_of(row[i].text));
  }
  const auto laid_out = [&](std::size_t i, std::string_view text) {
    if (columns_[i].number) return pad_left(text, widths[i]);
    return i + 1 == columns_.size() ? std::string(text) : pad_right(text, widths[i]);
  };
  std::string all(indent);
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    all += (i == 0 ? "" : "  ") + terminal.paint(Ink::kDim, laid_out(i, columns_[i].heading));
  }
  all += '\n';
  for (const auto& row : rows_) {
    all += indent;
    for (std::size_t i = 0; i < row.size(); ++i) {
      all += (i == 0 ? "" : "  ") + terminal.paint(row[i].ink, laid_out(i, row[i].text));
    }
    all += '\n';
  }
  return all;
}

std::string labelled(const Terminal& terminal, std::string_view label, std::string_view content) {
  return "  " + terminal.paint(Ink::kDim, pad_right(label, kLabelColumns - 1) + ' ') + std::string(content) + '\n';
}

ProgressBar::ProgressBar() : terminal_(stderr) {}

void ProgressBar::show(double fraction, std::string_view label) {
  if (!terminal_.interactive()) return;
  const double now = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  if (visible_ && now - last_shown_ < 0.05) return;
  last_shown_ = now;
  visible_ = true;
  constexpr int kCells = 24;
  constexpr std::array<std::string_view, 8> kEighths{"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const int eighths = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * kCells * 8);
  std::string done;
  for (int i = 0; i < eighths / 8; ++i) done += "█";
  done += kEighths[static_cast<std::size_t>(eighths % 8)];
  std::string rest;
  for (std::size_t i = columns_of(done); i < kCells; ++i) rest += "·";
  const int room = std::max(terminal_.width() - kCells - 10, 0);
  std::string_view shown = label.substr(0, static_cast<std::size_t>(room));
  terminal_.write(fmt::format("\r\x1b[2K  {}{} {:3.0f}%  {}", terminal_.paint(Ink::kAccent, done),
                              terminal_.paint(Ink::kDim, rest), fraction * 100, terminal_.paint(Ink::kDim, shown)));
}

void ProgressBar::clear() {
  if (visible_) terminal_.write("\r\x1b[2K");
  visible_ = false;
}

std::string number_text(double value) { return digits(value); }

std::string bytes_text(double bytes) {
  constexpr std::array<const char*, 6> kUnits{"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  std::size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{} {}", digits(bytes), kUnits[unit]);
}

std::string count_text(std::size_t count, std::string_view one, std::string_view more) {
  return fmt::format("{} {}", count, count == 1 ? one : more);
}

std::string seconds_text(double seconds) {
  if (seconds < 1e-3) return digits(seconds * 1e6) + " µs";
  if (seconds < 1.0) return digits(seconds * 1e3) + " ms";
  return digits(seconds) + " s";
}

}  // namespace fovea::tools
