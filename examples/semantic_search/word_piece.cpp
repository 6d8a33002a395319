#include "word_piece.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "letters.h"

namespace {

constexpr char32_t kReplacement = 0xfffd;

/// The next character of UTF-8; moves `at` past it.
char32_t next_character(std::string_view text, std::size_t& at) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const unsigned first = byte(at++);
  if (first < 0x80) return first;
  const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
  char32_t c = first & (0x3fU >> more);
  for (int i = 0; i < more; ++i) {
    if ((byte(at) & 0xc0U) != 0x80U) return kReplacement;
    c = c << 6 | (byte(at++) & 0x3fU);
  }
  return c;
}

void append(std::string& text, char32_t c) {
  const auto add = [&](char32_t bits) { text += static_cast<char>(bits); };
  if (c < 0x80) return add(c);
  if (c < 0x800) {
    add(0xc0 | c >> 6);
  } else {
    if (c < 0x10000) {
      add(0xe0 | c >> 12);
    } else {
      add(0xf0 | c >> 18);
      add(0x80 | (c >> 12 & 0x3f));
    }
    add(0x80 | (c >> 6 & 0x3f));
  }
  add(0x80 | (c & 0x3f));
}

std::string to_utf8(std::u32string_view characters) {
  std::string text;
  for (const char32_t c : characters) append(text, c);
  return text;
}

template <std::size_t N>
bool within(const letters::Pair (&ranges)[N], char32_t c) {
  const auto after = std::upper_bound(std::begin(ranges), std::end(ranges), c,
                                      [](char32_t x, const letters::Pair& range) { return x < range.first; });
  return after != std::begin(ranges) && c <= std::prev(after)->second;
}

char32_t plain(char32_t c) {
  const auto found = std::lower_bound(std::begin(letters::kPlain), std::end(letters::kPlain), c,
                                      [](const letters::Pair& pair, char32_t x) { return pair.first < x; });
  return found != std::end(letters::kPlain) && found->first == c ? found->second : c;
}

bool is_space(char32_t c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || c == 0xa0 || (c >= 0x2000 && c <= 0x200a) || c == 0x3000;
}

bool is_control(char32_t c) {
  return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0xad || (c >= 0x200b && c <= 0x200f) || c == 0xfeff ||
         c == kReplacement;
}

bool is_punctuation(char32_t c) {
  if (c < 0x80)
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
  return within(letters::kPunctuation, c);
}

/// Chinese characters, which are words of their own.
bool is_ideograph(char32_t c) {
  return (c >= 0x3400 && c <= 0x9fff) || (c >= 0xf900 && c <= 0xfaff) || (c >= 0x20000 && c <= 0x2fa1f);
}

}  // namespace

WordPiece::WordPiece(const std::string& vocabulary_file) {
  std::ifstream file(vocabulary_file);
  if (!file) throw std::runtime_error(vocabulary_file + ": cannot be read; give the folder of all-MiniLM-L6-v2");
  for (std::string piece; std::getline(file, piece);) ids_.emplace(piece, static_cast<std::int32_t>(ids_.size()));
  for (const char* needed : {"[CLS]", "[SEP]", "[UNK]"}) {
    if (!ids_.contains(needed))
      throw std::runtime_error(vocabulary_file + ": is no vocabulary, " + needed + " is missing");
  }
}

std::int32_t WordPiece::id(const std::string& piece) const {
  const auto found = ids_.find(piece);
  return found == ids_.end() ? -1 : found->second;
}

std::vector<std::int32_t> WordPiece::encode(std::string_view text, std::size_t longest) const {
  std::vector<std::int32_t> ids{id("[CLS]")};
  std::u32string word;
  const auto end_word = [&] {
    if (!word.empty()) cut(word, ids);
    word.clear();
  };
  for (std::size_t at = 0; at < text.size();) {
    const char32_t c = plain(next_character(text, at));
    if (is_space(c)) {
      end_word();
    } else if (is_punctuation(c) || is_ideograph(c)) {
      end_word();
      word = c;
      end_word();
    } else if (!is_control(c) && !within(letters::kMarks, c)) {
      word += c;
    }
  }
  end_word();
  ids.resize(std::min(ids.size(), longest - 1));
  ids.push_back(id("[SEP]"));
  return ids;
}

void WordPiece::cut(const std::u32string& word, std::vector<std::int32_t>& ids) const {
  constexpr std::size_t kLongestWord = 100;
  const std::size_t before = ids.size();
  for (std::size_t begin = 0; begin < word.size();) {
    std::size_t end = word.size() <= kLongestWord ? word.size() : begin;
    std::int32_t found = -1;
    for (; end > begin && found < 0; --end) {
      found = id((begin > 0 ? "##" : "") + to_utf8(std::u32string_view(word).substr(begin, end - begin)));
      if (found >= 0) break;
    }
    if (found < 0) {
      ids.resize(before);
      ids.push_back(id("[UNK]"));
      return;
    }
    ids.push_back(found);
    begin = end;
  }
}
