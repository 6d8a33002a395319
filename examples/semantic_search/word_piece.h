#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

/// BERT's uncased WordPiece (1810.04805): words in lower case without accents and single punctuation marks, each cut
/// into the longest pieces of the vocabulary.
class WordPiece {
 public:
  /// A file of one piece a line; its line numbers are the ids.  Throws std::runtime_error.
  explicit WordPiece(const std::string& vocabulary_file);

  /// [CLS] pieces [SEP], at most `longest` of them.  `text` is UTF-8; what is none becomes U+FFFD, which goes.
  [[nodiscard]] std::vector<std::int32_t> encode(std::string_view text, std::size_t longest) const;

 private:
  [[nodiscard]] std::int32_t id(const std::string& piece) const;
  void cut(const std::u32string& word, std::vector<std::int32_t>& ids) const;

  std::unordered_map<std::string, std::int32_t> ids_;
};
